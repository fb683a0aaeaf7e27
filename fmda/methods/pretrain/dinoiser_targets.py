"""Targets from a self-supervised teacher: which patches belong together, and which are background."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fmda.models.clip import VisionTransformer
from fmda.nn.norm import unit

TINY = 1e-10


class Reading(NamedTuple):
    """What is read from a teacher's last block, for p patches and n heads.

    Attributes:
        values, keys: of its attention.
        attention: what each patch receives from the class token, after the softmax over all tokens.
    """

    values: Float[Array, "b p n d"]
    keys: Float[Array, "b p n d"]
    attention: Float[Array, "b n p"]


def read_teacher(
    teacher: VisionTransformer, pixels: Float[Array, "b H W 3"], *, position_offset: float = 0.0
) -> Reading:
    """Returns the last block's values, keys and class attention. `pixels` are ImageNet-normalised."""
    x = teacher.tokens(pixels, position_offset=position_offset)
    blocks = list(teacher.blocks)
    for block in blocks[:-1]:
        x = block(x)
    layer = blocks[-1].attention
    x = blocks[-1].norm1(x)
    keys, values = (layer.split(part(x)).astype(jnp.float32) for part in (layer.key, layer.value))
    query = layer.split(layer.query(x[:, :1]))[:, 0].astype(jnp.float32)
    scores = jnp.einsum("bnd,btnd->bnt", query, keys) * query.shape[-1] ** -0.5
    return Reading(values[:, 1:], keys[:, 1:], jax.nn.softmax(scores, axis=-1)[..., 1:])


def same_object(values: Float[Array, "b p n d"], floor: float) -> Bool[Array, "b p p"]:
    """Returns which patches belong together: the cosine of their values, all heads side by side, reaches `floor`.

    Similarities below the floor are set to 0 and the rest counts as 1 (CLIP-DINOiser, 3.3).
    """
    directions = unit(values.reshape(*values.shape[:2], -1))
    return jnp.einsum("bpd,bqd->bpq", directions, directions) >= floor


def background(attention: Float[Array, "b n p"], keys: Float[Array, "b p n d"], threshold: float) -> Bool[Array, "b p"]:
    """Returns which patches are background (Simeoni et al. 2023, FOUND, 3.2).

    The seed is the patch that receives the least attention; background is what has keys like it, with a cosine above
    `threshold`. Heads count by how sparse they are: with s the share of patches to which a head gives more than the
    image's mean over all heads, its attention and its part of the keys weigh log(sum of all s / s).
    """
    mean = attention.mean((1, 2), keepdims=True)
    share = (attention > mean).astype(jnp.float32).mean(-1) + TINY
    weight = jnp.log(share.sum(-1, keepdims=True) / share)
    seed = jnp.argmin((attention * weight[..., None]).sum(1), axis=-1)
    described = unit((keys * weight[:, None, :, None]).reshape(*keys.shape[:2], -1))
    chosen = jnp.take_along_axis(described, seed[:, None, None], axis=1)
    return (described * chosen).sum(-1) > threshold
