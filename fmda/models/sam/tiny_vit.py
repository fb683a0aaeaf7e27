"""TinyViT (Wu et al. 2022), the image encoder of MobileSAM (Zhang et al. 2023): convolutions and windowed attention."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fmda.models.sam.vit import Neck, joined, windowed
from fmda.nn.activation import gelu
from fmda.nn.attention import attention
from fmda.nn.conv import conv
from fmda.nn.norm import BatchNorm, layer_norm

EXPANSION = 4
"""Hidden channels of a convolution block, and of an MLP, per channel."""


@dataclass(frozen=True)
class TinyVitConfig:
    """Shape of the encoder; the defaults are MobileSAM's, TinyViT-5M.

    Attributes:
        image_size: side of the images, pixels, a multiple of 16; no other size can be encoded.
        widths, depths: of the stages at strides 4, 8, 16 and 16; the first one holds convolutions alone.
        heads, windows: of the last three stages; the side of a window in places.
        channels: of the embedding.
    """

    image_size: int = 1024
    widths: tuple[int, int, int, int] = (64, 128, 160, 320)
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    heads: tuple[int, int, int] = (4, 5, 10)
    windows: tuple[int, int, int] = (7, 14, 7)
    channels: int = 256

    @property
    def side(self) -> int:
        """Side of the embedding, places."""
        return self.image_size // 16


class ConvNorm(nnx.Module):
    """Convolution without bias and batch normalisation. x: [B, h, w, before] -> [B, h/stride, w/stride, after]."""

    def __init__(
        self, before: int, after: int, size: int, *, stride: int = 1, groups: int = 1, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.conv = conv(
            before, after, size, stride=stride, padding=size // 2, groups=groups, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.norm = BatchNorm(after, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w before"]) -> Float[Array, "b h2 w2 after"]:
        return self.norm(self.conv(x))


class Inverted(nnx.Module):
    """Wide 1x1, depth-wise 3x3 and narrow 1x1 convolution with GELU between (Sandler et al. 2018).

    A block adds its input and ends with GELU, a step to the next stage does neither.
    """

    def __init__(
        self, before: int, hidden: int, after: int, *, stride: int = 1, residual: bool, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.residual = residual
        self.expand = ConvNorm(before, hidden, 1, dtype=dtype, rngs=rngs)
        self.mix = ConvNorm(hidden, hidden, 3, stride=stride, groups=hidden, dtype=dtype, rngs=rngs)
        self.reduce = ConvNorm(hidden, after, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w before"]) -> Float[Array, "b h2 w2 after"]:
        y = self.reduce(gelu(self.mix(gelu(self.expand(x)))))
        return gelu(x + y) if self.residual else y


class Attention(nnx.Module):
    """Self-attention in a square window with a learned bias per distance. x: [n, side, side, width] -> the same.

    It begins with its own normalisation, so that what fills up a window is normalised too.
    """

    def __init__(self, width: int, heads: int, side: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.heads, self.side = heads, side
        self.norm = layer_norm(width, dtype=dtype, rngs=rngs)
        self.query, self.key, self.value, self.out = (
            nnx.Linear(width, width, dtype=dtype, rngs=rngs) for _ in range(4)
        )
        self.bias = nnx.Param(jnp.zeros((heads, side * side), jnp.float32))

    def __call__(self, x: Float[Array, "n side side width"]) -> Float[Array, "n side side width"]:
        n, width, places = len(x), x.shape[-1], self.side**2
        x = self.norm(x).reshape(n, places, width)
        query, key, value = (
            layer(x).reshape(n, places, self.heads, width // self.heads) for layer in (self.query, self.key, self.value)
        )
        bias = self.bias[...][:, distances(self.side)]
        return self.out(attention(query, key, value, bias=bias[None]).reshape(x.shape)).reshape(
            n, self.side, self.side, width
        )


def distances(side: int) -> np.ndarray:
    """Returns the index of a bias for each pair of places in a window, [side^2, side^2]: rows apart, columns apart."""
    row, column = np.divmod(np.arange(side * side), side)
    return np.abs(row[:, None] - row[None]) * side + np.abs(column[:, None] - column[None])


class NormMlp(nnx.Module):
    """Normalisation and two linear layers with GELU between. x: [..., width] -> the same."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm = layer_norm(width, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, EXPANSION * width, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(EXPANSION * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*s width"]) -> Float[Array, "*s width"]:
        return self.down(gelu(self.up(self.norm(x))))


class Block(nnx.Module):
    """Residual attention in windows, a depth-wise convolution, residual MLP. x: [B, h, w, width] -> the same."""

    def __init__(self, width: int, heads: int, window: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.window = window
        self.attention = Attention(width, heads, window, dtype=dtype, rngs=rngs)
        self.local = ConvNorm(width, width, 3, groups=width, dtype=dtype, rngs=rngs)
        self.mlp = NormMlp(width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w width"]) -> Float[Array, "b h w width"]:
        h, w = x.shape[1:3]
        x = self.local(x + joined(self.attention(windowed(x, self.window)), h, w))
        return x + self.mlp(x)


class TinyVit(nnx.Module):
    """Image -> embedding at stride 16. `dtype` is what it computes in; parameters are drawn in float32."""

    def __init__(self, config: TinyVitConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config, self.dtype = config, dtype
        first, *widths = config.widths
        self.stem1 = ConvNorm(3, first // 2, 3, stride=2, dtype=dtype, rngs=rngs)
        self.stem2 = ConvNorm(first // 2, first, 3, stride=2, dtype=dtype, rngs=rngs)
        self.convs = nnx.List(
            Inverted(first, EXPANSION * first, first, residual=True, dtype=dtype, rngs=rngs)
            for _ in range(config.depths[0])
        )
        self.steps = nnx.List(
            Inverted(before, after, after, stride=stride, residual=False, dtype=dtype, rngs=rngs)
            for before, after, stride in zip(config.widths, widths, (2, 2, 1), strict=False)
        )
        self.stages = nnx.List(
            nnx.List(Block(width, heads, window, dtype=dtype, rngs=rngs) for _ in range(depth))
            for width, heads, window, depth in zip(widths, config.heads, config.windows, config.depths[1:], strict=True)
        )
        self.neck = Neck(config.widths[-1], config.channels, dtype=dtype, rngs=rngs)

    def __call__(self, pixels: Float[Array, "b S S 3"]) -> Float[Array, "b side side channels"]:
        x = self.stem2(gelu(self.stem1(pixels.astype(self.dtype))))
        for convs in self.convs:
            x = convs(x)
        for step, blocks in zip(self.steps, self.stages, strict=True):
            x = step(x)
            for block in blocks:
                x = block(x)
        return self.neck(x)
