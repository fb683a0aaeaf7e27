"""The peer of `daformer_step.py`: transformers' Mix Transformer under DAFormer's head, written in torch."""

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from fmda.models.daformer import DaFormerConfig
from fmda.trees import Tree
from fmda.weights.network import save
from fmda.weights.registry import FAMILIES


class Unit(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, before: int, after: int, size: int, dilation: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, size, 1, size // 2 * dilation, dilation, groups, bias=False)
        self.bn = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [B, after, h, w]."""
        return functional.relu(self.bn(self.conv(x)))


class Separable(nn.Module):
    """Dilated depthwise and pointwise convolution."""

    def __init__(self, before: int, after: int, dilation: int) -> None:
        super().__init__()
        self.depthwise_conv = Unit(before, before, 3, dilation, before)
        self.pointwise_conv = Unit(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [B, after, h, w]."""
        return self.pointwise_conv(self.depthwise_conv(x))


class Fusion(nn.Module):
    """Branches of several dilations, and a convolution over all of them."""

    def __init__(self, before: int, after: int, dilations: Sequence[int]) -> None:
        super().__init__()
        branches = [Unit(before, after, 1) if d == 1 else Separable(before, after, d) for d in dilations]
        self.aspp_modules = nn.ModuleList(branches)
        self.bottleneck = Unit(len(dilations) * after, after, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [B, after, h, w]."""
        return self.bottleneck(torch.cat([branch(x) for branch in self.aspp_modules], 1))


class Embedding(nn.Module):
    """Linear layer on the channels of a map."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.proj = nn.Linear(before, after)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [B, after, h, w]."""
        return self.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Head(nn.Module):
    """DAFormer's head: maps [B, c, h, w] -> logits at the size of the first."""

    def __init__(self, config: DaFormerConfig) -> None:
        super().__init__()
        widths, width = config.encoder.widths, config.width
        self.embed_layers = nn.ModuleDict({str(i): Embedding(before, width) for i, before in enumerate(widths)})
        self.fuse_layer = Fusion(len(widths) * width, width, config.dilations)
        self.conv_seg = nn.Conv2d(width, config.classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Returns [B, classes, h, w]."""
        embedded = [layer(x) for layer, x in zip(self.embed_layers.values(), maps, strict=True)]
        return self.conv_seg(self.fuse_layer(torch.cat([resized(x, maps[0].shape[2:]) for x in embedded], 1)))


class DaFormer(nn.Module):
    """Pixels [B, 3, H, W] -> (logits at their size, last map of the encoder)."""

    def __init__(self, encoder: nn.Module, head: Head) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def features(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Returns the four maps of the encoder."""
        return self.encoder(pixels, output_hidden_states=True, return_dict=True).hidden_states

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (logits, last map)."""
        maps = self.features(pixels)
        return resized(self.head(maps), pixels.shape[2:]), maps[-1]


def resized(x: Tensor, size: Any) -> Tensor:
    """Returns the map at (height, width), bilinear."""
    return functional.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def torch_daformer(config: DaFormerConfig, tree: Tree, device: str) -> DaFormer:
    """Returns the network with the arrays of ours, in training, channels last."""
    head = Head(config)
    with tempfile.TemporaryDirectory() as folder:
        # its names differ between releases of transformers, which translates them as it loads
        encoder = transformers.SegformerModel.from_pretrained(save("mit", folder, config.encoder, tree["encoder"]))
    arrays = FAMILIES["daformer"].export(config, None)[1].write(tree)
    state = {name.removeprefix("decode_head."): array for name, array in arrays.items() if "decode_head." in name}
    missing, surplus = head.load_state_dict(
        {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in state.items()}, strict=False
    )
    assert not surplus and all(name.endswith("num_batches_tracked") for name in missing), (missing, surplus)
    network = DaFormer(encoder, head)
    return network.to(device, memory_format=torch.channels_last).train()
