"""A small segmentation network: EfficientNet-Lite0 with ImageNet weights, and SegFormer's head on its four maps."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from fmda.models.efficientnet_lite import EfficientNetLite, EfficientNetLiteConfig
from fmda.models.segformer import EncoderDecoder, SegFormerHead


@dataclass(frozen=True)
class LiteSegmenterConfig:
    """Shape of the network.

    Attributes:
        encoder: without ImageNet's classes.
        width: channels of the head.
        classes: logits, in the checkpoint's order.
        dropout: probability that a channel before the last layer is dropped in training.
    """

    encoder: EfficientNetLiteConfig = EfficientNetLiteConfig(classes=0)
    width: int = 64
    classes: int = 19
    dropout: float = 0.1


class LiteSegmenter(EncoderDecoder):
    """Image -> class logits at stride 4. `dtype` is what it computes in; parameters are drawn in float32."""

    def __init__(self, config: LiteSegmenterConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.encoder = EfficientNetLite(config.encoder, dtype=dtype, rngs=rngs)
        self.head = SegFormerHead(
            config.encoder.channels, config.width, config.classes, config.dropout, dtype=dtype, rngs=rngs
        )
