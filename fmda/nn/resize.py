"""Resizing as `torch.nn.functional.interpolate` does it, written as one matrix per axis.

`jax.image.resize` differs in two ways: it antialiases when it shrinks, and its cubic kernel has a = -0.5 against
torch's a = -0.75 (up to 0.06 apart on unit-range position tables).
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

Kind = Literal["bilinear", "bicubic"]


def interpolation_matrix(
    n_in: int, n_out: int, kind: Kind = "bilinear", *, scale: float | None = None, align_corners: bool = False
) -> Float[np.ndarray, "n_out n_in"]:
    """Returns the matrix that resamples `n_in` samples at `n_out` places; each row sums to one.

    Half-pixel centres, edge samples repeated, no antialiasing; the cubic kernel has a = -0.75. `scale` is outputs per
    input (torch's `scale_factor`), by default n_out / n_in; another value shifts the places that are sampled.
    With `align_corners` the first and last samples of both sides coincide, and `scale` is not used.
    Raises ValueError for an unknown kind or an empty side.
    """
    if n_in < 1 or n_out < 1:
        raise ValueError(f"cannot resample {n_in} samples to {n_out}")
    index = np.arange(n_out, dtype=np.float64)
    if align_corners:
        place = index * ((n_in - 1) / (n_out - 1) if n_out > 1 else 0.0)
    else:
        place = (index + 0.5) / (n_out / n_in if scale is None else scale) - 0.5
    base = np.floor(place)
    fraction = place - base
    if kind == "bilinear":
        taps = {0: 1 - fraction, 1: fraction}
    elif kind == "bicubic":
        taps = {offset: _cubic(np.abs(fraction - offset)) for offset in (-1, 0, 1, 2)}
    else:
        raise ValueError(f"kind is 'bilinear' or 'bicubic', not '{kind}'")
    matrix = np.zeros((n_out, n_in))
    for offset, weight in taps.items():
        column = np.clip(base + offset, 0, n_in - 1).astype(np.int64)
        np.add.at(matrix, (np.arange(n_out), column), weight)
    return matrix.astype(np.float32)


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Returns the cubic convolution kernel (Keys 1981, eq. 15) at distances in [0, 2]."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    return np.where(distance <= 1, near, far)


def resize(
    x: Float[Array, "b h w c"], size: tuple[int, int], kind: Kind = "bilinear", *, align_corners: bool = False
) -> Float[Array, "b h2 w2 c"]:
    """Returns x resized to `size` = (h2, w2), in x's dtype; computed in float32 at full matmul precision."""
    if x.shape[1:3] == tuple(size):
        return x
    rows = interpolation_matrix(x.shape[1], size[0], kind, align_corners=align_corners)
    columns = interpolation_matrix(x.shape[2], size[1], kind, align_corners=align_corners)
    return apply_matrices(x, jnp.asarray(rows), jnp.asarray(columns))


def apply_matrices(
    x: Float[Array, "b h w c"], rows: Float[Array, "h2 h"], columns: Float[Array, "w2 w"]
) -> Float[Array, "b h2 w2 c"]:
    """Returns x with `rows` applied to its height and `columns` to its width, in x's dtype.

    Full precision is requested because accelerators would otherwise round the weights to 8 or 10 bits.
    """
    y = x.astype(jnp.float32)
    y = jnp.einsum("Hh,bhwc->bHwc", rows, y, precision=lax.Precision.HIGHEST)
    y = jnp.einsum("Ww,bhwc->bhWc", columns, y, precision=lax.Precision.HIGHEST)
    return y.astype(x.dtype)


def resized_positions(
    table: Float[Array, "n width"], size: tuple[int, int], offset: float = 0.0, *, antialias: bool = False
) -> Float[Array, "1+h*w width"]:
    """Returns a transformer's position table [1 + side^2, width] for another grid, float32; its first row is kept.

    Torch's bicubic interpolation, with or without antialiasing. `offset` is what DINO's code (0.1) adds to the new side
    before dividing it by the old one, which shifts the sampled places a little; it has no effect with `antialias`.
    """
    table = table.astype(jnp.float32)
    side = math.isqrt(len(table) - 1)
    if size == (side, side):
        return table
    patches = table[1:].reshape(1, side, side, -1)
    if antialias:  # torch's kernel then has jax's a = -0.5
        patches = jax.image.resize(patches, (1, *size, patches.shape[-1]), "cubic")
    else:
        rows, columns = (jnp.asarray(interpolation_matrix(side, n, "bicubic", scale=(n + offset) / side)) for n in size)
        patches = apply_matrices(patches, rows, columns)
    return jnp.concatenate([table[:1], patches.reshape(size[0] * size[1], -1)])
