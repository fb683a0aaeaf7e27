"""Label maps from windows of an image: forward, resize, average and arg max in one traceable function.

Window scores are stretched to the window, averaged where windows overlap, and resized to the size of the labels. All of
this is linear and acts on rows and columns apart, so each side of an image has one sparse matrix (`Resampling`). Full
size scores exist one block of rows and columns at a time. Resizes are bilinear with half-pixel centres and without
antialiasing (`fmda.nn.resize`). b = images, N = windows, K = classes, h and w = sides of a window's scores.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from fmda.data.transforms import fit_size, resize_image, resize_image_pillow
from fmda.errors import UserError
from fmda.evaluate.protocol import Protocol
from fmda.nn.resize import interpolation_matrix

DenseForward = Callable[[Any, Float[Array, "N H W 3"]], Float[Array, "N h w K"]]
"""(params, RGB in 0..255) -> scores, at any resolution; logits or probabilities, as they are to be averaged."""

WINDOWS = 8
"""Windows in one call of the network."""

SIDE = 64
"""Image and label sides are padded to multiples of this, so that images of similar size share one program."""

ROWS, COLUMNS = 32, 64
"""Rows and columns of the label map that are resampled together on a CPU; accelerators take all rows."""


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Returns the first pixel of each window along one side, in pixels.

    The number is max(length - crop + stride - 1, 0) // stride + 1. The last window is pulled back so that it ends at
    the image's edge; a side shorter than the crop has the one window 0.
    """
    if length < 1 or crop < 1 or stride < 1:
        raise UserError(f"window: length {length}, crop {crop} and stride {stride} must all be at least 1")
    count = max(length - crop + stride - 1, 0) // stride + 1
    return [max(min(i * stride + crop, length) - crop, 0) for i in range(count)]


def joined_windows(
    inside: Float[np.ndarray, "window samples"], starts: Sequence[int], length: int
) -> Float[np.ndarray, "length windows*samples"]:
    """Returns the matrix from the samples of all windows to pixels: `inside` for each, averaged where they overlap."""
    window, samples = inside.shape
    matrix = np.zeros((length, len(starts) * samples), np.float32)
    coverage = np.zeros((length, 1), np.float32)
    for i, start in enumerate(starts):
        matrix[start : start + window, i * samples : (i + 1) * samples] += inside
        coverage[start : start + window] += 1
    return matrix / np.maximum(coverage, 1)


class Resampling(NamedTuple):
    """A sparse matrix in blocks of output rows: block i of the product is weights[i] @ x[sources[i]]."""

    sources: Int[Array | np.ndarray, "*b blocks m"]
    weights: Float[Array | np.ndarray, "*b blocks rows m"]


class Geometry(NamedTuple):
    """Placement of the windows of an image: first (row, column) of each, row by row, and the matrix of each side.

    A batch has a leading axis of images.
    """

    corners: Int[Array | np.ndarray, "*b N 2"]
    rows: Resampling
    columns: Resampling


@dataclass(frozen=True)
class Side:
    """One side of an image, in pixels.

    Attributes:
        length: of the label map.
        network: of the image that is cut into windows.
        window: of a window.
        starts: first pixel of each window.
    """

    length: int
    network: int
    window: int
    starts: tuple[int, ...]

    @lru_cache(maxsize=1024)  # noqa: B019 -- sides are values, equal ones share their matrices
    def resampling(self, samples: int, rows: int) -> Resampling:
        """Returns the matrix from the samples of all windows, one after another, to pixels of the label map.

        Args:
            samples: number of score samples along a window.
            rows: outputs in a block. Outputs beyond `length`, up to a multiple of `SIDE`, are zero.
        """
        matrix = joined_windows(interpolation_matrix(samples, self.window), self.starts, self.network)
        if self.length != self.network:
            matrix = interpolation_matrix(self.network, self.length) @ matrix
        matrix = np.pad(matrix, ((0, padded(self.length) - self.length), (0, 0)))
        blocks = matrix.reshape(-1, rows, matrix.shape[1])
        occupied = [np.flatnonzero(block.any(0)) for block in blocks]
        # rounded up, so that sides of similar length share one program
        step = max(8, rows // 4)
        width = -(-max(len(columns) for columns in occupied) // step) * step
        sources = np.zeros((len(blocks), width), np.int32)
        weights = np.zeros((len(blocks), rows, width), np.float32)
        for i, columns in enumerate(occupied):
            sources[i, : len(columns)] = columns
            weights[i, :, : len(columns)] = blocks[i][:, columns]
        return Resampling(sources, weights)

    def at(self, samples: int, pixels: Int[np.ndarray, " P"]) -> Resampling:
        """Returns the same matrix for chosen pixels of the label map, each a block of its own."""
        sources, weights = self.resampling(samples, 1)
        return Resampling(sources[pixels], weights[pixels])


@dataclass(frozen=True)
class WindowGrid:
    """Both sides of an image that is cut into windows, and who resizes it (see `Protocol`)."""

    rows: Side
    columns: Side
    resample: str = "opencv"

    @classmethod
    def of(cls, size: tuple[int, int], protocol: Protocol) -> "WindowGrid":
        """Returns the windows of an image of `size` (height, width)."""
        network = network_size(size, protocol)

        def side(length: int, network: int) -> Side:
            window = min(protocol.crop, network) or network
            return Side(length, network, window, tuple(window_starts(network, window, protocol.stride or window)))

        return cls(side(size[0], network[0]), side(size[1], network[1]), protocol.resample)

    @property
    def window(self) -> tuple[int, int]:
        """(height, width) of a window."""
        return self.rows.window, self.columns.window

    @property
    def shape(self) -> tuple[int, int]:
        """Windows down and across."""
        return len(self.rows.starts), len(self.columns.starts)

    def corners(self) -> Int[np.ndarray, "N 2"]:
        """Returns the first (row, column) of each window, row by row."""
        return np.asarray([(y, x) for y in self.rows.starts for x in self.columns.starts], np.int32)

    def geometry(self, samples: tuple[int, int]) -> Geometry:
        """Returns the placement of windows whose scores have `samples` (rows, columns)."""
        # scores of a block fit a CPU's cache, or fill an accelerator
        block = ROWS if jax.default_backend() == "cpu" else padded(self.rows.length)
        rows, columns = self.rows.resampling(samples[0], block), self.columns.resampling(samples[1], COLUMNS)
        return Geometry(self.corners(), rows, columns)

    def geometry_at(self, samples: tuple[int, int], pixels: Int[np.ndarray, "P 2"]) -> Geometry:
        """Returns the placement for chosen (row, column) of the label map; see `pixel_scores`."""
        rows, columns = self.rows.at(samples[0], pixels[:, 0]), self.columns.at(samples[1], pixels[:, 1])
        return Geometry(self.corners(), rows, columns)

    def prepare(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H2 W2 3"]:
        """Returns the image at network size, padded with zeros to multiples of `SIDE`."""
        resize = resize_image_pillow if self.resample == "pillow" else resize_image
        return pad(resize(image, (self.rows.network, self.columns.network)), 0)


def network_size(size: tuple[int, int], protocol: Protocol) -> tuple[int, int]:
    """Returns (height, width), to which an image of `size` is resized before it is cut into windows."""
    size = protocol.size or size
    sides = size if protocol.resize is None else fit_size(*size, *protocol.resize)
    height, width = (math.floor(side * protocol.scale / protocol.multiple + 0.5) for side in sides)
    return max(height, 1) * protocol.multiple, max(width, 1) * protocol.multiple


def padded(length: int) -> int:
    """Returns the length rounded up to a multiple of `SIDE`."""
    return -(-length // SIDE) * SIDE


def pad(array: UInt8[np.ndarray, "H W *c"], value: int) -> UInt8[np.ndarray, "H2 W2 *c"]:
    """Returns the array padded at the bottom and right to multiples of `SIDE`."""
    below, right = (padded(length) - length for length in array.shape[:2])
    if below == right == 0:
        return array
    return np.pad(array, ((0, below), (0, right), *((0, 0),) * (array.ndim - 2)), constant_values=value)


def score_samples(forward: DenseForward, params: Any, window: tuple[int, int]) -> tuple[int, int]:
    """Returns (rows, columns) of the scores of `forward` for a window of this size."""
    shape = jax.eval_shape(forward, params, jax.ShapeDtypeStruct((1, *window, 3), jnp.float32)).shape
    if len(shape) != 4 or shape[-1] > 255:
        raise UserError(f"forward: returns {shape} for one window; return scores [N, h, w, K], K at most 255")
    return shape[1], shape[2]


def label_maps(
    forward: DenseForward,
    params: Any,
    images: UInt8[Array, "b H W 3"],
    place: Geometry,
    window: tuple[int, int],
    shape: tuple[int, int],
    flip: bool,
) -> tuple[UInt8[Array, "b H2 W2"], Float[Array, "b H2 W2"]]:
    """Returns (labels, averaged score of the label) of prepared images; to be traced.

    The lowest class wins ties. Values beyond the size of the label map are undefined.

    Args:
        images: by `WindowGrid.prepare`; their grids have equal `window` and `shape`.
        place: by `WindowGrid.geometry`, with a leading axis of images.
        window, shape: of the grids; static.
        flip: see `Protocol`.
    """

    scores = _window_scores(forward, params, images, jnp.asarray(place.corners), window, flip)
    return lax.map(lambda each: _arg_max(_tiles(each[0], shape), *each[1:]), (scores, place.rows, place.columns))


def pixel_scores(
    forward: DenseForward,
    params: Any,
    images: UInt8[Array, "b H W 3"],
    place: Geometry,
    window: tuple[int, int],
    shape: tuple[int, int],
    flip: bool,
) -> Float[Array, "b P K"]:
    """Returns the averaged scores of chosen pixels of prepared images; to be traced.

    Arguments as of `label_maps`, but `place` by `WindowGrid.geometry_at`.
    """

    def at(scores: Array, rows: Resampling, columns: Resampling) -> Float[Array, " K"]:
        samples = scores[columns.sources[:, None], rows.sources[None]]
        return jnp.einsum("mrk,m,r->k", samples, columns.weights[0], rows.weights[0], precision="highest")

    scores = _window_scores(forward, params, images, jnp.asarray(place.corners), window, flip)
    each = jax.vmap(at, in_axes=(None, 0, 0))
    return lax.map(lambda one: each(_tiles(one[0], shape), *one[1:]), (scores, place.rows, place.columns))


def _window_scores(
    forward: DenseForward, params: Any, images: Array, corners: Array, window: tuple[int, int], flip: bool
) -> Float[Array, "b N h w K"]:
    b, n, _ = corners.shape
    count = b * n
    index = jnp.repeat(jnp.arange(b, dtype=jnp.int32), n)[:, None]
    places = jnp.concatenate([index, corners.reshape(count, 2)], axis=1)

    def group_scores(places: Int[Array, "n 3"]) -> Float[Array, "n h w K"]:
        cut = [lax.dynamic_slice(images, (*place, 0), (1, *window, 3)) for place in places]
        pixels = jnp.concatenate(cut).astype(jnp.float32)
        scores = forward(params, pixels).astype(jnp.float32)
        if flip:
            scores = (scores + forward(params, pixels[:, :, ::-1])[:, :, ::-1].astype(jnp.float32)) / 2
        return scores

    if count <= WINDOWS:
        scores = group_scores(places)
    else:
        groups = -(-count // WINDOWS)
        size = -(-count // groups)  # as few surplus windows as possible
        places = jnp.pad(places, ((0, groups * size - count), (0, 0)))
        scores = lax.map(group_scores, places.reshape(groups, size, 3))
        scores = scores.reshape(groups * size, *scores.shape[2:])[:count]
    return scores.reshape(b, n, *scores.shape[1:])


def _tiles(scores: Float[Array, "N h w K"], shape: tuple[int, int]) -> Float[Array, "C R K"]:
    """Returns the score maps of all windows side by side, columns first."""
    (down, across), (_, h, w, k) = shape, scores.shape
    return scores.reshape(down, across, h, w, k).transpose(1, 3, 0, 2, 4).reshape(across * w, down * h, k)


def _arg_max(
    scores: Float[Array, "C R K"], rows: Resampling, columns: Resampling
) -> tuple[UInt8[Array, "H W"], Float[Array, "H W"]]:
    """Returns (class, value) of the largest score after resampling, one block of columns and rows at a time."""

    def column_block(columns: Resampling) -> tuple[Array, Array]:
        # axes in the order in which both products read and write contiguous memory
        stretched = jnp.einsum("mrk,nm->rkn", scores[columns.sources], columns.weights, precision="highest")

        def row_block(rows: Resampling) -> tuple[Array, Array]:
            block = jnp.einsum("mkn,rm->rkn", stretched[rows.sources], rows.weights, precision="highest")
            # XLA vectorises this unrolled loop, but not lax.argmax
            best, label = block[:, 0], jnp.zeros(block[:, 0].shape, jnp.uint8)
            for k in range(1, block.shape[1]):
                larger = block[:, k] > best
                best, label = jnp.where(larger, block[:, k], best), jnp.where(larger, jnp.uint8(k), label)
            return label, best

        return jax.tree.map(lambda blocks: blocks.reshape(-1, blocks.shape[-1]), lax.map(row_block, rows))

    blocks = lax.map(column_block, columns)
    return jax.tree.map(lambda x: x.transpose(1, 0, 2).reshape(x.shape[1], -1), blocks)


_predict = partial(jax.jit, static_argnames=("forward", "window", "shape", "flip"))(label_maps)


class Predictor:
    """The `forward` of a `Segmenter` around a dense network."""

    def __init__(self, forward: DenseForward, params: Any, protocol: Protocol) -> None:
        self.forward, self.params, self.protocol = forward, params, protocol
        self._samples = cache(partial(score_samples, forward, params))

    def __call__(self, image: UInt8[np.ndarray, "H W 3"]) -> tuple[UInt8[np.ndarray, "H W"], Float[np.ndarray, "H W"]]:
        """Returns (labels, averaged score of the label) at the size of the image."""
        grid = WindowGrid.of(image.shape[:2], self.protocol)
        place = grid.geometry(self._samples(grid.window))
        images, place = jax.tree.map(lambda array: array[None], (grid.prepare(image), place))
        out = _predict(self.forward, self.params, images, place, grid.window, grid.shape, self.protocol.flip)
        labels, scores = jax.device_get(out)
        height, width = image.shape[:2]
        return labels[0, :height, :width], scores[0, :height, :width]
