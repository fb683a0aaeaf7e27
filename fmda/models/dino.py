"""DINO's vision transformers (Caron et al. 2021): CLIP's blocks without the first norm and without a projection."""

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fmda.models.clip import VisionTransformer, VitConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

POSITION_OFFSET = 0.1
"""What DINO's own code adds to the new grid's side when it resizes positions."""


def vit_config(
    patch_size: int = 16,
    width: int = 768,
    *,
    layers: int = 12,
    heads: int | None = None,
    mlp_width: int | None = None,
    image_size: int = 224,
) -> VitConfig:
    """Returns the configuration of a plain vision transformer, by default with heads of size 64 and a four-fold MLP."""
    return VitConfig(
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        layers=layers,
        heads=heads or width // 64,
        mlp_width=mlp_width or 4 * width,
        activation="gelu",
        norm_eps=1e-6,
        pre_norm=False,
        patch_bias=True,
    )


def dino(config: VitConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> VisionTransformer:
    """Returns the network; called, it gives the normalised class token [B, width]."""
    return VisionTransformer(config, None, dtype=dtype, rngs=rngs)


def last_layer(
    model: VisionTransformer,
    pixels: Float[Array, "b H W 3"],
    part: Literal["query", "key", "value"] = "value",
    *,
    position_offset: float = POSITION_OFFSET,
) -> Float[Array, "b h w width"]:
    """Returns queries, keys or values of the last block's attention for each patch, heads side by side.

    `pixels` are RGB normalised by IMAGENET_MEAN and IMAGENET_STD. The class token is left out.
    """
    x = model.tokens(pixels, position_offset=position_offset)
    for block in list(model.blocks)[:-1]:
        x = block(x)
    last = model.blocks[-1]
    features = getattr(last.attention, part)(last.norm1(x))
    h, w = model.grid(*pixels.shape[1:3])
    return features[:, 1:].reshape(pixels.shape[0], h, w, -1)
