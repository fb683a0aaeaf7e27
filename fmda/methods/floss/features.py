"""Dense features: how each host reads CLIP's image tower, which was trained for one vector an image.

All three change the last block only, and share the tower before it. D = width of the joint space, h and w = patches
down and across.
"""

from functools import lru_cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from fmda.errors import UserError
from fmda.methods.floss.hosts import HostConfig
from fmda.models.clip import Block, VisionTransformer
from fmda.models.dinoiser import HEADS_FILE, LEAST_BLOCKS, Heads, object_features, saliency, up_to_guide
from fmda.nn.attention import attention
from fmda.nn.norm import unit


class Patches(NamedTuple):
    """Dense features of a batch of windows.

    Attributes:
        features: unit length, float32.
        foreground: whether the patch looks like part of an object; all true for hosts without an object detector.
    """

    features: Float[Array, "B h w D"]
    foreground: Bool[Array, "B h w"]


class Tokens(NamedTuple):
    """The tower before its last block: what hosts with the same windows have in common.

    Attributes:
        last: tokens that enter the last block, class token first.
        guide: layer-normalised input of the third last block's MLP; None for a tower of fewer blocks, and for NACLIP,
            whose tokens serve no other host.
    """

    last: Float[Array, "B T width"]
    guide: Float[Array, "B T width"] | None


def patches(
    host: HostConfig, tower: VisionTransformer, heads: Heads | None, pixels: Float[Array, "B H W 3"]
) -> Patches:
    """Returns features and foreground of each patch.

    Args:
        tower: CLIP's image tower.
        heads: CLIP-DINOiser's; not read by the other hosts.
        pixels: normalised; a remainder smaller than a patch is dropped.
    """
    return patches_of(host, tower, heads, tokens(host, tower, pixels), tower.grid(*pixels.shape[1:3]))


def tokens(host: HostConfig, tower: VisionTransformer, pixels: Float[Array, "B H W 3"]) -> Tokens:
    """Returns the tokens of normalised windows."""
    x = tower.tokens(pixels, position_offset=host.position_offset)
    blocks = list(tower.blocks)
    if len(blocks) < LEAST_BLOCKS:
        for block in blocks[:-1]:
            x = block(x)
        return Tokens(x, None)
    x, guide = up_to_guide(blocks, x)
    x = x + blocks[-LEAST_BLOCKS].mlp(guide)
    return Tokens(blocks[-2](x), None if host.features == "naclip" else guide)


def patches_of(
    host: HostConfig, tower: VisionTransformer, heads: Heads | None, before_last: Tokens, shape: tuple[int, int]
) -> Patches:
    """Returns features and foreground from the tokens; each host has its own form of the last block.

    Args:
        shape: patches down and across.
    """
    last = tower.blocks[-1]
    everything = jnp.ones((len(before_last.last), *shape), bool)
    if host.features == "naclip":
        dense = tower.project(_key_attention(last, before_last.last, neighbourhood(*shape, host.gaussian_std)))
        return Patches(unit(_grid(dense, *shape)), everything)
    values = _grid(tower.project(last.value_path(before_last.last)), *shape)
    if host.features == "maskclip":
        return Patches(unit(values), everything)
    if heads is None:
        raise UserError(f"clip-dinoiser: needs its heads ({HEADS_FILE}); name their folder with heads=")
    if before_last.guide is None:
        raise UserError(f"clip-dinoiser: reads the third last block, but the image tower has {len(tower.blocks)}")
    guide = _grid(before_last.guide, *shape)
    refined = refine(values, object_features(heads, guide), host.affinity_floor)
    return Patches(unit(refined), saliency(heads, guide) > 0)


def _key_attention(
    block: Block, x: Float[Array, "B T width"], bias: Float[np.ndarray, "T T"]
) -> Float[Array, "B T width"]:
    """Returns attention of keys to keys with a bias; no residual, no MLP (NACLIP's reduced architecture)."""
    y = block.norm1(x)
    layer = block.attention
    keys, values = layer.split(layer.key(y)), layer.split(layer.value(y))
    mixed = attention(keys, keys, values, bias=jnp.asarray(bias, y.dtype)[None, None])
    return layer.out(mixed.reshape(x.shape))


@lru_cache(maxsize=64)
def neighbourhood(h: int, w: int, std: float) -> Float[np.ndarray, "1+h*w 1+h*w"]:
    """Returns NACLIP's additive bias: exp(-d^2 / (2 std^2)) between patches d apart, 0 for the class token."""
    y, x = np.divmod(np.arange(h * w), w)
    squared = (y[:, None] - y[None]) ** 2 + (x[:, None] - x[None]) ** 2
    bias = np.zeros((1 + h * w, 1 + h * w), np.float32)
    bias[1:, 1:] = np.exp(-squared / (2 * std**2))
    return bias


def refine(values: Float[Array, "B h w D"], objects: Float[Array, "B h w C"], floor: float) -> Float[Array, "B h w D"]:
    """Returns values averaged over the patches of the same object, weighted by similarities of at least `floor`."""
    b, h, w, _ = values.shape
    keys = objects.reshape(b, h * w, -1)
    similar = jnp.einsum("bpc,bqc->bpq", keys, keys, precision=lax.Precision.HIGHEST)
    similar = jnp.where(similar < floor, 0.0, similar)
    flat = values.astype(jnp.float32).reshape(b, h * w, -1)
    mixed = jnp.einsum("bpq,bqd->bpd", similar, flat, precision=lax.Precision.HIGHEST)
    return (mixed / (similar.sum(-1, keepdims=True) + 1e-6)).reshape(b, h, w, -1)


def _grid(tokens: Float[Array, "B T C"], h: int, w: int) -> Float[Array, "B h w C"]:
    return tokens[:, 1:].reshape(len(tokens), h, w, -1)
