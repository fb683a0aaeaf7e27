"""DAFormer (Hoyer et al. 2022): a Mix Transformer, and a head that fuses its maps by dilated convolutions."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from fmda.models.mit import Mit, MitConfig
from fmda.models.segformer import EncoderDecoder, LinearEmbedding
from fmda.nn.conv import conv
from fmda.nn.drop import drop
from fmda.nn.norm import BatchNorm


@dataclass(frozen=True)
class DaFormerConfig:
    """Shape of the network; the defaults are those of the paper.

    Attributes:
        width: channels of the head.
        dilations: of the fusion's branches; 1 is a 1x1 convolution.
        classes: logits, in the checkpoint's order.
        dropout: probability that a channel before the last layer is dropped in training.
    """

    encoder: MitConfig = MitConfig()
    width: int = 256
    dilations: tuple[int, ...] = (1, 6, 12, 18)
    classes: int = 19
    dropout: float = 0.1


class ConvNormRelu(nnx.Module):
    """Convolution without bias, batch normalisation, ReLU. x: [B, h, w, before] -> [B, h, w, after]."""

    def __init__(
        self, before: int, after: int, size: int, *, dilation: int = 1, groups: int = 1, dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.conv = conv(
            before, after, size, padding=size // 2 * dilation, dilation=dilation, groups=groups, use_bias=False,
            dtype=dtype, rngs=rngs,
        )  # fmt: skip
        self.norm = BatchNorm(after, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w before"]) -> Float[Array, "b h w after"]:
        return jax.nn.relu(self.norm(self.conv(x)))


class Separable(nnx.Module):
    """Dilated depth-wise 3x3 and 1x1 convolution. x: [B, h, w, before] -> [B, h, w, after]."""

    def __init__(self, before: int, after: int, dilation: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.depthwise = ConvNormRelu(before, before, 3, dilation=dilation, groups=before, dtype=dtype, rngs=rngs)
        self.pointwise = ConvNormRelu(before, after, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w before"]) -> Float[Array, "b h w after"]:
        return self.pointwise(self.depthwise(x))


class DaFormerHead(nnx.Module):
    """Class logits at the size of the first map, float32, from maps [B, h, w, c] with `before` channels.

    With a key, as in training, channels are dropped.
    """

    def __init__(
        self, before: Sequence[int], width: int = 256, dilations: Sequence[int] = (1, 6, 12, 18), classes: int = 19,
        dropout: float = 0.1, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.dropout = dropout
        joined = len(before) * width
        self.embed = LinearEmbedding(before, width, dtype=dtype, rngs=rngs)
        self.branches = nnx.List(
            ConvNormRelu(joined, width, 1, dtype=dtype, rngs=rngs) if dilation == 1
            else Separable(joined, width, dilation, dtype=dtype, rngs=rngs)
            for dilation in dilations
        )  # fmt: skip
        self.fuse = ConvNormRelu(len(dilations) * width, width, 3, dtype=dtype, rngs=rngs)
        self.classifier = conv(width, classes, 1, dtype=dtype, rngs=rngs)

    def __call__(
        self, maps: Sequence[Float[Array, "b h w c"]], key: Key[Array, ""] | None = None
    ) -> Float[Array, "b h w classes"]:
        x = jnp.concatenate(self.embed(maps), axis=-1)
        x = self.fuse(jnp.concatenate([branch(x) for branch in self.branches], axis=-1))
        return self.classifier(drop(x, self.dropout, (0, -1), key)).astype(jnp.float32)


class DaFormer(EncoderDecoder):
    """Image -> class logits at stride 4. `dtype` is what it computes in; parameters are drawn in float32."""

    def __init__(self, config: DaFormerConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.encoder = Mit(config.encoder, dtype=dtype, rngs=rngs)
        self.head = DaFormerHead(
            config.encoder.widths,
            config.width,
            config.dilations,
            config.classes,
            config.dropout,
            dtype=dtype,
            rngs=rngs,
        )
