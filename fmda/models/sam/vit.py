"""SAM's vision transformer: attention in windows and, in a few blocks, over the whole map, with relative positions.

Source: Kirillov et al. 2023, appendix A, after Li et al. 2022 (ViTDet); relative positions of Li et al. 2022 (MViTv2).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fmda.models.clip.transformer import Mlp
from fmda.nn.attention import LONG, attention
from fmda.nn.conv import conv
from fmda.nn.norm import layer_norm


@dataclass(frozen=True)
class SamVitConfig:
    """Shape of the encoder; the defaults are ViT-B.

    Attributes:
        image_size: side of the images, pixels; no other size can be encoded.
        window: side of the windows of attention, patches.
        whole: numbers of the blocks, from 0, that attend to the whole map.
        channels: of the embedding.
        norm_eps: of the blocks' normalisation.
    """

    image_size: int = 1024
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    window: int = 14
    whole: tuple[int, ...] = (2, 5, 8, 11)
    channels: int = 256
    norm_eps: float = 1e-6

    @property
    def side(self) -> int:
        """Side of the embedding, places."""
        return self.image_size // self.patch_size


def windowed(x: Float[Array, "b h w c"], size: int) -> Float[Array, "n size size c"]:
    """Returns the map cut into square windows, those of an image row by row; zeros fill up the last ones."""
    b, h, w, c = x.shape
    rows, columns = -(-h // size), -(-w // size)
    x = jnp.pad(x, ((0, 0), (0, rows * size - h), (0, columns * size - w), (0, 0)))
    return x.reshape(b, rows, size, columns, size, c).swapaxes(2, 3).reshape(-1, size, size, c)


def joined(windows: Float[Array, "n size size c"], h: int, w: int) -> Float[Array, "b h w c"]:
    """Returns the map of `windowed`, cut to its height and width."""
    size, c = windows.shape[2:]
    rows, columns = -(-h // size), -(-w // size)
    x = windows.reshape(-1, rows, columns, size, size, c).swapaxes(2, 3)
    return x.reshape(-1, rows * size, columns * size, c)[:, :h, :w]


class Attention(nnx.Module):
    """Self-attention over a square map, with a learned vector per relative row and column. x: [b, side, side, width].

    The logit of a query and a key gains the products of the query with the vectors of their distance in rows and in
    columns. The largest maps are attended to in parts, whose weights are computed again for gradients.
    """

    def __init__(self, width: int, heads: int, side: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.heads, self.dtype = heads, dtype
        self.query, self.key, self.value, self.out = (
            nnx.Linear(width, width, dtype=dtype, rngs=rngs) for _ in range(4)
        )
        distances = (2 * side - 1, width // heads)
        self.rows, self.columns = (nnx.Param(jnp.zeros(distances, jnp.float32)) for _ in range(2))

    def __call__(self, x: Float[Array, "b h w width"]) -> Float[Array, "b h w width"]:
        b, h, w, width = x.shape
        query, key, value = (
            layer(x).reshape(b, h * w, self.heads, width // self.heads) for layer in (self.query, self.key, self.value)
        )
        places = query.reshape(b, h, w, self.heads, -1)
        over_rows = jnp.einsum("bijnd,ikd->bijnk", places, _by_distance(self.rows, h).astype(self.dtype))
        over_columns = jnp.einsum("bijnd,jkd->bijnk", places, _by_distance(self.columns, w).astype(self.dtype))

        def attend(part: tuple[Array, Array, Array]) -> Array:
            query, over_rows, over_columns = part
            t = query.shape[1]
            bias = over_rows[..., :, None] + over_columns[..., None, :]
            return attention(query, key, value, bias=bias.reshape(b, t, self.heads, h * w).swapaxes(1, 2))

        inputs = (query, over_rows.reshape(b, h * w, self.heads, h), over_columns.reshape(b, h * w, self.heads, w))
        count = next(n for n in range(1, h + 1) if h % n == 0 and h // n * w <= max(LONG, w))
        if count == 1:
            return self.out(attend(inputs).reshape(x.shape))
        split = tuple(jnp.moveaxis(one.reshape(b, count, -1, *one.shape[2:]), 1, 0) for one in inputs)
        attended = jax.lax.map(jax.checkpoint(attend), split)
        return self.out(jnp.moveaxis(attended, 0, 1).reshape(x.shape))


def _by_distance(vectors: nnx.Param, side: int) -> Float[Array, "side side d"]:
    """Returns the vector of (query, key) for each pair of rows, or of columns."""
    place = np.arange(side)
    return vectors[...][place[:, None] - place[None] + side - 1]


class Block(nnx.Module):
    """Residual attention and MLP; attention in windows, or over the whole map where `window` is 0."""

    def __init__(self, config: SamVitConfig, window: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width, eps = config.width, config.norm_eps
        self.window = window
        self.norm1 = layer_norm(width, eps=eps, dtype=dtype, rngs=rngs)
        self.attention = Attention(width, config.heads, window or config.side, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(width, eps=eps, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(width, config.mlp_width, config.layers, "gelu", dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w width"]) -> Float[Array, "b h w width"]:
        h, w = x.shape[1:3]
        y = self.norm1(x)
        x = x + (joined(self.attention(windowed(y, self.window)), h, w) if self.window else self.attention(y))
        return x + self.mlp(self.norm2(x))


class Neck(nnx.Module):
    """From the encoder's map to the embedding: two convolutions without bias, each normalised over channels."""

    def __init__(self, width: int, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.project = conv(width, channels, 1, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm1 = layer_norm(channels, eps=1e-6, dtype=dtype, rngs=rngs)
        self.conv = conv(channels, channels, 3, padding=1, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(channels, eps=1e-6, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w width"]) -> Float[Array, "b h w channels"]:
        return self.norm2(self.conv(self.norm1(self.project(x))))


class SamVit(nnx.Module):
    """Image -> embedding at the stride of a patch. `dtype` is what it computes in; parameters are drawn in float32."""

    def __init__(self, config: SamVitConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config, self.dtype = config, dtype
        width, patch, side = config.width, config.patch_size, config.side
        self.patch = conv(3, width, patch, stride=patch, dtype=dtype, rngs=rngs)
        self.position = nnx.Param(jnp.zeros((side, side, width), jnp.float32))
        self.blocks = nnx.List(
            Block(config, 0 if i in config.whole else config.window, dtype=dtype, rngs=rngs)
            for i in range(config.layers)
        )
        self.neck = Neck(width, config.channels, dtype=dtype, rngs=rngs)

    def tokens(self, pixels: Float[Array, "b S S 3"]) -> Float[Array, "b side side width"]:
        """Returns what enters the first block."""
        return self.patch(pixels.astype(self.dtype)) + self.position[...].astype(self.dtype)[None]

    def __call__(self, pixels: Float[Array, "b S S 3"]) -> Float[Array, "b side side channels"]:
        x = self.tokens(pixels)
        for block in self.blocks:
            x = block(x)
        return self.neck(x)
