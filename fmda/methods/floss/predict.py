"""Label maps of one image: the host alone, and the host with fused experts.

The order of operations differs between hosts and between modes, and matters:

    softmax at the patches (MaskCLIP, CLIP-DINOiser)
        host    cosines -> softmax -> stretch to window -> average windows -> resize -> arg max
        fused   cosines -> softmax -> stretch to window -> fuse -> average windows -> resize -> arg max
    softmax at the image (NACLIP)
        host    cosines -> stretch -> average windows -> resize -> (PAMR) -> softmax -> best synonym -> arg max
        fused   cosines -> softmax -> stretch -> fuse -> average -> resize -> softmax -> best synonym -> arg max

Everything linear in the host's chain is one matrix a side. Maps at the size of the photograph exist one band of rows at
a time, so memory does not grow with classes times pixels.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fmda.methods.floss.chain import (
    Geometry,
    Taps,
    best_of,
    bucket,
    in_bands,
    interpolate,
    merge_queries,
    side_by_side,
    zero_padded,
)
from fmda.methods.floss.experts import expert_probabilities
from fmda.methods.floss.features import Patches
from fmda.methods.floss.fusion import fuse, fuse_patches, fuse_reference
from fmda.methods.floss.hosts import HostConfig
from fmda.methods.floss.pamr import pamr
from fmda.methods.floss.text import cosines

Fusion = Literal["exact", "reference", "patch"]

ROWS = 16
"""Rows of pixels in a band."""

MANY = 48
"""From so many names on, experts' scores are computed where they are needed; below, all of them cost less."""


def patch_scores(
    host: HostConfig,
    patches: Patches,
    classifier: Float[Array, "*E Q D"],
    *,
    softmax: bool,
    background: int | None = None,
) -> Float[Array, "N h w *E Q"]:
    """Returns probabilities (with `softmax`) or cosines of each patch for one classifier or several.

    `background` is the query that takes patches which look like no object and where no class is likely.
    """
    scores = cosines(patches.features, classifier)
    if not softmax:
        return scores
    p = jax.nn.softmax(host.scale * scores, axis=-1)
    if background is None:
        return p
    plain = patches.foreground.reshape(*patches.foreground.shape, *(1,) * (p.ndim - 3))
    nothing = ~plain & (p.max(-1, keepdims=True) < host.background_confidence)
    here = (jnp.arange(p.shape[-1]) == background).reshape(*(1,) * (p.ndim - 1), -1)
    return jnp.where(nothing & here, 1.0, p)


def host_labels(
    host: HostConfig,
    patches: Patches,
    classifier: Float[Array | np.ndarray, "Q D"],
    where: Geometry,
    classes: tuple[int, ...],
    *,
    image: Float[Array | np.ndarray, "h w 3"] | None = None,
    background: int | None = None,
) -> tuple[Int[np.ndarray, "H W"], Float[np.ndarray, "H W"]]:
    """Returns (labels, confidence of the label) at the original size, by the host alone.

    Args:
        image: the normalised network image; read by PAMR.
    """
    height, width = where.original
    if host.pamr_steps:
        rows, columns = where.rows.matrix(), where.columns.matrix()
        if image is None:
            raise ValueError("PAMR follows the image; pass it")
        small, refined = where.network, jnp.asarray(image)
        if small != where.original:
            along = (where.rows.resize_taps, where.columns.resize_taps)
            refined = interpolate(refined, *along)
        return _finish(
            _refined(host, patches, jnp.asarray(classifier), rows, columns, refined, classes, where.grid), height, width
        )
    return _finish(host_maps(host, patches, classifier, where, classes, background=background), height, width)


def host_maps(
    host: HostConfig,
    patches: Patches,
    classifier: Float[Array | np.ndarray, "Q D"],
    where: Geometry,
    classes: tuple[int, ...],
    *,
    background: int | None = None,
) -> tuple[Int[Array, "H2 W2"], Float[Array, "H2 W2"]]:
    """Returns what `host_labels` returns, on the device and filled up to a few sizes; without PAMR."""
    return _host(
        host,
        patches,
        jnp.asarray(classifier),
        zero_padded(where.rows.matrix(), bucket(where.rows.original)),
        zero_padded(where.columns.matrix(), bucket(where.columns.original)),
        classes,
        where.grid,
        background,
    )


def fused_labels(
    host: HostConfig,
    patches: Patches,
    classifiers: Float[Array | np.ndarray, "E Q D"],
    where: Geometry,
    classes: tuple[int, ...],
    *,
    fusion: Fusion = "exact",
    background: int | None = None,
) -> tuple[Int[np.ndarray, "H W"], Float[np.ndarray, "H W"]]:
    """Returns (labels, confidence of the label) at the original size, by the fused experts.

    Args:
        classifiers: the experts and, last, the ordinary classifier (`text.expert_classifiers`).
        fusion: "exact" (`fusion.fuse`), "reference" (the same result by the literal rule, slow) or "patch" (fused at
            the patches and then stretched: faster, not the same).
    """
    return _finish(fused_maps(host, patches, classifiers, where, classes, fusion, background), *where.original)


def fused_maps(
    host: HostConfig,
    patches: Patches,
    classifiers: Float[Array | np.ndarray, "E Q D"],
    where: Geometry,
    classes: tuple[int, ...],
    fusion: Fusion,
    background: int | None = None,
) -> tuple[Int[Array, "H2 W2"], Float[Array, "H2 W2"]]:
    """Returns what `fused_labels` returns, on the device and filled up to a few sizes."""
    classifiers = jnp.asarray(classifiers)
    if fusion == "patch":
        rows, columns = (zero_padded(s.matrix(), bucket(s.original)) for s in (where.rows, where.columns))
        return _fused_patches(host, patches, classifiers, rows, columns, classes, where.grid, background)
    sides = (where.rows, where.columns)
    shares = tuple(zero_padded(1 / side.coverage, bucket(side.network)) for side in sides)
    taps = tuple(side.resize_taps.padded(bucket(side.original)) for side in sides)
    inside = tuple(_Static(side.window_taps) for side in sides)
    return _fused(
        host, patches, classifiers, where.corners(), shares, taps, inside, classes, fusion == "exact", background
    )


class _Static:
    """Taps as a static argument of a compiled function: hashed by value."""

    def __init__(self, taps: Taps) -> None:
        self.taps = taps
        self._key = tuple(np.asarray(a).tobytes() for a in taps)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self._key == other._key


def _finish(out: tuple[Array, Array], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    labels, confidence = jax.device_get(out)
    return labels[:height, :width].astype(np.uint8), confidence[:height, :width]


def _decide(
    host: HostConfig, scores: Float[Array, "R W Q"], classes: tuple[int, ...]
) -> tuple[Int[Array, "R W"], Float[Array, "R W"]]:
    """Returns (labels, confidence) from the chain's last map."""
    if host.softmax == "image":
        scores = jax.nn.softmax(host.scale * scores, axis=-1)
    return best_of(merge_queries(scores, classes))


def _linear(p: Float[Array, "hn wn Q"], rows: Float[Array, "R hn"], columns: Float[Array, "W wn"]) -> Array:
    tall = jnp.einsum("rh,hwq->rwq", rows, p, precision="highest")
    return jnp.einsum("xw,rwq->rxq", columns, tall, precision="highest")


@partial(jax.jit, static_argnames=("host", "classes", "grid", "background"))
def _host(
    host: HostConfig,
    patches: Patches,
    classifier: Array,
    rows: Array,
    columns: Array,
    classes: tuple[int, ...],
    grid: tuple[int, int],
    background: int | None,
) -> tuple[Array, Array]:
    p = patch_scores(host, patches, classifier, softmax=host.softmax == "patch", background=background)
    p = side_by_side(p, grid)
    return in_bands(lambda band: _decide(host, _linear(p, band, columns), classes), len(rows), ROWS, rows)


@partial(jax.jit, static_argnames=("host", "classes", "grid"))
def _refined(
    host: HostConfig,
    patches: Patches,
    classifier: Array,
    rows: Array,
    columns: Array,
    image: Array,
    classes: tuple[int, ...],
    grid: tuple[int, int],
) -> tuple[Array, Array]:
    p = side_by_side(patch_scores(host, patches, classifier, softmax=host.softmax == "patch"), grid)
    scores = pamr(_linear(p, rows, columns), image, host.pamr_steps, host.pamr_dilations)
    return _decide(host, scores, classes)


@partial(jax.jit, static_argnames=("host", "classes", "grid", "background"))
def _fused_patches(
    host: HostConfig,
    patches: Patches,
    classifiers: Array,
    rows: Array,
    columns: Array,
    classes: tuple[int, ...],
    grid: tuple[int, int],
    background: int | None,
) -> tuple[Array, Array]:
    def window(one: Patches) -> Array:
        return fuse_patches(_window_probabilities(host, one, classifiers, background))

    p = side_by_side(jax.lax.map(window, patches), grid)
    return in_bands(lambda band: _decide(host, _linear(p, band, columns), classes), len(rows), ROWS, rows)


@partial(jax.jit, static_argnames=("host", "inside", "classes", "exact", "background"))
def _fused(
    host: HostConfig,
    patches: Patches,
    classifiers: Array,
    corners: Array,
    shares: tuple[Array, Array],
    taps: tuple[Taps, Taps],
    inside: tuple[_Static, _Static],
    classes: tuple[int, ...],
    exact: bool,
    background: int | None,
) -> tuple[Array, Array]:
    combine = fuse if exact else fuse_reference
    queries = classifiers.shape[-2]

    def window(total: Array, item: tuple[Patches, Array]) -> tuple[Array, None]:
        one, corner = item
        if exact and background is None and queries >= MANY:
            p = expert_probabilities(one.features, classifiers, host.scale, inside[0].taps, inside[1].taps)
        else:
            p = _window_probabilities(host, one, classifiers, background)
        fused = combine(p, inside[0].taps, inside[1].taps)
        start = (corner[0], corner[1], jnp.zeros((), corner.dtype))
        old = jax.lax.dynamic_slice(total, start, fused.shape)
        return jax.lax.dynamic_update_slice(total, old + fused, start), None

    empty = jnp.zeros((len(shares[0]), len(shares[1]), queries), jnp.float32)
    total, _ = jax.lax.scan(window, empty, (patches, corners))
    mean = total * shares[0][:, None, None] * shares[1][None, :, None]

    def band(low: Array, high: Array, fraction: Array) -> tuple[Array, Array]:
        return _decide(host, interpolate(mean, Taps(low, high, fraction), taps[1]), classes)

    return in_bands(band, len(taps[0].low), ROWS, *taps[0])


def _window_probabilities(
    host: HostConfig, one: Patches, classifiers: Array, background: int | None
) -> Float[Array, "E h w Q"]:
    """Returns the probabilities of one window; expert by expert, so that each one's scores stay in the cache."""
    batch = Patches(*(a[None] for a in one))
    return jax.lax.map(lambda w: patch_scores(host, batch, w, softmax=True, background=background)[0], classifiers)


def agreement(first: Int[np.ndarray, "H W"], second: Int[np.ndarray, "H W"], classes: int) -> Int[np.ndarray, "K 3"]:
    """Returns per class the pixels (in both, in the first, in the second) label map."""
    both = np.bincount(first[first == second], minlength=classes)
    return np.stack([both, *(np.bincount(m.ravel(), minlength=classes) for m in (first, second))], 1)
