"""Segmentation on DINOv2: a linear head on its last map, or DAFormer's head on four."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from fmda.models.daformer import DaFormerHead
from fmda.models.dinov2 import Dinov2, Dinov2Config
from fmda.models.segformer import EncoderDecoder
from fmda.nn.conv import conv
from fmda.nn.drop import drop


@dataclass(frozen=True)
class Dinov2SegmenterConfig:
    """Shape of the network.

    Attributes:
        head: "linear" reads the last map of the encoder alone, "daformer" all of them.
        width, dilations: of DAFormer's head, as in `DaFormerConfig`.
        classes: logits, in the checkpoint's order.
        dropout: probability that a channel before the last layer is dropped in training.
    """

    encoder: Dinov2Config = Dinov2Config()
    head: Literal["linear", "daformer"] = "daformer"
    width: int = 256
    dilations: tuple[int, ...] = (1, 6, 12, 18)
    classes: int = 19
    dropout: float = 0.1


class LinearHead(nnx.Module):
    """Class logits at the size of the last map, float32, from that map. With a key, channels are dropped."""

    def __init__(
        self, before: int, classes: int, dropout: float = 0.1, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.dropout = dropout
        self.classifier = conv(before, classes, 1, dtype=dtype, rngs=rngs)

    def __call__(
        self, maps: Sequence[Float[Array, "b h w c"]], key: Key[Array, ""] | None = None
    ) -> Float[Array, "b h w classes"]:
        return self.classifier(drop(maps[-1], self.dropout, (0, -1), key)).astype(jnp.float32)


class Dinov2Segmenter(EncoderDecoder):
    """Image -> class logits at the stride of a patch. `dtype` is what it computes in; parameters are float32."""

    def __init__(self, config: Dinov2SegmenterConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.encoder = Dinov2(config.encoder, dtype=dtype, rngs=rngs)
        width = config.encoder.width
        self.head = (
            LinearHead(width, config.classes, config.dropout, dtype=dtype, rngs=rngs)
            if config.head == "linear"
            else DaFormerHead(
                [width] * len(config.encoder.maps), config.width, config.dilations, config.classes, config.dropout,
                dtype=dtype, rngs=rngs,
            )
        )  # fmt: skip
