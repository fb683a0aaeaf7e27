"""CLIP's towers written plainly in PyTorch under OpenCLIP's names, and how far two arrays are apart."""

from collections import OrderedDict

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def deviation(ours, theirs):
    """Largest difference relative to the largest value. Torch arrays may be NCHW against our NHWC."""
    ours = np.asarray(ours)
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    if ours.ndim == 4 and ours.shape != theirs.shape:
        theirs = theirs.transpose(0, 2, 3, 1)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def arrays(module):
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


class QuickGelu(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class ResidualBlock(nn.Module):
    def __init__(self, width, heads, mlp_width, act):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, mlp_width)), ("gelu", act()), ("c_proj", nn.Linear(mlp_width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, mlp_width, act):
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualBlock(width, heads, mlp_width, act) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Vit(nn.Module):
    def __init__(self, config, embed_dim, act):
        super().__init__()
        c = config
        self.conv1 = nn.Conv2d(3, c.width, c.patch_size, c.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(c.width))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + (c.image_size // c.patch_size) ** 2, c.width))
        self.ln_pre = nn.LayerNorm(c.width)
        self.transformer = Transformer(c.width, c.layers, c.heads, c.mlp_width, act)
        self.ln_post = nn.LayerNorm(c.width)
        self.proj = nn.Parameter(torch.zeros(c.width, embed_dim))

    def tokens(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], 1) + self.positional_embedding
        return self.ln_pre(x)

    def forward(self, x):
        return self.ln_post(self.transformer(self.tokens(x))[:, 0]) @ self.proj


class Bottleneck(nn.Module):
    def __init__(self, channels, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.pool = nn.AvgPool2d(stride)
        self.downsample = None
        if stride > 1 or channels != 4 * planes:
            self.downsample = nn.Sequential(
                OrderedDict(
                    [
                        ("-1", nn.AvgPool2d(stride)),
                        ("0", nn.Conv2d(channels, 4 * planes, 1, bias=False)),
                        ("1", nn.BatchNorm2d(4 * planes)),
                    ]
                )
            )

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.pool(F.relu(self.bn2(self.conv2(y))))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class AttentionPool(nn.Module):
    def __init__(self, side, width, heads, embed_dim):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.zeros(side * side + 1, width))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, embed_dim)

    def forward(self, x):
        b, c = x.shape[:2]
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding

        def split(y):
            return y.view(b, -1, self.heads, c // self.heads).transpose(1, 2)

        q, k, v = split(self.q_proj(x[:, :1])), split(self.k_proj(x)), split(self.v_proj(x))
        weights = torch.softmax(q @ k.transpose(-1, -2) * (c // self.heads) ** -0.5, -1)
        return self.c_proj((weights @ v).transpose(1, 2).reshape(b, c))


class ModifiedResNet(nn.Module):
    def __init__(self, config, embed_dim):
        super().__init__()
        width = config.width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        channels = width
        for stage, depth in enumerate(config.layers):
            blocks = []
            for index in range(depth):
                blocks.append(Bottleneck(channels, width * 2**stage, 2 if stage and not index else 1))
                channels = 4 * width * 2**stage
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool(config.image_size // 32, channels, config.heads, embed_dim)

    def stages(self, x):
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        x = F.avg_pool2d(x, 2)
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x):
        return self.attnpool(self.stages(x)[-1])


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mlp(nn.Module):
    def __init__(self, width, hidden, out, bias=True):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out, bias=bias)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class ConvNextBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv_dw = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = Mlp(channels, 4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x):
        y = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1))) * self.gamma
        return x + y.permute(0, 3, 1, 2)


class ConvNextStage(nn.Module):
    def __init__(self, before, channels, depth, downsample):
        super().__init__()
        self.downsample = nn.Identity()
        if downsample:
            self.downsample = nn.Sequential(LayerNorm2d(before, eps=1e-6), nn.Conv2d(before, channels, 2, stride=2))
        self.blocks = nn.Sequential(*(ConvNextBlock(channels) for _ in range(depth)))

    def forward(self, x):
        return self.blocks(self.downsample(x))


class ConvNextTower(nn.Module):
    def __init__(self, config, embed_dim):
        super().__init__()
        c = config.channels
        self.trunk = nn.Module()
        self.trunk.stem = nn.Sequential(nn.Conv2d(3, c[0], 4, stride=4), LayerNorm2d(c[0], eps=1e-6))
        before = (c[0], *c[:-1])
        self.trunk.stages = nn.Sequential(*(ConvNextStage(before[i], c[i], config.depths[i], i > 0) for i in range(4)))
        self.trunk.head = nn.Module()
        self.trunk.head.norm = LayerNorm2d(c[-1], eps=1e-6)
        self.head = nn.Module()
        self.head.mlp = Mlp(c[-1], config.head_width, embed_dim, bias=False)

    def stages(self, x):
        x = self.trunk.stem(x)
        maps = []
        for stage in self.trunk.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x):
        x = self.trunk.head.norm(self.stages(x)[-1].mean((2, 3), keepdim=True)).flatten(1)
        return self.head.mlp(x)


class OpenClip(nn.Module):
    """Both towers. `kind` is the class of the image tower."""

    def __init__(self, config, kind):
        super().__init__()
        text = config.text
        act = {"gelu": nn.GELU, "quick_gelu": QuickGelu}[text.activation]
        extra = (act,) if kind is Vit else ()
        self.visual = kind(config.vision, config.embed_dim, *extra)
        self.transformer = Transformer(text.width, text.layers, text.heads, text.mlp_width, act)
        self.token_embedding = nn.Embedding(text.vocab_size, text.width)
        self.positional_embedding = nn.Parameter(torch.zeros(text.context, text.width))
        self.ln_final = nn.LayerNorm(text.width)
        self.text_projection = nn.Parameter(torch.zeros(text.width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def text(self, ids):
        length = ids.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        x = self.token_embedding(ids) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection
