"""Patch probabilities of all experts, computed only where an expert may claim a pixel.

K experts of K classes are K^2 scores a patch: for 171 classes a sixth of the image tower's work. Most are never read,
because fusion reads an expert only where its class may win. The softmax is monotone, so raw scores decide: if some
class (a *witness*) beats e by a margin at all four corners of a cell, expert e claims nothing there, and its other
scores at a patch are needed only where a cell beside that patch stays open. Witnesses are the classes that the
ordinary classifier predicts most often.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fmda.methods.floss.chain import Taps
from fmda.methods.floss.fusion import Cells

WITNESSES = 16
"""Classes tried as witnesses; the most frequent ones of a window decide nearly all cells."""

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
) -> tuple[Float[Array, "E h w K"], Taps, Taps, Bool[Array, "K cells"]]:
    """Returns the arguments of `fusion.fuse`: softmax(scale * cosine) where fusion may read it, else 0; and lost pairs.

    Args:
        features: unit length, of one window.
        classifiers: K experts and, last, the ordinary classifier, which is computed everywhere.
        rows, columns: how patches become pixels.
    """
    h, w, _ = features.shape
    flat, cells = features.reshape(h * w, -1), Cells(rows, columns, (h, w))
    ordinary = jax.nn.softmax(scale * _cosines(flat, classifiers[-1]), axis=-1)
    lost = _lost_cells(flat, classifiers, scale, ordinary.argmax(-1), cells)
    needed = jnp.zeros((len(lost), h * w), bool)
    for patch in cells.corner_patches:
        needed = needed.at[:, patch].max(~lost)

    def expert(item: tuple[Array, Array]) -> Array:
        classifier, here = item
        (places,) = jnp.nonzero(here, size=-(-len(here) // BLOCK) * BLOCK, fill_value=len(here))
        total = here.sum()

        def compute_block(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            first, p = carry
            chunk = jax.lax.dynamic_slice(places, (first,), (BLOCK,))
            scores = _cosines(flat[jnp.minimum(chunk, h * w - 1)], classifier)
            return first + BLOCK, p.at[chunk].set(jax.nn.softmax(scale * scores, axis=-1), mode="drop")

        start = (jnp.int32(0), jnp.zeros_like(ordinary))
        return jax.lax.while_loop(lambda carry: carry[0] < total, compute_block, start)[1]

    p = jax.lax.map(expert, (classifiers[:-1], needed))
    return jnp.concatenate([p, ordinary[None]]).reshape(len(classifiers), h, w, -1), rows, columns, lost


def _lost_cells(
    features: Float[Array, "P D"],
    classifiers: Float[Array, "E K D"],
    scale: float,
    likely: Int[Array, " P"],
    cells: Cells,
) -> Bool[Array, "K cells"]:
    """Returns the cells in which a witness beats each expert's class at all four corners."""
    k = jnp.arange(classifiers.shape[1])
    confidences = scale * jnp.einsum("kd,pd->kp", classifiers[k, k], features, precision="highest")
    counts = jnp.zeros_like(k).at[likely].add(1)
    frequent, witnesses = jax.lax.top_k(counts, min(WITNESSES, len(k)))

    def against(number: Array, lost: Array) -> Array:
        beaten = scale * _cosines(classifiers[:-1, witnesses[number]], features) > confidences + MARGIN
        return lost | beaten[:, cells.corner_patches].all(1)

    return jax.lax.fori_loop(0, (frequent > 0).sum(), against, jnp.zeros((len(k), cells.count), bool))


def _cosines(a: Float[Array, "n D"], b: Float[Array, "m D"]) -> Float[Array, "n m"]:
    return jnp.einsum("nd,md->nm", a, b, precision="highest")
