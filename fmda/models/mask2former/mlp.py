"""The small network behind mask embeddings and text embeddings of queries."""

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

TORCH = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""What torch draws for a linear layer."""


class Mlp(nnx.Module):
    """Three linear layers with ReLU between them. [..., width] -> [..., after]."""

    def __init__(self, width: int, after: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List(
            nnx.Linear(width, out, kernel_init=TORCH, dtype=dtype, rngs=rngs) for out in (width, width, after)
        )

    def __call__(self, x: Float[Array, "*s width"]) -> Float[Array, "*s after"]:
        first, second, last = self.layers
        return last(jax.nn.relu(second(jax.nn.relu(first(x)))))
