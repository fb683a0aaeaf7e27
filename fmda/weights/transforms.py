"""How one stored array becomes ours and back again: reshapes and axis moves, each with an exact inverse."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Transform:
    """A pair of inverse functions between one stored array and the arrays of one or more of our leaves.

    `forward` raises ValueError where the stored array has the wrong number of axes.
    """

    name: str
    forward: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    inverse: Callable[[tuple[np.ndarray, ...]], np.ndarray]


def _axes(array: np.ndarray, count: int) -> np.ndarray:
    if array.ndim != count:
        raise ValueError(f"{array.ndim} axes where {count} belong")
    return array


def _split(array: np.ndarray, axes: int) -> tuple[np.ndarray, ...]:
    if _axes(array, axes).shape[0] % 3:
        raise ValueError(f"{array.shape[0]} rows do not split into query, key and value")
    return tuple(array.reshape(3, array.shape[0] // 3, *array.shape[1:]))


COPY = Transform("copy", lambda x: (x,), lambda xs: xs[0])
"""The same on both sides."""

LINEAR = Transform("linear", lambda x: (_axes(x, 2).T,), lambda xs: xs[0].T)
"""torch.nn.Linear [out, in] -> kernel [in, out]."""

CONV = Transform("conv", lambda x: (_axes(x, 4).transpose(2, 3, 1, 0),), lambda xs: xs[0].transpose(3, 2, 0, 1))
"""torch.nn.Conv2d [out, in/groups, h, w] -> kernel [h, w, in/groups, out]."""

QKV_WEIGHT = Transform(
    "qkv weight",
    lambda x: tuple(part.T for part in _split(x, 2)),
    lambda xs: np.concatenate([x.T for x in xs]),
)
"""Packed projection [3 * width, width], query first -> three kernels [width, width]."""

QKV_BIAS = Transform("qkv bias", lambda x: _split(x, 1), np.concatenate)
"""Packed bias [3 * width] -> three biases [width]."""

BATCH = Transform("batch", lambda x: (_axes(x, 3)[0],), lambda xs: xs[0][None])
"""[1, n, width] -> [n, width]."""

BATCH_TOKEN = Transform("batch token", lambda x: (_axes(x, 3)[0, 0],), lambda xs: xs[0][None, None])
"""[1, 1, width] -> [width]."""

POINT_CONV = Transform(
    "point conv", lambda x: (_axes(x, 4)[:, :, 0, 0].T,), lambda xs: np.ascontiguousarray(xs[0].T)[:, :, None, None]
)
"""torch.nn.Conv2d of size 1, [out, in, 1, 1] -> linear kernel [in, out]."""

FLAX_POINT_CONV = Transform("flax point conv", lambda x: (_axes(x, 4)[0, 0],), lambda xs: xs[0][None, None])
"""flax.linen.Conv of size 1, [1, 1, in, out] -> linear kernel [in, out]."""
