"""CLIP-DINOiser's two convolutions on the inside of CLIP's image tower (Wysoczanska et al. 2024).

`obj_proj` (3x3) gives similar features to patches of one object, `bkg_decoder` (1x1) separates objects and background.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fmda.models.clip import Block, VisionTransformer
from fmda.nn.conv import conv
from fmda.nn.norm import unit

Heads = dict[str, dict[str, Any]]
"""{"obj_proj", "bkg_decoder"}, each {"kernel" [k, k, width, out], "bias" [out]}."""

HEADS_FILE = "dinoiser.safetensors"
LEAST_BLOCKS = 3
"""The heads read the third last block."""


@dataclass(frozen=True)
class HeadsConfig:
    """Width of the tower that the heads read, and channels of the object features."""

    width: int
    channels: int


def heads_module(config: HeadsConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> nnx.Dict:
    """Returns the heads as a module; its parameters are `Heads`."""
    return nnx.Dict(
        obj_proj=conv(config.width, config.channels, 3, dtype=dtype, rngs=rngs),
        bkg_decoder=conv(config.width, 1, 1, dtype=dtype, rngs=rngs),
    )


def init_heads(key: Array, width: int, channels: int) -> Heads:
    """Returns freshly drawn heads for a tower of that width: uniform within 1 / sqrt(inputs), as torch draws them."""
    keys = iter(jax.random.split(key, 4))

    def layer(side: int, out: int) -> dict[str, Array]:
        bound = (side * side * width) ** -0.5
        kernel = jax.random.uniform(next(keys), (side, side, width, out), jnp.float32, -bound, bound)
        return {"kernel": kernel, "bias": jax.random.uniform(next(keys), (out,), jnp.float32, -bound, bound)}

    return {"obj_proj": layer(3, channels), "bkg_decoder": layer(1, 1)}


def guide_features(tower: VisionTransformer, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b h w width"]:
    """Returns what the heads read: the layer-normalised input of the third last block's MLP, for each patch.

    `pixels` are normalised. The tower needs at least `LEAST_BLOCKS` blocks.
    """
    _, guide = up_to_guide(list(tower.blocks), tower.tokens(pixels))
    return guide[:, 1:].reshape(len(pixels), *tower.grid(*pixels.shape[1:3]), -1).astype(jnp.float32)


def up_to_guide(
    blocks: Sequence[Block], x: Float[Array, "b t width"]
) -> tuple[Float[Array, "b t width"], Float[Array, "b t width"]]:
    """Returns the tokens in the third last block, after its attention, and the layer-normalised input of its MLP."""
    for block in blocks[:-LEAST_BLOCKS]:
        x = block(x)
    third = blocks[-LEAST_BLOCKS]
    x = x + third.attention(third.norm1(x))
    return x, third.norm2(x)


def object_features(heads: Heads, guide: Float[Array, "b h w width"]) -> Float[Array, "b h w c"]:
    """Returns unit-length object features: a 3x3 convolution with edges repeated (`obj_proj`)."""
    guide = jnp.pad(guide.astype(jnp.float32), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    return unit(_conv(guide, heads["obj_proj"]))


def saliency(heads: Heads, guide: Float[Array, "b h w width"]) -> Float[Array, "b h w"]:
    """Returns the logit that a patch shows an object rather than background (`bkg_decoder`)."""
    return _conv(guide.astype(jnp.float32), heads["bkg_decoder"])[..., 0]


def _conv(x: Array, layer: dict[str, Any]) -> Array:
    out = lax.conv_general_dilated(
        x, jnp.asarray(layer["kernel"], jnp.float32), (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return out + jnp.asarray(layer["bias"], jnp.float32)[None, None, None]
