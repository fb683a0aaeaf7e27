"""Fusion of class experts, pixel by pixel, inside one window (FLOSS, section 3.3).

At each pixel expert e claims it if e is the class that expert e itself finds most likely there (lowest index first on
ties). The claiming expert with the largest p_e[e] gives the pixel its whole probability vector, the lowest index on
exact ties; where none claims, the ordinary classifier does.

`fuse_reference` does this literally: all K+1 maps at pixel resolution. `fuse` gives the same vectors without them. It
rests on two facts. Only the winner's vector is needed, so the first pass finds the winners and the second fetches
vectors. And between four neighbouring patches (a *cell*) an interpolated value never leaves the range of its four
corners, so most (expert, cell) pairs are decided by the corners alone: another class beats e at all four (no claim), e
is best at all four (claims the whole cell), or another expert claims the whole cell with more confidence than e
reaches. Comparisons of corners keep a margin above rounding; what is too close to call is computed pixel by pixel.

Layout: P[e, y, x, k] = probability of class k at patch (y, x) by expert e; the ordinary classifier comes last, at
e = K. K classes (queries, where classes have synonyms); h, w patches; H, W pixels.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fmda.methods.floss.chain import Taps, interpolate, lerp

MARGIN = 1e-5
"""Relative gap below which corner values count as equal: about a hundred float32 roundings."""

UP, DOWN = 1 + MARGIN, 1 - MARGIN

OUT, WHOLE, OPEN = range(3)
"""Verdicts on an (expert, cell) pair: no claim; claims the whole cell; to be computed pixel by pixel."""

ELEMENTS = 1 << 20
"""Values computed at a time: what fits the caches of a core."""


def fuse_vectors(vectors: Float[Array, "E *n K"]) -> Float[Array, "*n K"]:
    """Returns the fused vectors of pixels whose K+1 vectors are all at hand."""
    k = jnp.arange(vectors.shape[-1])
    claimed = vectors[:-1].argmax(-1) == k.reshape(-1, *(1,) * (vectors.ndim - 2))
    confidence = jnp.where(claimed, vectors[k, ..., k], -1.0)
    winner = jnp.where(claimed.any(0), confidence.argmax(0), len(k))
    return jnp.take_along_axis(vectors, winner[None, ..., None], axis=0)[0]


def fuse_reference(p: Float[Array, "E h w K"], rows: Taps, columns: Taps) -> Float[Array, "H W K"]:
    """Returns the fused map of a window by upsampling all K+1 maps; one band of pixel rows at a time."""

    def row(low: Array, high: Array, fraction: Array) -> Array:
        line = Taps(low[None], high[None], fraction[None])
        return fuse_vectors(jax.vmap(lambda m: interpolate(m, line, columns))(p))[0]

    return jax.lax.map(lambda t: row(*t), tuple(jnp.asarray(a) for a in rows))


def fuse(
    p: Float[Array, "E h w K"], rows: Taps, columns: Taps, lost: Bool[Array, "K cells"] | None = None
) -> Float[Array, "H W K"]:
    """Returns the fused map of a window, equal to `fuse_reference`.

    Args:
        lost: (expert, cell) pairs known to claim nothing; their probabilities are not read.
    """
    cells = Cells(rows, columns, (p.shape[1], p.shape[2]))
    experts = p.shape[-1]
    flat = p.reshape(len(p), -1, experts)
    verdict = _by_corners(flat, cells, lost)
    state = (
        jnp.full((cells.count, cells.pixels), -1.0, p.dtype),
        jnp.full((cells.count, cells.pixels), experts, jnp.int32),
    )
    for kind, confidence, values in ((WHOLE, cells.confidence, 4), (OPEN, cells.claim, experts)):
        size = max(1, ELEMENTS // (cells.pixels * values))
        state = _over_pairs(verdict == kind, state, size, functools.partial(confidence, flat))
    winner = state[1][cells.cell_of_pixel, cells.place_of_pixel]
    y0, y1, fy = (jnp.asarray(a)[:, None] for a in rows)
    x0, x1, fx = (jnp.asarray(a)[None, :] for a in columns)
    left = lerp(p[winner, y0, x0], p[winner, y1, x0], fy[..., None])
    right = lerp(p[winner, y0, x1], p[winner, y1, x1], fy[..., None])
    return lerp(left, right, fx[..., None])


def undecided(p: Float[Array, "E h w K"], rows: Taps, columns: Taps) -> Float[Array, ""]:
    """Returns the share of (expert, cell) pairs that the corners leave open."""
    return (
        _by_corners(p.reshape(len(p), -1, p.shape[-1]), Cells(rows, columns, (p.shape[1], p.shape[2]))) == OPEN
    ).mean()


def _by_corners(
    p: Float[Array, "E P K"], cells: "Cells", lost: Bool[Array, "K cells"] | None = None
) -> Int[Array, "K cells"]:
    """Returns OUT, WHOLE or OPEN for each (expert, cell) pair.

    Most pairs are out because a class that the ordinary classifier finds best at a corner beats e at all four. Only
    those that remain are compared with all classes.
    """
    experts = p.shape[-1]
    k = jnp.arange(experts)
    confidences = p[k, :, k]
    at = [confidences[:, c] for c in cells.corner_patches]
    if lost is None:
        lost = jnp.zeros((experts, cells.count), bool)
    likely = p[experts].argmax(-1)
    for witness in cells.corner_patches:
        rivals = [p[k[:, None], c[None, :], likely[witness][None, :]] for c in cells.corner_patches]
        lost |= functools.reduce(jnp.logical_and, [r > UP * c for r, c in zip(rivals, at, strict=True)])
    size = max(1, ELEMENTS // (4 * experts))

    def judge(verdict: Array, chunk: Array, valid: Array) -> Array:
        e, c = jnp.minimum(chunk // cells.count, experts - 1), chunk % cells.count
        return verdict.at[chunk].set(_verdict(jnp.stack(cells.gathered(p, e, c), 1), e), mode="drop")

    verdict = _in_chunks(~lost, size, judge, jnp.full(experts * cells.count, OUT, jnp.int32)).reshape(experts, -1)
    lowest, highest = functools.reduce(jnp.minimum, at), functools.reduce(jnp.maximum, at)
    floor = jnp.where(verdict == WHOLE, lowest, -1.0).max(0, keepdims=True)
    return jnp.where(highest >= DOWN * floor, verdict, OUT)


def _verdict(corners: Float[Array, "S 4 K"], e: Int[Array, " S"]) -> Int[Array, " S"]:
    """Returns what the vectors at a cell's corners say about expert e there."""
    confidences = jnp.take_along_axis(corners, e[:, None, None], axis=2)
    lost = (corners > UP * confidences).all(1).any(1)
    rivals = jnp.where(jnp.arange(corners.shape[-1])[None, None] == e[:, None, None], -1.0, corners)
    whole = (confidences[..., 0] > UP * rivals.max(2)).all(1)
    return jnp.where(lost, OUT, jnp.where(whole, WHOLE, OPEN))


def _in_chunks(mask: Bool[Array, "K cells"], size: int, update: Callable[[Any, Array, Array], Any], state: Any) -> Any:
    """Returns the state after `update(state, chunk, valid)` for `size` flat places of the mask at a time.

    Places beyond the last true one are `mask.size` and not valid.
    """
    length = -(-mask.size // size) * size
    (places,) = jnp.nonzero(mask.ravel(), size=length, fill_value=mask.size)
    total = mask.sum(dtype=jnp.int32)

    def compute(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        first, state = carry
        chunk = jax.lax.dynamic_slice(places.astype(jnp.int32), (first,), (size,))
        return first + size, update(state, chunk, first + jnp.arange(size) < total)

    return jax.lax.while_loop(lambda carry: carry[0] < total, compute, (jnp.int32(0), state))[1]


def _over_pairs(
    mask: Bool[Array, "K cells"],
    state: tuple[Float[Array, "cells pixels"], Int[Array, "cells pixels"]],
    size: int,
    confidence: Callable[[Array, Array], Array],
) -> tuple[Float[Array, "cells pixels"], Int[Array, "cells pixels"]]:
    """Returns (best, winner) after the pairs of the mask have entered, `size` at a time.

    `confidence(experts, cells)` gives [size, pixels], -1 where there is no claim. The result does not depend on the
    order of the pairs: the larger confidence wins, and the lower expert among equal ones.
    """
    cells = mask.shape[1]

    def enter(state: tuple[Array, Array], chunk: Array, valid: Array) -> tuple[Array, Array]:
        best, winner = state
        e, c = jnp.where(valid, chunk // cells, 0), chunk % cells
        value = jnp.where(valid[:, None], confidence(e, c), -1.0)
        before = best[c]
        best = best.at[c].max(value)
        after = best[c]
        # a raised pixel forgets its winner; then the lowest expert with the new best takes it
        no_winner = jnp.iinfo(jnp.int32).max
        winner = winner.at[c].max(jnp.where(after > before, no_winner, -1))
        winner = winner.at[c].min(jnp.where((value >= 0) & (value == after), e[:, None], no_winner))
        return best, winner

    return _in_chunks(mask, size, enter, state)


class _Side:
    """Cells along one side: runs of pixels with the same two neighbours, each laid out with equal length."""

    def __init__(self, taps: Taps) -> None:
        pairs = np.stack([np.asarray(taps.low), np.asarray(taps.high)], 1)
        new = np.concatenate([[True], (pairs[1:] != pairs[:-1]).any(1)])
        self.cell = np.cumsum(new) - 1
        starts = np.flatnonzero(new)
        self.place = np.arange(len(pairs)) - starts[self.cell]
        self.count = len(starts)
        self.pixels = int(self.place.max()) + 1
        self.low, self.high = pairs[starts, 0], pairs[starts, 1]
        self.fraction = np.zeros((self.count, self.pixels), np.float32)
        self.fraction[self.cell, self.place] = taps.fraction


class Cells:
    """The cells of a window: pixels grouped by the four patches they are interpolated from. All static."""

    def __init__(self, rows: Taps, columns: Taps, grid: tuple[int, int]) -> None:
        down, across = _Side(rows), _Side(columns)
        self.count = down.count * across.count
        self.pixels = down.pixels * across.pixels
        self.cell_of_pixel = down.cell[:, None] * across.count + across.cell[None, :]
        self.place_of_pixel = down.place[:, None] * across.pixels + across.place[None, :]
        y, x = np.divmod(np.arange(self.count), across.count)
        ends = [(a[y], b[x]) for b in (across.low, across.high) for a in (down.low, down.high)]
        self.corner_patches = np.stack([i * grid[1] + j for i, j in ends])  # [4, cells]: top, bottom left; then right
        self.fraction_y, self.fraction_x = down.fraction[y], across.fraction[x]

    def gathered(self, p: Float[Array, "E P K"], e: Int[Array, " S"], c: Int[Array, " S"]) -> list[Array]:
        """Returns expert e's vectors [S, K] at the four corners of cell c."""
        return [p[e, jnp.asarray(patch)[c]] for patch in self.corner_patches]

    def confidence(
        self, p: Float[Array, "E P K"], e: Int[Array, " S"], c: Int[Array, " S"]
    ) -> Float[Array, "S pixels"]:
        """Returns p_e[e] at the pixels of each (expert, cell) pair."""
        corners = [p[e, jnp.asarray(patch)[c], e] for patch in self.corner_patches]
        return self._spread([v[:, None] for v in corners], c)[:, 0]

    def claim(self, p: Float[Array, "E P K"], e: Int[Array, " S"], c: Int[Array, " S"]) -> Float[Array, "S pixels"]:
        """Returns p_e[e] at the pixels of each pair where expert e claims, else -1."""
        values, confidences = self._spread(self.gathered(p, e, c), c), self.confidence(p, e, c)
        k, e = jnp.arange(p.shape[-1])[None, :, None], e[:, None, None]
        earlier = jnp.where(k < e, values, -1.0).max(1)
        later = jnp.where(k > e, values, -1.0).max(1)
        return jnp.where((confidences > earlier) & (confidences >= later), confidences, -1.0)

    def _spread(self, corners: list[Float[Array, "S K"]], c: Int[Array, " S"]) -> Float[Array, "S K pixels"]:
        """Returns corner values interpolated over the pixels of their cell, rows first, as `interpolate` does."""
        top_left, bottom_left, top_right, bottom_right = (v[:, :, None] for v in corners)
        fy, fx = jnp.asarray(self.fraction_y)[c][:, None, :], jnp.asarray(self.fraction_x)[c][:, None, None, :]
        left, right = lerp(top_left, bottom_left, fy), lerp(top_right, bottom_right, fy)
        spread = lerp(left[..., None], right[..., None], fx)
        return spread.reshape(*spread.shape[:2], -1)
