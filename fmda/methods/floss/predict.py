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
from typing import Literal, NamedTuple

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
        chain = _Chain(host, classes, where.grid)
        return _finish(_refined(chain, patches, jnp.asarray(classifier), rows, columns, refined), height, width)
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
    chain = _Chain(host, classes, where.grid, background)
    return _host(chain, patches, jnp.asarray(classifier), *_padded_matrices(where))


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
    classifiers, chain = jnp.asarray(classifiers), _Chain(host, classes, where.grid, background)
    if fusion == "patch":
        return _fused_patches(chain, patches, classifiers, *_padded_matrices(where))
    sides = (where.rows, where.columns)
    shares = tuple(zero_padded(1 / side.coverage, bucket(side.network)) for side in sides)
    taps = tuple(side.resize_taps.padded(bucket(side.original)) for side in sides)
    inside = tuple(_Static(side.window_taps) for side in sides)
    return _fused(chain, patches, classifiers, where.corners(), shares, taps, inside, fusion == "exact")


class _Chain(NamedTuple):
    """What is fixed when a chain is compiled; see `patch_scores`."""

    host: HostConfig
    classes: tuple[int, ...]
    grid: tuple[int, int]
    background: int | None = None


def _padded_matrices(where: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Returns the matrices of both sides, filled up so that images of similar size share one program."""
    rows, columns = (zero_padded(side.matrix(), bucket(side.original)) for side in (where.rows, where.columns))
    return rows, columns


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


def _decide(chain: _Chain, scores: Float[Array, "R W Q"]) -> tuple[Int[Array, "R W"], Float[Array, "R W"]]:
    """Returns (labels, confidence) from the chain's last map."""
    if chain.host.softmax == "image":
        scores = jax.nn.softmax(chain.host.scale * scores, axis=-1)
    return best_of(merge_queries(scores, chain.classes))


def _linear(p: Float[Array, "hn wn Q"], rows: Float[Array, "R hn"], columns: Float[Array, "W wn"]) -> Array:
    tall = jnp.einsum("rh,hwq->rwq", rows, p, precision="highest")
    return jnp.einsum("xw,rwq->rxq", columns, tall, precision="highest")


def _in_bands(chain: _Chain, p: Float[Array, "hn wn Q"], rows: Array, columns: Array) -> tuple[Array, Array]:
    return in_bands(lambda band: _decide(chain, _linear(p, band, columns)), len(rows), ROWS, rows)


def _host_scores(chain: _Chain, patches: Patches, classifier: Array) -> Float[Array, "hn wn Q"]:
    host = chain.host
    p = patch_scores(host, patches, classifier, softmax=host.softmax == "patch", background=chain.background)
    return side_by_side(p, chain.grid)


@partial(jax.jit, static_argnames="chain")
def _host(chain: _Chain, patches: Patches, classifier: Array, rows: Array, columns: Array) -> tuple[Array, Array]:
    return _in_bands(chain, _host_scores(chain, patches, classifier), rows, columns)


@partial(jax.jit, static_argnames="chain")
def _refined(
    chain: _Chain, patches: Patches, classifier: Array, rows: Array, columns: Array, image: Array
) -> tuple[Array, Array]:
    scores = _linear(_host_scores(chain, patches, classifier), rows, columns)
    return _decide(chain, pamr(scores, image, chain.host.pamr_steps, chain.host.pamr_dilations))


@partial(jax.jit, static_argnames="chain")
def _fused_patches(
    chain: _Chain, patches: Patches, classifiers: Array, rows: Array, columns: Array
) -> tuple[Array, Array]:
    def window(one: Patches) -> Array:
        return fuse_patches(_window_probabilities(chain, one, classifiers))

    return _in_bands(chain, side_by_side(jax.lax.map(window, patches), chain.grid), rows, columns)


@partial(jax.jit, static_argnames=("chain", "inside", "exact"))
def _fused(
    chain: _Chain,
    patches: Patches,
    classifiers: Array,
    corners: Array,
    shares: tuple[Array, Array],
    taps: tuple[Taps, Taps],
    inside: tuple[_Static, _Static],
    exact: bool,
) -> tuple[Array, Array]:
    combine = fuse if exact else fuse_reference
    queries = classifiers.shape[-2]

    def window(total: Array, item: tuple[Patches, Array]) -> tuple[Array, None]:
        one, corner = item
        if exact and chain.background is None and queries >= MANY:
            p = expert_probabilities(one.features, classifiers, chain.host.scale, inside[0].taps, inside[1].taps)
        else:
            p = _window_probabilities(chain, one, classifiers)
        fused = combine(p, inside[0].taps, inside[1].taps)
        start = (corner[0], corner[1], jnp.zeros((), corner.dtype))
        old = jax.lax.dynamic_slice(total, start, fused.shape)
        return jax.lax.dynamic_update_slice(total, old + fused, start), None

    empty = jnp.zeros((len(shares[0]), len(shares[1]), queries), jnp.float32)
    total, _ = jax.lax.scan(window, empty, (patches, corners))
    mean = total * shares[0][:, None, None] * shares[1][None, :, None]

    def band(low: Array, high: Array, fraction: Array) -> tuple[Array, Array]:
        return _decide(chain, interpolate(mean, Taps(low, high, fraction), taps[1]))

    return in_bands(band, len(taps[0].low), ROWS, *taps[0])


def _window_probabilities(chain: _Chain, one: Patches, classifiers: Array) -> Float[Array, "E h w Q"]:
    """Returns the probabilities of one window; expert by expert, so that each one's scores stay in the cache."""
    batch = Patches(*(a[None] for a in one))

    def one_expert(classifier: Array) -> Array:
        return patch_scores(chain.host, batch, classifier, softmax=True, background=chain.background)[0]

    return jax.lax.map(one_expert, classifiers)


def agreement(first: Int[np.ndarray, "H W"], second: Int[np.ndarray, "H W"], classes: int) -> Int[np.ndarray, "K 3"]:
    """Returns per class the pixels (in both, in the first, in the second) label map."""
    both = np.bincount(first[first == second], minlength=classes)
    return np.stack([both, *(np.bincount(m.ravel(), minlength=classes) for m in (first, second))], 1)
