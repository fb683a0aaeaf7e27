"""The pair of towers."""

import math

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fmda.models.clip.config import ClipConfig, ConvNextConfig, ResNetConfig, VitConfig
from fmda.models.clip.convnext import ConvNext
from fmda.models.clip.resnet import ModifiedResNet
from fmda.models.clip.text import TextTransformer
from fmda.models.clip.vision import VisionTransformer


def vision_tower(
    config: VitConfig | ResNetConfig | ConvNextConfig, embed_dim: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
) -> VisionTransformer | ModifiedResNet | ConvNext:
    """Returns the image tower that the type of `config` names."""
    if isinstance(config, VitConfig):
        return VisionTransformer(config, embed_dim, dtype=dtype, rngs=rngs)
    if isinstance(config, ResNetConfig):
        return ModifiedResNet(config, embed_dim, dtype=dtype, rngs=rngs)
    return ConvNext(config, embed_dim, dtype=dtype, rngs=rngs)


class Clip(nnx.Module):
    """Image tower `vision`, text tower `text`, and `logit_scale`, the logarithm of the inverse temperature.

    `dtype` is what the towers compute in; parameters are drawn in float32. Source: Radford et al. 2021, fig. 3.
    """

    def __init__(self, config: ClipConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.vision = vision_tower(config.vision, config.embed_dim, dtype=dtype, rngs=rngs)
        self.text = TextTransformer(config.text, config.embed_dim, dtype=dtype, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(math.log(1 / 0.07), jnp.float32))

    def encode_image(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b embed"]:
        """Returns image embeddings, projected, not L2-normalised, float32. `pixels` are normalised RGB."""
        return self.vision(pixels).astype(jnp.float32)

    def encode_text(self, ids: Int[Array, "b t"]) -> Float[Array, "b embed"]:
        """Returns text embeddings, projected, not L2-normalised, float32. `ids` come from the tokenizer."""
        return self.text(ids).astype(jnp.float32)
