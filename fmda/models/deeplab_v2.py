"""DeepLabV2 (Chen et al. 2017): a dilated ResNet, and class logits as a sum of dilated convolutions."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from fmda.models.resnet import Four, ResNetEncoder, ResNetEncoderConfig
from fmda.models.segformer import EncoderDecoder
from fmda.nn.conv import conv


@dataclass(frozen=True)
class DeepLabV2Config:
    """Shape of the network; the defaults are those of the literature on domain adaptation.

    Attributes:
        encoder: the ResNet, without ImageNet's classes.
        strides, dilations: of its stages.
        rates: dilations of the head's branches; the paper has 6, 12, 18, 24, of which adaptation uses the first two.
        classes: logits, in the checkpoint's order.
    """

    encoder: ResNetEncoderConfig = ResNetEncoderConfig(layers=(3, 4, 23, 3), deep_stem=True)
    strides: Four = (1, 2, 1, 1)
    dilations: Four = (1, 1, 2, 4)
    rates: tuple[int, ...] = (6, 12)
    classes: int = 19


class DeepLabV2Head(nnx.Module):
    """Float32 class logits from the last of several maps [B, h, w, c]: a sum of 3x3 convolutions at several rates."""

    def __init__(
        self, before: int, classes: int, rates: tuple[int, ...], *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.branches = nnx.List(
            conv(before, classes, 3, padding=rate, dilation=rate, dtype=dtype, rngs=rngs) for rate in rates
        )

    def __call__(
        self, maps: Sequence[Float[Array, "b h w c"]], key: Key[Array, ""] | None = None
    ) -> Float[Array, "b h w classes"]:
        del key  # taken for the common signature of heads; nothing is dropped
        first, *others = (branch(maps[-1]).astype(jnp.float32) for branch in self.branches)
        return sum(others, first)


class DeepLabV2(EncoderDecoder):
    """Image -> class logits at the stride of the last stage, 8 by default.

    `dtype` is what it computes in; parameters are drawn in float32.
    """

    def __init__(self, config: DeepLabV2Config, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.encoder = ResNetEncoder(
            config.encoder, strides=config.strides, dilations=config.dilations, dtype=dtype, rngs=rngs
        )
        self.head = DeepLabV2Head(config.encoder.channels[-1], config.classes, config.rates, dtype=dtype, rngs=rngs)
