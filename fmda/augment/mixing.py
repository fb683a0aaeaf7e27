"""Images mixed by class (ClassMix) and hidden by patches (masked image consistency)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Num

from fmda.trees import Tree

IGNORE = 255


def class_masks(
    key: Any, labels: Int[Array, "b h w"], classes: int, *, per_image: bool = False
) -> Bool[Array, "b h w"]:
    """Returns for each image the pixels of ceil(n / 2) of the n classes that occur, drawn uniformly (ClassMix).

    The classes are those of the whole batch, from which each image draws its own half, so that some may not occur in
    it (DAFormer, HRDA); with `per_image` they are those of the image (Olsson et al. 2021, DACS). The value 255 counts
    as a class.

    Args:
        key: random key.
        labels: 0 to classes - 1, or 255.
        classes: how many there are.
        per_image: see above.
    """
    index = jnp.where(labels == IGNORE, classes, labels).astype(jnp.int32)
    values = jnp.arange(classes + 1).reshape(1, 1, 1, -1)
    present = (index[..., None] == values).any((1, 2))
    if not per_image:
        present = jnp.broadcast_to(present.any(0, keepdims=True), present.shape)
    scores = jnp.where(present, jax.random.uniform(key, present.shape), 2.0)
    rank = jnp.argsort(jnp.argsort(scores, axis=1), axis=1)
    half = (present.sum(1, keepdims=True) + 1) // 2
    return jax.vmap(lambda chosen, where: chosen[where])(rank < half, index)


def mixed(mask: Bool[Array, "b h w"], inside: Tree, outside: Tree) -> Tree:
    """Returns the leaves [b, h, w, ...] of `inside` where the mask is true and those of `outside` elsewhere.

    Images, labels and weights of source and target go through one call.
    """
    return jax.tree.map(lambda a, b: jnp.where(mask.reshape(*mask.shape, *(1,) * (a.ndim - 3)), a, b), inside, outside)


def patch_masked(
    key: Any, images: Num[Array, "b h w c"], *, patch: int = 64, ratio: float = 0.7
) -> Num[Array, "b h w c"]:
    """Returns normalised images with each patch set to 0 with probability `ratio` (Hoyer et al. 2023, MIC, eq. 4-5).

    Patches are squares of `patch` pixels, cut off at the right and lower edge, drawn for each image. MIC takes 64 for
    crops of 1024 and 32 for crops of 512.
    """
    b, h, w, _ = images.shape
    kept = jax.random.bernoulli(key, 1 - ratio, (b, -(-h // patch), -(-w // patch)))
    pixels = kept.repeat(patch, axis=1).repeat(patch, axis=2)[:, :h, :w, None]
    return jnp.where(pixels, images, jnp.zeros((), images.dtype))
