"""DAFormer's head and HRDA's fusion written plainly in PyTorch, under OpenMMLab's names."""

import torch
from torch import nn
from torch.nn import functional as F


class Unit(nn.Module):
    def __init__(self, before, after, size, dilation=1, groups=1):
        super().__init__()
        padding = size // 2 * dilation
        self.conv = nn.Conv2d(before, after, size, 1, padding, dilation, groups, bias=False)
        self.bn = nn.BatchNorm2d(after)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Separable(nn.Module):
    def __init__(self, before, after, dilation):
        super().__init__()
        self.depthwise_conv = Unit(before, before, 3, dilation, before)
        self.pointwise_conv = Unit(before, after, 1)

    def forward(self, x):
        return self.pointwise_conv(self.depthwise_conv(x))


class Aspp(nn.Module):
    def __init__(self, before, after, dilations):
        super().__init__()
        branches = [Unit(before, after, 1) if d == 1 else Separable(before, after, d) for d in dilations]
        self.aspp_modules = nn.ModuleList(branches)
        self.bottleneck = Unit(len(dilations) * after, after, 3)

    def forward(self, x):
        return self.bottleneck(torch.cat([branch(x) for branch in self.aspp_modules], 1))


class Embedding(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.proj = nn.Linear(before, after)

    def forward(self, x):
        return self.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Network(nn.Module):
    """transformers' Mix Transformer of `settings` below what `make_head` returns."""

    def __init__(self, settings, make_head):
        from transformers import SegformerConfig, SegformerModel

        super().__init__()
        self.segformer = SegformerModel(SegformerConfig(**settings))
        self.decode_head = make_head()

    def maps(self, images):
        return self.segformer(images, output_hidden_states=True).hidden_states


class Head(nn.Module):
    """DAFormer's head with `dilations`; without, the attention head of HRDA. Maps [B, c, h, w] -> logits."""

    def __init__(self, widths, width, classes, dilations=(1, 6, 12, 18)):
        super().__init__()
        joined = len(widths) * width
        self.embed_layers = nn.ModuleDict({str(i): Embedding(before, width) for i, before in enumerate(widths)})
        self.fuse_layer = Aspp(joined, width, dilations) if dilations else Unit(joined, width, 1)
        self.conv_seg = nn.Conv2d(width, classes, 1)

    def forward(self, maps):
        size = maps[0].shape[2:]
        embedded = [layer(x) for layer, x in zip(self.embed_layers.values(), maps, strict=True)]
        joined = torch.cat([F.interpolate(x, size, mode="bilinear", align_corners=False) for x in embedded], 1)
        return self.conv_seg(self.fuse_layer(joined))


def halved(pixels):
    return F.interpolate(pixels, scale_factor=0.5, mode="bilinear", align_corners=False)


def doubled(x):
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def with_detail(pixels, corner, segment, attend):
    """Returns (fused, detail) logits with one window in detail; `segment` and `attend` map images to logits."""
    row, column = corner
    h, w = pixels.shape[2] // 2, pixels.shape[3] // 2
    context = segment(halved(pixels))
    attention = torch.sigmoid(attend(halved(pixels)))
    mask = torch.zeros_like(attention)
    mask[:, :, row // 8 : (row + h) // 8, column // 8 : (column + w) // 8] = 1
    attention = attention * mask
    detail = segment(pixels[:, :, row : row + h, column : column + w])
    right, below = w - column, h - row
    padded = F.pad(detail, (column // 4, right // 4, row // 4, below // 4))
    return doubled((1 - attention) * context) + doubled(attention) * padded, detail


def slid(pixels, segment, attend):
    """Returns the fused logits with the detail seen everywhere, by windows of half the sides at steps of a quarter."""
    height, width = pixels.shape[2:]
    corners = [(row, column) for row in (0, height // 4, height // 2) for column in (0, width // 4, width // 2)]
    cuts = [pixels[:, :, row : row + height // 2, column : column + width // 2] for row, column in corners]
    attention, context = torch.sigmoid(attend(halved(pixels))), segment(halved(pixels))
    total = count = 0
    for (row, column), logits in zip(corners, segment(torch.cat(cuts)).chunk(len(corners)), strict=True):
        pad = (column // 4, (width // 2 - column) // 4, row // 4, (height // 2 - row) // 4)
        total, count = total + F.pad(logits, pad), count + F.pad(torch.ones_like(logits), pad)
    return doubled((1 - attention) * context) + doubled(attention) * total / count
