"""From patch maps to pixels: windows, their average and the resizes, written once for every mode.

Each step is bilinear or an average, so it acts on rows and columns apart: on each side it is one matrix (patches of all
windows -> pixels) or a list of taps (two neighbours and a fraction). Arrays: h, w patches of one window; N windows in
row-major order; H, W pixels; K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fmda.evaluate.protocol import Protocol
from fmda.evaluate.windows import Side, WindowGrid, joined_windows
from fmda.nn.resize import interpolation_matrix

T = TypeVar("T")
Resolution = Literal["original", "network", "patch"]


class Taps(NamedTuple):
    """Linear interpolation along one side: value[i] = x[low[i]] + fraction[i] * (x[high[i]] - x[low[i]])."""

    low: Int[Array | np.ndarray, " n"]
    high: Int[Array | np.ndarray, " n"]
    fraction: Float[Array | np.ndarray, " n"]

    def padded(self, length: int) -> "Taps":
        """Returns the taps with the last one repeated up to `length`."""
        extra = length - len(self.low)
        return Taps(*(np.pad(a, (0, extra), mode="edge") for a in self))


def linear_taps(n_in: int, n_out: int, kept: int | None = None) -> Taps:
    """Returns the taps that stretch n_in samples over n_out, half-pixel centres, clamped at the edges.

    Args:
        kept: number of leading outputs to return (a padded window is cut back to its own length); default all.
    """
    centre = (np.arange(n_out if kept is None else kept) + 0.5) * (n_in / n_out) - 0.5
    floor = np.floor(centre)
    low = np.clip(floor, 0, n_in - 1).astype(np.int32)
    high = np.clip(floor + 1, 0, n_in - 1).astype(np.int32)
    return Taps(low, high, (centre - floor).astype(np.float32))


@dataclass(frozen=True)
class Axis(Side):
    """One side of an image on its way through the chain.

    Attributes:
        patches: patches along one window.
        covered: window pixels the patches stand for; more than `window` where a window is padded to whole patches.
    """

    patches: int
    covered: int

    @property
    def window_taps(self) -> Taps:
        """Patches of one window -> its pixels."""
        return linear_taps(self.patches, self.covered, self.window)

    @property
    def resize_taps(self) -> Taps:
        """Network pixels -> original pixels."""
        return linear_taps(self.network, self.length)

    @property
    def coverage(self) -> Float[np.ndarray, " network"]:
        """Number of windows over each network pixel."""
        pixels = np.arange(self.network)[:, None] - np.asarray(self.starts)
        return ((pixels >= 0) & (pixels < self.window)).sum(1, dtype=np.float32)

    @lru_cache(maxsize=128)  # noqa: B019 -- sides are values, equal ones share their matrices
    def matrix(self, to: Resolution = "original") -> Float[np.ndarray, "n_out n_in"]:
        """Returns the chain of this side as one matrix over the patches of all windows side by side.

        "network" stops before the last resize; "patch" is the identity (patches of overlapping windows stay apart).
        """
        if to == "patch":
            return np.eye(len(self.starts) * self.patches, dtype=np.float32)
        inside = interpolation_matrix(self.patches, self.covered)[: self.window]
        matrix = joined_windows(inside, self.starts, self.network)
        return interpolation_matrix(self.network, self.length) @ matrix if to == "original" else matrix


@dataclass(frozen=True)
class PatchGrid(WindowGrid):
    """Windows and patches of one image; all that a chain depends on."""

    rows: Axis
    columns: Axis

    @property
    def network(self) -> tuple[int, int]:
        """(height, width) of the host's input."""
        return self.rows.network, self.columns.network

    @property
    def original(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return self.rows.length, self.columns.length


def patch_grid(size: tuple[int, int], protocol: Protocol, patch: int, remainder: Literal["pad", "drop"]) -> PatchGrid:
    """Returns the windows and patches of an image of `size` (height, width).

    Args:
        protocol: resize and windows.
        patch: patch side of the image tower, pixels.
        remainder: "pad" fills a window with zeros up to whole patches, "drop" leaves the rest out and stretches the
            score map over the window.
    """

    def axis(side: Side) -> Axis:
        pad = remainder == "pad"
        patches = -(-side.window // patch) if pad else max(side.window // patch, 1)
        covered = patches * patch if pad else side.window
        return Axis(side.length, side.network, side.window, side.starts, patches, covered)

    grid = WindowGrid.of(size, protocol)
    return PatchGrid(axis(grid.rows), axis(grid.columns))


def side_by_side(maps: Float[Array, "N h w *k"], shape: tuple[int, int]) -> Float[Array, "Nh Nw *k"]:
    """Returns the patch maps of row-major windows, `shape` = (down, across), joined into one array."""
    down, across = shape
    h, w = maps.shape[1:3]
    tiles = maps.reshape(down, across, h, w, *maps.shape[3:])
    return jnp.moveaxis(tiles, 2, 1).reshape(down * h, across * w, *maps.shape[3:])


def best_of(x: Float[Array, "*n K"]) -> tuple[Int[Array, "*n"], Float[Array, "*n"]]:
    """Returns (index, value) of the largest value along the last axis, the lowest index on ties.

    Two plain reductions: on CPU, for arrays that fit the cache, four times as fast as `argmax`.
    """
    largest = x.max(-1)
    k = jnp.arange(x.shape[-1], dtype=jnp.int32).reshape((1,) * (x.ndim - 1) + (-1,))
    return jnp.where(x == largest[..., None], k, jnp.int32(x.shape[-1])).min(-1), largest


def merge_queries(x: Float[Array, "*n Q"], classes: tuple[int, ...]) -> Float[Array, "*n K"]:
    """Returns class scores: the largest score among the queries (synonyms) of each class.

    Args:
        classes: class of each query, non-decreasing, every class present.
    """
    if classes == tuple(range(len(classes))):
        return x
    starts = [i for i, c in enumerate(classes) if i == 0 or classes[i - 1] != c]
    ends = [*starts[1:], len(classes)]
    return jnp.stack([x[..., a:b].max(-1) for a, b in zip(starts, ends, strict=True)], axis=-1)


def in_bands(function: Callable[..., T], length: int, rows: int, *arrays: Array | np.ndarray) -> T:
    """Returns `function` applied to bands of `rows` rows of `arrays` and joined, so that only one band is alive.

    `length` (the first axis of each array) must be a multiple of `rows`.
    """
    bands = [a.reshape(length // rows, rows, *a.shape[1:]) for a in arrays]
    out = jax.lax.map(lambda band: function(*band), tuple(bands))
    return jax.tree.map(lambda y: y.reshape(length, *y.shape[2:]), out)


LOWEST = np.finfo(np.float32).min


def lerp(low: Float[Array, "..."], high: Float[Array, "..."], fraction: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns low + fraction * (high - low).

    Every interpolation goes through this form, so that two programs that compute the same value agree to the last bit,
    and equal neighbours give exactly their value. The maximum changes nothing; it stands between product and sum
    because compilers make one instruction with one rounding of the two in some programs and not in others.
    """
    return low + jnp.maximum(fraction * (high - low), LOWEST)


def interpolate(x: Float[Array, "h w K"], rows: Taps, columns: Taps) -> Float[Array, "H W K"]:
    """Returns a map stretched over pixels: rows first, then columns."""
    tall = lerp(x[rows.low], x[rows.high], jnp.asarray(rows.fraction)[:, None, None])
    return lerp(tall[:, columns.low], tall[:, columns.high], jnp.asarray(columns.fraction)[None, :, None])


def stretch(
    p: Float[Array, "... h w Q"], rows: Float[Array, "H h"], columns: Float[Array, "W w"]
) -> Float[Array, "... H W Q"]:
    """Returns a joined patch map brought to pixels by the matrices of both sides."""
    tall = jnp.einsum("rh,...hwq->...rwq", rows, p, precision="highest")
    return jnp.einsum("xw,...rwq->...rxq", columns, tall, precision="highest")


def bucket(n: int, step: int = 64) -> int:
    """Returns n rounded up to a multiple of `step`: a few shapes compile instead of one per image size."""
    return -(-n // step) * step


def zero_padded(x: np.ndarray, length: int) -> np.ndarray:
    """Returns x with zeros added along the first axis up to `length`."""
    return np.pad(x, [(0, length - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
