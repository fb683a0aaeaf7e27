"""Pixel-adaptive mask refinement (Araslanov and Roth, CVPR 2020): scores follow the edges of the image."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_AROUND = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


def neighbours(x: Float[Array, "H W C"], dilations: tuple[int, ...]) -> Float[Array, "N H W C"]:
    """Returns the 8 neighbours of each pixel at each dilation, edges repeated. N = 8 * len(dilations)."""
    height, width = x.shape[:2]
    shifted = []
    for step in dilations:
        wide = jnp.pad(x, ((step, step), (step, step), (0, 0)), mode="edge")
        for dy, dx in _AROUND:
            top, left = step * (1 + dy), step * (1 + dx)
            shifted.append(wide[top : top + height, left : left + width])
    return jnp.stack(shifted)


def affinity(image: Float[Array, "H W C"], dilations: tuple[int, ...]) -> Float[Array, "N H W"]:
    """Returns weights over a pixel's neighbours that sum to one; alike colours weigh more.

    Softmax over neighbours of the channel mean of -|difference| / (1e-8 + 0.1 * local deviation); the deviation is the
    unbiased one of 9 samples a dilation, the pixel itself among them.
    """
    around = neighbours(image, dilations)
    samples = jnp.concatenate([around, jnp.repeat(image[None], len(dilations), axis=0)])
    spread = samples.std(0, ddof=1)
    distance = -jnp.abs(around - image[None]) / (1e-8 + 0.1 * spread)[None]
    return jax.nn.softmax(distance.mean(-1), axis=0)


def pamr(
    scores: Float[Array, "H W K"], image: Float[Array, "H W C"], steps: int, dilations: tuple[int, ...]
) -> Float[Array, "H W K"]:
    """Returns scores after `steps` rounds of averaging over the neighbours of alike colour."""
    weights = affinity(image, dilations)[..., None]

    def once(_: int, x: Array) -> Array:
        return (weights * neighbours(x, dilations)).sum(0)

    return jax.lax.fori_loop(0, steps, once, scores)
