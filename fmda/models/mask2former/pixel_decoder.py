"""Mask2Former's pixel decoder: deformable attention over strides 32, 16 and 8, and mask features at stride 4."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fmda.models.mask2former.config import HeadConfig
from fmda.nn.conv import conv
from fmda.nn.deformable import DeformableAttention, Size
from fmda.nn.norm import group_norm, layer_norm
from fmda.nn.position import sine_positions
from fmda.nn.resize import resize

LEVELS = 3
GROUPS = 32


class ConvNorm(nnx.Module):
    """Convolution that keeps the size, and group normalisation. x: [B, h, w, before] -> [B, h, w, after]."""

    def __init__(
        self, before: int, after: int, size: int, *, use_bias: bool = False, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.conv = conv(before, after, size, padding=size // 2, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.norm = group_norm(after, GROUPS, eps=1e-5, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w before"]) -> Float[Array, "b h w after"]:
        return self.norm(self.conv(x))


class PixelLayer(nnx.Module):
    """Deformable attention and a two-layer network, each added and then normalised. [B, n, width] -> the same."""

    def __init__(self, config: HeadConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width, hidden = config.width, config.pixel_hidden
        self.attention = DeformableAttention(width, config.heads, LEVELS, config.points, dtype=dtype, rngs=rngs)
        self.norm1 = layer_norm(width, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(hidden, width, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n width"], position: Float[Array, "1 n width"], sizes: Sequence[Size]
    ) -> Float[Array, "b n width"]:
        x = self.norm1(x + self.attention(x + position, x, sizes))
        return self.norm2(x + self.down(jax.nn.relu(self.up(x))))


class PixelDecoder(nnx.Module):
    """Maps at strides 4, 8, 16, 32 with `channels` channels -> mask features at stride 4, memories at 32, 16, 8.

    `level` is a learned code per level. Source: Cheng et al. 2022 (Mask2Former), MSDeformAttn pixel decoder.
    """

    def __init__(self, config: HeadConfig, channels: Sequence[int], *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width = config.width
        self.dtype = dtype
        # the last stage first, as in every list of levels here
        self.project = nnx.List(
            ConvNorm(before, width, 1, use_bias=True, dtype=dtype, rngs=rngs) for before in channels[:0:-1]
        )
        self.level = nnx.Param(jax.random.normal(rngs.params(), (LEVELS, width)))
        self.layers = nnx.List(PixelLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.pixel_layers))
        self.lateral = ConvNorm(channels[0], width, 1, dtype=dtype, rngs=rngs)
        self.merge = ConvNorm(width, width, 3, dtype=dtype, rngs=rngs)
        self.mask = conv(width, config.mask_width, 1, dtype=dtype, rngs=rngs)

    def tokens(
        self, maps: Sequence[Float[Array, "b h w c"]]
    ) -> tuple[Float[Array, "b n width"], Float[Array, "1 n width"], list[Size]]:
        """Returns the tokens that enter the first layer, their positions, and (height, width) of each level."""
        projected = [layer(x) for layer, x in zip(self.project, maps[:0:-1], strict=True)]
        sizes = [(x.shape[1], x.shape[2]) for x in projected]
        b, width = len(projected[0]), projected[0].shape[-1]
        positions = [
            jnp.asarray(sine_positions(size, width)).reshape(-1, width) + self.level[...][index][None]
            for index, size in enumerate(sizes)
        ]
        tokens = jnp.concatenate([x.reshape(b, -1, width) for x in projected], axis=1)
        return tokens, jnp.concatenate(positions)[None].astype(self.dtype), sizes

    def __call__(
        self, maps: Sequence[Float[Array, "b h w c"]]
    ) -> tuple[Float[Array, "b h w mask"], list[Float[Array, "b h w width"]]]:
        x, positions, sizes = self.tokens(maps)
        for layer in self.layers:
            x = layer(x, positions, sizes)
        memories, start = [], 0
        for height, width in sizes:
            memories.append(x[:, start : start + height * width].reshape(len(x), height, width, -1))
            start += height * width
        fine = maps[0]
        y = self.lateral(fine) + resize(memories[-1], (fine.shape[1], fine.shape[2]))
        return self.mask(jax.nn.relu(self.merge(y))), memories
