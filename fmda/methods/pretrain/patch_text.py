"""Patches against class names: what teaches a small CLIP where things are.

A large CLIP learns this from hundreds of millions of images. A small one, trained on some hundred thousand
crops, is supervised: the class of each patch is known from the scene, so each patch is matched with the names of all
classes, put into a template that is true of its crop.
Patches are read in the two ways in which training-free segmenters read them.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from fmda.data import IGNORE
from fmda.methods.pretrain.prompts import needs
from fmda.models.clip import VisionTransformer

CHANCE = 0.1


def template_needs(templates: Sequence[str], tags: Sequence[str]) -> Bool[np.ndarray, "m tags"]:
    """Returns at [m, t] whether tag t makes template m true; a row of False says nothing of the look."""
    return np.array([[tag in needs(template) for tag in tags] for template in templates])


def chosen_templates(
    key: Array, needed: Bool[Array, "m tags"], present: Bool[Array, "b tags"], count: int
) -> tuple[Int[Array, " count"], Int[Array, " b"]]:
    """Returns `count` templates drawn for a batch, and which of them each crop takes: one that is true of it.

    Templates that state a true look go before those that state none; among equals chance decides, and it lets a false
    one through where none of those drawn is true.
    """
    draw, tie = jax.random.split(key)
    drawn = jax.random.choice(draw, len(needed), (count,), replace=False)
    wanted = needed[drawn]
    true = (present.astype(jnp.float32) @ wanted.T.astype(jnp.float32)) > 0.5
    silent = ~wanted.any(1)[None]
    merit = jnp.where(true, 1.0, jnp.where(silent, 0.9, 0.0)) + CHANCE * jax.random.gumbel(tie, true.shape)
    return drawn, jnp.argmax(merit, axis=1)


def patch_features(tower: VisionTransformer, pixels: Float[Array, "b H W 3"]) -> tuple[Array, Array, Array]:
    """Returns the crops' embeddings [b, d] and two readings of their patches, [b, p, d] each, all projected.

    The first reading is the last block's value path with residual and MLP (MaskCLIP), the second the value path alone
    (what NACLIP averages over neighbours).
    """
    x = tower.tokens(pixels)
    for block in list(tower.blocks)[:-1]:
        x = block(x)
    last = tower.blocks[-1]
    patches = x[:, 1:]
    alone = last.attention.out(last.attention.value(last.norm1(patches)))
    return tower.project(last(x)[:, 0]), tower.project(last.value_path(patches)), tower.project(alone)


def patch_text_loss(
    patches: Float[Array, "b p d"],
    prompts: Float[Array, "b k d"],
    labels: UInt8[Array, "b p"],
    scale: Float[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the cross-entropy (nats) of each patch's class among k names, and the share of patches that are right.

    patches, prompts: any length; normalised here. labels: class of a patch, 255 = mixed, left out. A class with n
    patches in the batch weighs like the square root of n, so that roads do not drown bicycles.
    """
    patches = patches / jnp.linalg.norm(patches, axis=-1, keepdims=True)
    prompts = prompts / jnp.linalg.norm(prompts, axis=-1, keepdims=True)
    logits = scale * jnp.einsum("bpd,bkd->bpk", patches, prompts)
    known = labels != IGNORE
    index = jnp.where(known, labels, 0).astype(jnp.int32)
    one_hot = jax.nn.one_hot(index, prompts.shape[1]) * known[..., None]
    weight = (one_hot * jax.lax.rsqrt(1.0 + one_hot.sum((0, 1)))[None, None]).sum(-1)
    losses = -(one_hot * jax.nn.log_softmax(logits, axis=-1)).sum(-1)
    right = (jnp.argmax(logits, axis=-1) == index) & known
    return (weight * losses).sum() / (weight.sum() + 1e-6), right.sum() / (known.sum() + 1e-6)
