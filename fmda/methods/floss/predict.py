"""Label maps of one image: the host alone, and the host with fused experts.

The order of operations differs between hosts and between modes, and matters:

    softmax at the patches (MaskCLIP, CLIP-DINOiser)
        host    cosines -> softmax -> stretch to window -> average windows -> resize -> arg max
        fused   cosines -> softmax -> stretch to window -> fuse -> average windows -> resize -> arg max
    softmax at the image (NACLIP)
        host    cosines -> stretch -> average windows -> resize -> (PAMR) -> softmax -> best synonym -> arg max
        fused   cosines -> softmax -> stretch -> fuse -> average -> resize -> softmax -> best synonym -> arg max

Everything linear in the host's chain is one matrix a side. Full size maps exist one band of rows at a time, so memory
does not grow with classes times pixels.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from fmda.methods.floss.chain import (
    PatchGrid,
    Taps,
    best_of,
    bucket,
    in_bands,
    interpolate,
    linear_taps,
    merge_queries,
    side_by_side,
    stretch,
    zero_padded,
)
from fmda.methods.floss.experts import expert_probabilities
from fmda.methods.floss.features import Patches
from fmda.methods.floss.fusion import fuse, fuse_reference, fuse_vectors
from fmda.methods.floss.hosts import HostConfig
from fmda.methods.floss.pamr import pamr

Fusion = Literal["exact", "reference", "patch"]

ROWS = 16
"""Rows of pixels in a band."""

MANY = 48
"""From so many names on, experts' scores are computed where they are needed; below, all of them cost less."""

Maps = tuple[Int[Array, "H2 W2"], Float[Array, "H2 W2"]]
"""(labels, confidence of the label) on the device, at the original size filled up to one of a few sizes."""


class Chain(NamedTuple):
    """What turns patches into labels, besides classifiers and windows; static when compiled.

    Attributes:
        host: whose order of operations.
        classes: class of each query.
        background: query that takes patches which look like no object and where no class is likely.
    """

    host: HostConfig
    classes: tuple[int, ...]
    background: int | None = None


def patch_scores(
    chain: Chain, patches: Patches, classifier: Float[Array, "*E Q D"], *, softmax: bool
) -> Float[Array, "N h w *E Q"]:
    """Returns probabilities (with `softmax`) or cosines of each patch for one classifier or several."""
    # full precision: at a temperature of 0.01, an error of 1e-3 here is one of 0.1 in the logits
    scores = jnp.tensordot(patches.features, classifier, axes=(-1, -1), precision="highest")
    if not softmax:
        return scores
    p = jax.nn.softmax(chain.host.scale * scores, axis=-1)
    if chain.background is None:
        return p
    foreground = patches.foreground.reshape(*patches.foreground.shape, *(1,) * (p.ndim - 3))
    nothing = ~foreground & (p.max(-1, keepdims=True) < chain.host.background_confidence)
    query = jax.lax.broadcasted_iota(jnp.int32, p.shape, p.ndim - 1)
    return jnp.where(nothing & (query == chain.background), 1.0, p)


def host_maps(
    chain: Chain,
    patches: Patches,
    classifier: Float[Array | np.ndarray, "Q D"],
    grid: PatchGrid,
    image: Float[Array | np.ndarray, "h w 3"] | None = None,
) -> Maps:
    """Returns label and confidence maps by the host alone; refined by PAMR along a normalised network image."""
    if image is None:
        return _stretched(chain, patches, jnp.asarray(classifier), grid.shape, *_padded_matrices(grid))
    image = interpolate(jnp.asarray(image), grid.rows.resize_taps, grid.columns.resize_taps)
    matrices = grid.rows.matrix(), grid.columns.matrix()
    return _stretched(chain, patches, jnp.asarray(classifier), grid.shape, *matrices, image)


def fused_maps(
    chain: Chain,
    patches: Patches,
    classifiers: Float[Array | np.ndarray, "E Q D"],
    grid: PatchGrid,
    fusion: Fusion = "exact",
) -> Maps:
    """Returns label and confidence maps by the fused experts.

    Args:
        classifiers: the experts and, last, the ordinary classifier (`text.expert_classifiers`).
        fusion: "exact" (`fusion.fuse`), "reference" (the same result by the literal rule, slow) or "patch" (fused at
            the patches and then stretched: faster, not the same).
    """
    if fusion == "patch":
        return _stretched(chain, patches, jnp.asarray(classifiers), grid.shape, *_padded_matrices(grid))
    sides = (grid.rows, grid.columns)
    shares = tuple(zero_padded(1 / side.coverage, bucket(side.network)) for side in sides)
    taps = tuple(side.resize_taps.padded(bucket(side.length)) for side in sides)
    inside = tuple((side.patches, side.covered, side.window) for side in sides)
    return _fused(chain, patches, jnp.asarray(classifiers), grid.corners(), shares, taps, inside, fusion == "exact")


def cropped(maps: Maps, grid: PatchGrid) -> tuple[UInt8[np.ndarray, "H W"], Float[np.ndarray, "H W"]]:
    """Returns the maps in host memory, at the original size."""
    (height, width), (labels, confidence) = grid.original, jax.device_get(maps)
    return labels[:height, :width].astype(np.uint8), confidence[:height, :width]


def _padded_matrices(grid: PatchGrid) -> tuple[np.ndarray, ...]:
    """Returns the matrices of both sides, filled up so that images of similar size share one program."""
    return tuple(zero_padded(side.matrix(), bucket(side.length)) for side in (grid.rows, grid.columns))


def _decide(chain: Chain, scores: Float[Array, "R W Q"]) -> tuple[Int[Array, "R W"], Float[Array, "R W"]]:
    """Returns (labels, confidence) from the chain's last map."""
    if chain.host.softmax == "image":
        scores = jax.nn.softmax(chain.host.scale * scores, axis=-1)
    return best_of(merge_queries(scores, chain.classes))


@partial(jax.jit, static_argnames=("chain", "shape"))
def _stretched(
    chain: Chain,
    patches: Patches,
    classifiers: Float[Array, "*E Q D"],
    shape: tuple[int, int],
    rows: Array,
    columns: Array,
    image: Array | None = None,
) -> Maps:
    """Returns maps of patch scores that are stretched last: one classifier's, or several fused at the patches."""
    if classifiers.ndim == 2:
        scores = patch_scores(chain, patches, classifiers, softmax=chain.host.softmax == "patch")
    else:
        scores = jax.lax.map(lambda one: fuse_vectors(_window_probabilities(chain, one, classifiers)), patches)
    joined = side_by_side(scores, shape)
    if image is not None:
        refined = pamr(stretch(joined, rows, columns), image, chain.host.pamr_steps, chain.host.pamr_dilations)
        return _decide(chain, refined)
    return in_bands(lambda band: _decide(chain, stretch(joined, band, columns)), len(rows), ROWS, rows)


@partial(jax.jit, static_argnames=("chain", "inside", "exact"))
def _fused(
    chain: Chain,
    patches: Patches,
    classifiers: Array,
    corners: Array,
    shares: tuple[Array, Array],
    taps: tuple[Taps, Taps],
    inside: tuple[tuple[int, int, int], ...],
    exact: bool,
) -> Maps:
    queries = classifiers.shape[-2]
    rows, columns = (linear_taps(*side) for side in inside)

    def fused(one: Patches) -> Float[Array, "H W Q"]:
        if exact and chain.background is None and queries >= MANY:
            return fuse(*expert_probabilities(one.features, classifiers, chain.host.scale, rows, columns))
        p = _window_probabilities(chain, one, classifiers)
        return fuse(p, rows, columns) if exact else fuse_reference(p, rows, columns)

    def add_window(total: Array, item: tuple[Patches, Array]) -> tuple[Array, None]:
        vectors, start = fused(item[0]), (*item[1], 0)
        old = jax.lax.dynamic_slice(total, start, vectors.shape)
        return jax.lax.dynamic_update_slice(total, old + vectors, start), None

    empty = jnp.zeros((len(shares[0]), len(shares[1]), queries), jnp.float32)
    total, _ = jax.lax.scan(add_window, empty, (patches, corners))
    mean = total * shares[0][:, None, None] * shares[1][None, :, None]

    def band(*rows: Array) -> Maps:
        return _decide(chain, interpolate(mean, Taps(*rows), taps[1]))

    return in_bands(band, len(taps[0].low), ROWS, *taps[0])


def _window_probabilities(chain: Chain, one: Patches, classifiers: Array) -> Float[Array, "E h w Q"]:
    """Returns the probabilities of one window; expert by expert, so that each one's scores stay in the cache."""
    batch = Patches(*(a[None] for a in one))
    return jax.lax.map(lambda classifier: patch_scores(chain, batch, classifier, softmax=True)[0], classifiers)
