"""How one stored array becomes ours and back again: reshapes and axis moves, each with an exact inverse."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Transform:
    """A pair of inverse functions between one stored array and the arrays of one or more of our leaves."""

    name: str
    forward: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    inverse: Callable[[tuple[np.ndarray, ...]], np.ndarray]


def _transposed(name: str, *axes: int) -> Transform:
    return Transform(name, lambda x: (x.transpose(axes),), lambda xs: xs[0].transpose(np.argsort(axes)))


COPY = Transform("copy", lambda x: (x,), lambda xs: xs[0])
"""The same on both sides."""

LINEAR = _transposed("linear", 1, 0)
"""torch.nn.Linear [out, in] -> kernel [in, out]."""

CONV = _transposed("conv", 2, 3, 1, 0)
"""torch.nn.Conv2d [out, in/groups, h, w] -> kernel [h, w, in/groups, out]."""

UP_CONV = _transposed("up conv", 0, 2, 3, 1)
"""torch.nn.ConvTranspose2d [in, out, h, w] -> kernel [in, h, w, out]."""

QKV_WEIGHT = Transform(
    "qkv weight", lambda x: tuple(part.T for part in np.split(x, 3)), lambda xs: np.concatenate([x.T for x in xs])
)
"""Packed projection [3 * width, width], query first -> three kernels [width, width]."""

QKV_BIAS = Transform("qkv bias", lambda x: tuple(np.split(x, 3)), np.concatenate)
"""Packed bias [3 * width] -> three biases [width]."""


def qkv_by_head(heads: int) -> tuple[Transform, Transform]:
    """Returns the transforms of weight and bias of a projection packed as [heads, (query, key, value), head size]."""

    def sorted_(x: np.ndarray) -> np.ndarray:
        return x.reshape(heads, 3, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

    def packed(x: np.ndarray) -> np.ndarray:
        return x.reshape(3, heads, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

    def by_head(of: Transform) -> Transform:
        return Transform(f"{of.name} by head", lambda x: of.forward(sorted_(x)), lambda xs: packed(of.inverse(xs)))

    return by_head(QKV_WEIGHT), by_head(QKV_BIAS)


PAIR_WEIGHT = Transform(
    "pair weight", lambda x: tuple(part.T for part in np.split(x, 2)), lambda xs: np.concatenate([x.T for x in xs])
)
"""Packed projection [2 * out, in] -> two kernels [in, out]."""

PAIR_BIAS = Transform("pair bias", lambda x: tuple(np.split(x, 2)), np.concatenate)
"""Packed bias [2 * out] -> two biases [out]."""

REVERSED_FUSION = Transform(
    "reversed fusion",
    lambda x: (np.concatenate(np.split(x[:, :, 0, 0].T, 4)[::-1])[None, None],),
    lambda xs: np.concatenate(np.split(xs[0][0, 0], 4)[::-1]).T[:, :, None, None],
)
"""1x1 convolution [out, 4 * width, 1, 1] over four maps side by side -> kernel over the maps in reverse order."""

BATCH = Transform("batch", lambda x: (x[0],), lambda xs: xs[0][None])
"""[1, n, width] -> [n, width]."""

BATCH_TOKEN = Transform("batch token", lambda x: (x[0, 0],), lambda xs: xs[0][None, None])
"""[1, 1, width] -> [width]."""

POINT_CONV = Transform("point conv", lambda x: (x[:, :, 0, 0].T,), lambda xs: xs[0].T[:, :, None, None])
"""torch.nn.Conv2d of size 1, [out, in, 1, 1] -> linear kernel [in, out]."""

FLAX_POINT_CONV = Transform("flax point conv", lambda x: (x[0, 0],), lambda xs: xs[0][None, None])
"""flax.linen.Conv of size 1, [1, 1, in, out] -> linear kernel [in, out]."""
