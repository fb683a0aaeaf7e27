"""TinyViT as MobileSAM's image encoder, written plainly in PyTorch under MobileSAM's names."""

import torch
from torch import nn
from torch.nn import functional as F


class ConvNorm(nn.Sequential):
    def __init__(self, before, after, size=1, stride=1, groups=1):
        super().__init__()
        self.add_module("c", nn.Conv2d(before, after, size, stride, size // 2, groups=groups, bias=False))
        self.add_module("bn", nn.BatchNorm2d(after))


class Convs(nn.Module):
    def __init__(self, before, hidden, after, stride=1, residual=False):
        super().__init__()
        self.conv1 = ConvNorm(before, hidden)
        self.conv2 = ConvNorm(hidden, hidden, 3, stride, hidden)
        self.conv3 = ConvNorm(hidden, after)
        self.residual = residual

    def forward(self, x):
        y = self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))
        return F.gelu(x + y) if self.residual else y


class Attention(nn.Module):
    def __init__(self, width, heads, side):
        super().__init__()
        self.heads, self.side = heads, side
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, side * side))

    def forward(self, x):
        n, places, width = x.shape
        qkv = self.qkv(self.norm(x)).view(n, places, self.heads, -1)
        query, key, value = (part.transpose(1, 2) for part in qkv.split(width // self.heads, dim=3))
        pairs = [(i, j) for i in range(self.side) for j in range(self.side)]
        index = torch.tensor([[abs(a - c) * self.side + abs(b - d) for c, d in pairs] for a, b in pairs])
        weights = query @ key.transpose(-2, -1) * (width // self.heads) ** -0.5 + self.attention_biases[:, index]
        return self.proj((weights.softmax(-1) @ value).transpose(1, 2).reshape(n, places, width))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class Block(nn.Module):
    def __init__(self, width, heads, window):
        super().__init__()
        self.window = window
        self.attn = Attention(width, heads, window)
        self.local_conv = ConvNorm(width, width, 3, 1, width)
        self.mlp = Mlp(width)

    def forward(self, x):
        b, width, h, w = x.shape
        size = self.window
        y = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, -w % size, 0, -h % size))
        attended = torch.zeros_like(y)
        for i in range(0, y.shape[1], size):
            for j in range(0, y.shape[2], size):
                window = y[:, i : i + size, j : j + size].reshape(b, size * size, width)
                attended[:, i : i + size, j : j + size] = self.attn(window).reshape(b, size, size, width)
        x = self.local_conv(x + attended[:, :h, :w].permute(0, 3, 1, 2))
        return x + self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Stage(nn.Module):
    def __init__(self, blocks, step):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        if step is not None:
            self.downsample = step

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class LayerNorm2d(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], self.weight, self.bias, 1e-6).permute(0, 3, 1, 2)


class TinyVit(nn.Module):
    """Takes the fields of our TinyVitConfig; with `classes` also the classifier that the published file still holds."""

    def __init__(self, config, classes=0):
        super().__init__()
        widths, steps = config.widths, (2, 2, 1)
        self.patch_embed = nn.Module()
        self.patch_embed.seq = nn.Sequential(
            ConvNorm(3, widths[0] // 2, 3, 2), nn.GELU(), ConvNorm(widths[0] // 2, widths[0], 3, 2)
        )
        down = [Convs(widths[n], widths[n + 1], widths[n + 1], steps[n]) for n in range(3)] + [None]
        convs = [Convs(widths[0], 4 * widths[0], widths[0], residual=True) for _ in range(config.depths[0])]
        blocks = [
            [Block(widths[n], config.heads[n - 1], config.windows[n - 1]) for _ in range(config.depths[n])]
            for n in (1, 2, 3)
        ]
        self.layers = nn.ModuleList(Stage(*pair) for pair in zip([convs, *blocks], down, strict=True))
        channels = config.channels
        self.neck = nn.Sequential(
            nn.Conv2d(widths[-1], channels, 1, bias=False),
            LayerNorm2d(channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            LayerNorm2d(channels),
        )
        if classes:
            self.norm_head, self.head = nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], classes)

    def forward(self, x):
        """Returns the map after the stem and after each stage, and the embedding."""
        maps = [self.patch_embed.seq(x)]
        for n, stage in enumerate(self.layers):
            maps.append(stage(maps[-1] if n == 0 else self.layers[n - 1].downsample(maps[-1])))
        return [*maps, self.neck(maps[-1])]
