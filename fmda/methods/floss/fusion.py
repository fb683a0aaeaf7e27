"""Fusion of class experts, pixel by pixel, inside one window (FLOSS, section 3.3).

At each pixel expert e claims it if e is the class that expert e itself finds most likely there (lowest index first on
ties). The claiming expert with the largest p_e[e] gives the pixel its whole probability vector, the lowest index on
exact ties; where nobody claims, the ordinary classifier does.

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

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fmda.methods.floss.chain import Taps, interpolate, lerp

MARGIN = 1e-5
"""Relative gap below which corner values count as equal: about a hundred float32 roundings."""

PAIRS = 32
"""Undecided (expert, cell) pairs computed at a time."""


def winner_of(vectors: Float[Array, "E *n K"]) -> Int[Array, "*n"]:
    """Returns the index of the classifier that gives each pixel its vector: an expert, or K where nobody claims.

    `vectors` holds the K experts' probabilities and the ordinary classifier's last.
    """
    experts = vectors.shape[-1]
    best = jnp.full(vectors.shape[1:-1], -1.0, vectors.dtype)
    winner = jnp.full(vectors.shape[1:-1], experts, jnp.int32)
    for e in range(experts):
        claims = vectors[e].argmax(-1) == e
        better = claims & (vectors[e, ..., e] > best)
        best = jnp.where(better, vectors[e, ..., e], best)
        winner = jnp.where(better, e, winner)
    return winner


def fuse_direct(vectors: Float[Array, "E *n K"]) -> Float[Array, "*n K"]:
    """Returns the fused vectors of pixels whose K+1 vectors are all at hand."""
    index = winner_of(vectors)[None, ..., None]
    return jnp.take_along_axis(vectors, index, axis=0)[0]


def fuse_reference(p: Float[Array, "E h w K"], rows: Taps, columns: Taps) -> Float[Array, "H W K"]:
    """Returns the fused map of a window by upsampling all K+1 maps; one band of pixel rows at a time."""

    def row(low: Array, high: Array, fraction: Array) -> Array:
        line = Taps(low[None], high[None], fraction[None])
        return fuse_direct(jax.vmap(lambda m: interpolate(m, line, columns))(p))[0]

    return jax.lax.map(lambda t: row(*t), tuple(jnp.asarray(a) for a in rows))


def fuse(p: Float[Array, "E h w K"], rows: Taps, columns: Taps, *, prune: bool = True) -> Float[Array, "H W K"]:
    """Returns the fused map of a window, equal to `fuse_reference`, from patch probabilities and a winner per pixel.

    Args:
        prune: decide cells by their corners; without it every expert is computed at every pixel.
    """
    winner = winners(p, rows, columns, prune=prune)
    return fetch(p, winner, rows, columns)


def fuse_patches(p: Float[Array, "E h w K"]) -> Float[Array, "h w K"]:
    """Returns the map fused at patch resolution: cheap, and not the same as fusing pixels."""
    return fuse_direct(p)


def fetch(
    p: Float[Array, "E h w K"], winner: Int[Array, "H W"], rows: Taps, columns: Taps
) -> Float[Array, "H W K"]:
    """Returns each pixel's interpolated vector from its winner's patch map (second pass)."""
    fy, fx = jnp.asarray(rows.fraction)[:, None, None], jnp.asarray(columns.fraction)[None, :, None]
    y0, y1 = jnp.asarray(rows.low)[:, None], jnp.asarray(rows.high)[:, None]
    x0, x1 = jnp.asarray(columns.low)[None, :], jnp.asarray(columns.high)[None, :]
    left = lerp(p[winner, y0, x0], p[winner, y1, x0], fy)
    right = lerp(p[winner, y0, x1], p[winner, y1, x1], fy)
    return lerp(left, right, fx)


def winners(p: Float[Array, "E h w K"], rows: Taps, columns: Taps, *, prune: bool = True) -> Int[Array, "H W"]:
    """Returns the winning classifier of each pixel, K where nobody claims it (first pass)."""
    cells = _Cells(rows, columns, p.shape[1:3])
    experts = p.shape[-1]
    flat = p[:experts].reshape(experts, -1, experts)
    if prune:
        whole, open_ = _decided_by_corners(flat, cells)
    else:
        open_ = jnp.ones((experts, cells.count), bool)
        whole = ~open_
    best = jnp.full((cells.count, cells.pixels), -1.0, p.dtype)
    winner = jnp.full((cells.count, cells.pixels), experts, jnp.int32)
    best, winner = _over_pairs(whole, best, winner, 8 * PAIRS, lambda e, c: cells.own(flat, e, c))
    best, winner = _over_pairs(open_, best, winner, PAIRS, lambda e, c: cells.claim(flat, e, c))
    return winner[cells.cell_of_pixel, cells.place_of_pixel]


def undecided(p: Float[Array, "E h w K"], rows: Taps, columns: Taps) -> Float[Array, ""]:
    """Returns the share of (expert, cell) pairs that the corners leave open."""
    experts = p.shape[-1]
    flat = p[:experts].reshape(experts, -1, experts)
    return _decided_by_corners(flat, _Cells(rows, columns, p.shape[1:3]))[1].mean()


def _decided_by_corners(
    p: Float[Array, "K P K"], cells: "_Cells"
) -> tuple[Bool[Array, "K cells"], Bool[Array, "K cells"]]:
    """Returns (pairs that claim their whole cell, pairs that need their pixels); all other pairs are out."""
    k = jnp.arange(len(p))
    up, down = 1 + MARGIN, 1 - MARGIN
    own = p[k, :, k]
    rival = jnp.where(k[None, None, :] == k[:, None, None], -1.0, p).max(-1)
    best = p.argmax(-1)
    ahead = own > up * rival
    corner = cells.corner_patches  # [4, cells]
    at = [(own[:, c], ahead[:, c], best[:, c]) for c in corner]
    whole = functools.reduce(jnp.logical_and, [a for _, a, _ in at])
    # one of the classes that are best at a corner beats e at all four: no claim
    lost = jnp.zeros_like(whole)
    for _, _, candidate in at:
        beaten = [p[k[:, None], c[None, :], candidate] > up * o for c, (o, _, _) in zip(corner, at, strict=True)]
        lost |= functools.reduce(jnp.logical_and, beaten)
    lowest = functools.reduce(jnp.minimum, [o for o, _, _ in at])
    highest = functools.reduce(jnp.maximum, [o for o, _, _ in at])
    floor = jnp.where(whole, lowest, -1.0).max(0, keepdims=True)
    hopeful = highest >= down * floor
    return whole & hopeful, ~whole & ~lost & hopeful


def _over_pairs(
    mask: Bool[Array, "K cells"],
    best: Float[Array, "cells pixels"],
    winner: Int[Array, "cells pixels"],
    size: int,
    confidence: Callable[[Array, Array], Array],
) -> tuple[Float[Array, "cells pixels"], Int[Array, "cells pixels"]]:
    """Returns (best, winner) after all pairs of `mask` have entered, `size` at a time.

    `confidence(experts, cells)` gives [size, pixels], -1 where there is no claim. The result does not depend on the
    order of the pairs: the larger confidence wins, and the lower expert among equal ones.
    """
    experts, cells = mask.shape
    total = mask.sum(dtype=jnp.int32)
    (pairs,) = jnp.nonzero(mask.ravel(), size=-(-mask.size // size) * size, fill_value=mask.size)

    def some(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        first, best, winner = carry
        chunk = jax.lax.dynamic_slice(pairs, (first,), (size,)).astype(jnp.int32)
        valid = (chunk < mask.size)[:, None]
        e, c = jnp.minimum(chunk // cells, experts - 1), chunk % cells
        value = jnp.where(valid, confidence(e, c), -1.0)
        before = best[c]
        best = best.at[c].max(value)
        after = best[c]
        # a raised pixel forgets its winner; then the lowest of those who hold the new best takes it
        winner = winner.at[c].max(jnp.where(after > before, experts, -1))
        winner = winner.at[c].min(jnp.where((value >= 0) & (value == after), e[:, None], experts))
        return first + size, best, winner

    return jax.lax.while_loop(lambda carry: carry[0] < total, some, (jnp.int32(0), best, winner))[1:]


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


class _Cells:
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

    def own(self, p: Float[Array, "E P K"], e: Int[Array, " S"], c: Int[Array, " S"]) -> Float[Array, "S pixels"]:
        """Returns p_e[e] at the pixels of each (expert, cell) pair."""
        corners = [p[e, jnp.asarray(patch)[c], e] for patch in self.corner_patches]
        return self._spread([v[:, None] for v in corners], c)[:, 0]

    def claim(self, p: Float[Array, "E P K"], e: Int[Array, " S"], c: Int[Array, " S"]) -> Float[Array, "S pixels"]:
        """Returns p_e[e] at the pixels of each pair where expert e claims, else -1."""
        corners = [p[e, jnp.asarray(patch)[c]] for patch in self.corner_patches]
        values = self._spread(corners, c)
        own = self.own(p, e, c)
        k = jnp.arange(p.shape[-1])[None, :, None]
        e = e[:, None, None]
        earlier = jnp.where(k < e, values, -1.0).max(1)
        later = jnp.where(k > e, values, -1.0).max(1)
        return jnp.where((own > earlier) & (own >= later), own, -1.0)

    def _spread(self, corners: list[Float[Array, "S K"]], c: Int[Array, " S"]) -> Float[Array, "S K pixels"]:
        """Returns corner values interpolated over the pixels of their cell, rows first, as `interpolate` does."""
        top_left, bottom_left, top_right, bottom_right = (v[:, :, None] for v in corners)
        fy, fx = jnp.asarray(self.fraction_y)[c][:, None, :], jnp.asarray(self.fraction_x)[c][:, None, None, :]
        left, right = lerp(top_left, bottom_left, fy), lerp(top_right, bottom_right, fy)
        spread = lerp(left[..., None], right[..., None], fx)
        return spread.reshape(*spread.shape[:2], -1)
