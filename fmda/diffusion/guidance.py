"""Classifier-free guidance: away from what the network predicts without a caption (Ho & Salimans 2022)."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from fmda.diffusion.samplers import Denoise

Predict = Callable[
    [Float[Array, "n h w c"], Float[Array, " n"], Float[Array, "n t d"]],
    Float[Array, "n h w c"],
]
"""(latents, timesteps, context) -> prediction, as `fmda.models.sd_unet.UNet` is called."""


def guided(
    predict: Predict,
    context: Float[Array, "b t d"],
    empty: Float[Array, "t d"] | Float[Array, "b t d"],
    scale: float | Float[Array, ""],
) -> Denoise:
    """Returns the `denoise` of `samplers.sample`: empty + scale (caption - empty), float32, of the two predictions.

    The network is called once, with the 2b latents, the timestep repeated to [2b], and the empty half of the context
    first. A scale of 1 is the captioned prediction alone, at twice its price; 7.5 is customary.

    Args:
        predict: the network with its parameters bound.
        context: text states of the captions.
        empty: text states of the empty (or a negative) caption, one for all or one each.
        scale: guidance scale.
    """
    both = jnp.concatenate([jnp.broadcast_to(empty, context.shape).astype(context.dtype), context])

    def denoise(latents: Float[Array, "b h w c"], timestep: Float[Array, ""]) -> Float[Array, "b h w c"]:
        twice = jnp.concatenate([latents, latents])
        prediction = predict(twice, jnp.broadcast_to(timestep, len(twice)), both).astype(jnp.float32)
        without, with_caption = jnp.split(prediction, 2)
        return without + scale * (with_caption - without)

    return denoise
