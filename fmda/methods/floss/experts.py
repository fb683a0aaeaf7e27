"""Patch probabilities of all experts, computed only where an expert may claim a pixel.

K experts of K classes are K^2 scores a patch: for 171 classes a sixth of the image tower's work. Most are never read,
because fusion reads an expert only where its own class may win. The softmax is monotone, so raw scores decide: if some
class (a *witness*) beats e by a margin at all four corners of a cell, expert e claims nothing there, and its other
scores at a patch are needed only where a cell beside that patch stays open. Witnesses are the classes that the
ordinary classifier predicts most often.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fmda.methods.floss.chain import Taps
from fmda.methods.floss.fusion import Cells

WITNESSES = 16
"""Classes tried as witnesses; the most frequent ones of a window find nearly all that can be found."""

MARGIN = 1e-3
"""Lead of a witness, in logits; far above what rounding does to them."""

BLOCK = 64
"""Patches computed at a time for one expert."""


def expert_probabilities(
    features: Float[Array, "h w D"],
    classifiers: Float[Array, "E K D"],
    scale: float,
    rows: Taps,
    columns: Taps,
) -> Float[Array, "E h w K"]:
    """Returns softmax(scale * cosine) of each expert at the patches fusion may read; the ordinary classifier's in full.

    Elsewhere expert e's own class has -1 and all others 0: it claims nothing there. `fusion.fuse` gives the same map as
    with all probabilities.

    Args:
        features: unit length, of one window.
        classifiers: K experts and, last, the ordinary classifier.
        rows, columns: how patches become pixels.
    """
    h, w, _ = features.shape
    flat = features.reshape(h * w, -1)
    ordinary = jax.nn.softmax(scale * _cosines(flat, classifiers[-1]), axis=-1)
    needed = needed_patches(flat, classifiers, scale, ordinary.argmax(-1), Cells(rows, columns, (h, w)))
    k = jnp.arange(classifiers.shape[1])

    def expert(item: tuple[Array, Array, Array]) -> Array:
        index, classifier, here = item
        (places,) = jnp.nonzero(here, size=-(-len(here) // BLOCK) * BLOCK, fill_value=len(here))
        total = here.sum()

        def compute_block(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            first, p = carry
            chunk = jax.lax.dynamic_slice(places, (first,), (BLOCK,))
            scores = _cosines(flat[jnp.minimum(chunk, h * w - 1)], classifier)
            return first + BLOCK, p.at[chunk].set(jax.nn.softmax(scale * scores, axis=-1), mode="drop")

        silent = jnp.broadcast_to(jnp.where(k == index, -1.0, 0.0)[None], (h * w, len(k)))
        return jax.lax.while_loop(lambda carry: carry[0] < total, compute_block, (jnp.int32(0), silent))[1]

    p = jax.lax.map(expert, (k, classifiers[:-1], needed))
    return jnp.concatenate([p, ordinary[None]]).reshape(len(classifiers), h, w, -1)


def needed_patches(
    features: Float[Array, "P D"],
    classifiers: Float[Array, "E K D"],
    scale: float,
    likely: Float[Array, " P"],
    cells: Cells,
) -> Bool[Array, "K P"]:
    """Returns where each expert's scores may be read: at the corners of cells without a witness against it."""
    experts = classifiers.shape[1]
    k = jnp.arange(experts)
    own_scores = scale * jnp.einsum("kd,pd->kp", classifiers[k, k], features, precision="highest")
    counts = jnp.zeros(experts, jnp.int32).at[likely].add(1)
    frequent, witnesses = jax.lax.top_k(counts, min(WITNESSES, experts))

    def against(number: Array, lost: Array) -> Array:
        scores = scale * _cosines(classifiers[:-1, witnesses[number]], features)
        beaten = scores > own_scores + MARGIN
        corners = [beaten[:, patch] for patch in cells.corner_patches]
        return lost | (corners[0] & corners[1] & corners[2] & corners[3])

    lost = jnp.zeros((experts, cells.count), bool)
    lost = jax.lax.fori_loop(0, (frequent > 0).sum(), against, lost)
    needed = jnp.zeros((experts, len(features)), bool)
    for patch in cells.corner_patches:
        needed = needed.at[:, patch].max(~lost)
    return needed


def _cosines(a: Float[Array, "n D"], b: Float[Array, "m D"]) -> Float[Array, "n m"]:
    return jnp.einsum("nd,md->nm", a, b, precision="highest")
