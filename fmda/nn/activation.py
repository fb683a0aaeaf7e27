"""Activation functions by the names that checkpoints' configurations use."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x * Phi(x), the exact (erf) GELU; `jax.nn.gelu` alone would take the tanh form."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x * sigmoid(1.702 x), the form OpenAI trained CLIP with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
}
