"""SegFormer (Xie et al. 2021): a Mix Transformer, and a head of linear layers on its four maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from fmda.models.mit import Mit, MitConfig
from fmda.nn.conv import conv
from fmda.nn.drop import drop
from fmda.nn.norm import BatchNorm
from fmda.nn.resize import resize


@dataclass(frozen=True)
class SegFormerConfig:
    """Shape of the network; the defaults are SegFormer-B5 on Cityscapes.

    Attributes:
        width: channels of the head.
        classes: logits, in the checkpoint's order.
        dropout: probability that a channel before the last layer is dropped in training.
    """

    encoder: MitConfig = MitConfig()
    width: int = 768
    classes: int = 19
    dropout: float = 0.1


class LinearEmbedding(nnx.Module):
    """One linear layer per map, all resized to the size of the first. [B, h, w, c] each -> [B, h, w, width] each."""

    def __init__(self, before: Sequence[int], width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.levels = nnx.List(nnx.Linear(channels, width, dtype=dtype, rngs=rngs) for channels in before)

    def __call__(self, maps: Sequence[Float[Array, "b h w c"]]) -> list[Float[Array, "b h w width"]]:
        size = (maps[0].shape[1], maps[0].shape[2])
        return [resize(layer(level), size) for layer, level in zip(self.levels, maps, strict=True)]


class SegFormerHead(nnx.Module):
    """Class logits at the size of the first map, float32, from maps [B, h, w, c] with `before` channels.

    With a key, as in training, channels are dropped. With 256 channels it is also the attention head of HRDA.
    """

    def __init__(
        self, before: Sequence[int], width: int, classes: int, dropout: float = 0.1, *,
        dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.dropout = dropout
        self.embed = LinearEmbedding(before, width, dtype=dtype, rngs=rngs)
        self.fuse = conv(len(before) * width, width, 1, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(width, dtype=dtype, rngs=rngs)
        self.classifier = conv(width, classes, 1, dtype=dtype, rngs=rngs)

    def __call__(
        self, maps: Sequence[Float[Array, "b h w c"]], key: Key[Array, ""] | None = None
    ) -> Float[Array, "b h w classes"]:
        # checkpoints hold the last stage first
        x = jax.nn.relu(self.norm(self.fuse(jnp.concatenate(self.embed(maps)[::-1], axis=-1))))
        return self.classifier(drop(x, self.dropout, (0, -1), key)).astype(jnp.float32)


class EncoderDecoder(nnx.Module):
    """Image -> class logits: an `encoder` with `stages(pixels, key)`, and a `head` on the maps that it returns."""

    encoder: Any
    head: Any

    def __call__(
        self, pixels: Float[Array, "b H W 3"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "b h w classes"]:
        """Returns float32 logits at the head's stride. `pixels` are RGB, ImageNet-normalised; a key as in training.

        Encoder and head get a key of their own. Raises UserError for sides that the encoder does not take.
        """
        first, second = (None, None) if key is None else jax.random.split(key)
        return self.head(self.encoder.stages(pixels, first), second)


class SegFormer(EncoderDecoder):
    """Image -> class logits at stride 4. `dtype` is what it computes in; parameters are drawn in float32."""

    def __init__(self, config: SegFormerConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.encoder = Mit(config.encoder, dtype=dtype, rngs=rngs)
        self.head = SegFormerHead(
            config.encoder.widths, config.width, config.classes, config.dropout, dtype=dtype, rngs=rngs
        )
