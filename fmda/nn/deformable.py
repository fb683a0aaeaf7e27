"""Multi-scale deformable attention: each query reads a few bilinear samples of every level.

A sample needs four neighbouring places. They lie side by side in one cell of a packed map, so that one gather reads
them, and one scatter carries their gradients back.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

Size = tuple[int, int]


def deformable_attention(
    value: Float[Array, "b n h d"],
    sizes: Sequence[Size],
    locations: Float[Array, "b q h l p 2"],
    weights: Float[Array, "b q h l p"],
) -> Float[Array, "b q h d"]:
    """Returns for each query and head the weighted sum of bilinear samples of all levels, in `value`'s dtype.

    The samples are not kept for the backward pass, which gathers them again.
    Source: Zhu et al. 2021 (Deformable DETR), eq. 3.

    Args:
        value: the maps of all levels, one after another, each row by row.
        sizes: (height, width) of each level; their products add up to n.
        locations: (x, y) of p samples in each level, from 0 to 1 between its outer edges; zeros lie outside.
        weights: of the samples.
    """
    b, _, heads, d = value.shape
    table, places, factors = (
        jnp.moveaxis(x, 2, 1).reshape(b * heads, -1, *x.shape[3:])
        for x in (value, locations.astype(jnp.float32), weights.astype(jnp.float32))
    )
    total, start = jnp.zeros((), jnp.float32), 0
    for level, (height, width) in enumerate(sizes):
        end = start + height * width
        cells = packed(table[:, start:end].reshape(-1, height, width, d))
        index, corners = bilinear_corners(places[:, :, level], (height, width))
        total = total + gather_sum(cells, index, corners * factors[:, :, level, :, None])
        start = end
    return jnp.moveaxis(total.reshape(b, heads, -1, d), 1, 2).astype(value.dtype)


def packed(maps: Float[Array, "n h w d"]) -> Float[Array, "n cells 4*d"]:
    """Returns (h + 1) (w + 1) cells per map: places (y - 1, x - 1), (y - 1, x), (y, x - 1), (y, x), zeros outside."""
    padded = jnp.pad(maps, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = (padded[:, :-1], padded[:, 1:])
    cells = jnp.concatenate([part for row in rows for part in (row[:, :, :-1], row[:, :, 1:])], axis=-1)
    return cells.reshape(len(maps), -1, cells.shape[-1])


def bilinear_corners(
    places: Float[Array, "n q p 2"], size: Size
) -> tuple[Int[Array, "n q p"], Float[Array, "n q p 4"]]:
    """Returns the packed cell of each place (x, y), and the bilinear weights of its corners, 0 outside the map."""
    height, width = size
    x, y = places[..., 0] * width - 0.5, places[..., 1] * height - 0.5
    left, top = jnp.floor(x), jnp.floor(y)
    right, down = x - left, y - top
    inside = (left >= -1) & (left < width) & (top >= -1) & (top < height)
    corners = jnp.stack([(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right], axis=-1)
    index = jnp.where(inside, (top + 1) * (width + 1) + left + 1, 0).astype(jnp.int32)
    return index, jnp.where(inside[..., None], corners, 0)


@jax.custom_vjp
def gather_sum(
    cells: Float[Array, "n cells 4*d"], index: Int[Array, "n q p"], factors: Float[Array, "n q p 4"]
) -> Float[Array, "n q d"]:
    """Returns the sum over samples and corners of factor times corner, float32."""
    return _each(_sum, cells, index, factors)


def _sum(cells: Float[Array, "cells 4*d"], index: Int[Array, "q p"], factors: Float[Array, "q p 4"]) -> Array:
    return (_gathered(cells, index) * factors[..., None]).sum((1, 2))


def _gathered(cells: Float[Array, "cells 4*d"], index: Int[Array, "q p"]) -> Float[Array, "q p 4 d"]:
    corners = cells.at[index].get(mode="promise_in_bounds")
    return corners.reshape(*index.shape, 4, -1).astype(jnp.float32)


def _each(function: Callable[..., Any], *arrays: Array) -> Any:
    """Returns the function's results for each map; one map after another on a CPU, where its samples fit the cache."""
    return jax.lax.platform_dependent(
        *arrays, cpu=lambda *given: jax.lax.map(lambda one: function(*one), given), default=jax.vmap(function)
    )


def _forward(cells: Array, index: Array, factors: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return gather_sum(cells, index, factors), (cells, index, factors)


def _backward(saved: tuple[Array, Array, Array], gradient: Float[Array, "n q d"]) -> tuple[Array, None, Array]:
    to_cells, to_factors = _each(_transposed, *saved, gradient)
    return to_cells, None, to_factors


def _transposed(
    cells: Float[Array, "cells 4*d"], index: Int[Array, "q p"], factors: Float[Array, "q p 4"],
    gradient: Float[Array, "q d"],
) -> tuple[Array, Array]:  # fmt: skip
    gradient = gradient[:, None, None]
    to_factors = (_gathered(cells, index) * gradient).sum(-1)
    updates = (factors[..., None] * gradient).reshape(*index.shape, -1)
    to_cells = jnp.zeros(cells.shape, jnp.float32).at[index].add(updates, mode="promise_in_bounds")
    return to_cells.astype(cells.dtype), to_factors


gather_sum.defvjp(_forward, _backward)


class DeformableAttention(nnx.Module):
    """Attention of every place of all levels to `points` samples in each level, around the place itself.

    Args:
        width: channels of the tokens, `heads` times the size of a head.
        heads: attention heads.
        levels: number of levels.
        points: samples of a head in a level.
        dtype: what it computes in, apart from locations and weights; parameters are drawn in float32.
        rngs: keys of the initial parameters.
    """

    def __init__(
        self, width: int, heads: int, levels: int, points: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.heads, self.levels, self.points = heads, levels, points
        zeros, xavier = nnx.initializers.zeros_init(), nnx.initializers.xavier_uniform()
        samples = heads * levels * points
        # locations must be exact: a cell of 64 at 0.9 is off by a fifth of a pixel in bfloat16
        self.offsets = nnx.Linear(
            width, 2 * samples, kernel_init=zeros, dtype=jnp.float32, rngs=rngs,
            bias_init=lambda *_: jnp.asarray(_directions(heads, levels, points)),
        )  # fmt: skip
        self.weights = nnx.Linear(width, samples, kernel_init=zeros, dtype=jnp.float32, rngs=rngs)
        self.value = nnx.Linear(width, width, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, kernel_init=xavier, dtype=dtype, rngs=rngs)

    def __call__(
        self, query: Float[Array, "b n width"], tokens: Float[Array, "b n width"], sizes: Sequence[Size]
    ) -> Float[Array, "b n width"]:
        """Returns the attended tokens. `query` gives offsets and weights, `tokens` the values.

        Args:
            query: tokens with their positions; the places of all levels as in `deformable_attention`.
            tokens: the same without positions.
            sizes: (height, width) of each level.
        """
        b, n, width = tokens.shape
        shape = (b, n, self.heads, self.levels, self.points)
        sides = jnp.asarray([(w, h) for h, w in sizes], jnp.float32).reshape(1, 1, 1, -1, 1, 2)
        offsets = self.offsets(query).reshape(*shape, 2) / sides
        locations = jnp.asarray(centres(sizes)).reshape(1, n, 1, 1, 1, 2) + offsets
        weights = jax.nn.softmax(self.weights(query).reshape(b, n, self.heads, -1)).reshape(shape)
        value = self.value(tokens).reshape(b, n, self.heads, -1)
        return self.out(deformable_attention(value, sizes, locations, weights).reshape(b, n, width))


def centres(sizes: Sequence[Size]) -> Float[np.ndarray, "n 2"]:
    """Returns (x, y) of the centre of every place of all levels, from 0 to 1, row by row."""
    levels = []
    for height, width in sizes:
        y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
        levels.append(np.stack([x, y], -1).reshape(-1, 2))
    return np.concatenate(levels).astype(np.float32)


def _directions(heads: int, levels: int, points: int) -> Float[np.ndarray, "offsets"]:
    """Returns the initial offsets: each head looks in its own direction, its samples 1, 2, ... places away."""
    angles = 2 * np.pi * np.arange(heads) / heads
    directions = np.stack([np.cos(angles), np.sin(angles)], -1)
    directions /= np.abs(directions).max(-1, keepdims=True)
    steps = directions[:, None, None] * np.arange(1, points + 1)[None, None, :, None]
    return np.broadcast_to(steps, (heads, levels, points, 2)).reshape(-1).astype(np.float32)
