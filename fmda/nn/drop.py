"""Random removal of whole parts of an array, with an explicit key: stochastic depth and dropout of channels."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def drop(
    x: Float[Array, "..."], rate: float | Array, axes: tuple[int, ...], key: Key[Array, ""] | None
) -> Float[Array, "..."]:
    """Returns x with parts set to zero with probability `rate`, the others divided by 1 - rate.

    One draw is made for each index along `axes` and shared by all other axes: (0,) drops whole examples (stochastic
    depth, Huang et al. 2016), (0, -1) whole channels of an example. Without a key, or at rate 0, x is returned.
    """
    if key is None or (isinstance(rate, (int, float)) and rate == 0):
        return x
    kept = {axis % x.ndim for axis in axes}
    shape = tuple(size if axis in kept else 1 for axis, size in enumerate(x.shape))
    return jnp.where(jax.random.bernoulli(key, 1 - rate, shape), x / (1 - rate), 0).astype(x.dtype)
