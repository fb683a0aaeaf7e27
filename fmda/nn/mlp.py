"""Three linear layers, the small network behind the embeddings of queries and tokens."""

import jax
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

DRAWN = nnx.initializers.lecun_normal()


class ThreeLayers(nnx.Module):
    """Three linear layers with ReLU between them. [..., width] -> [..., after]."""

    def __init__(
        self, width: int, hidden: int, after: int, *, kernel_init: Initializer = DRAWN, dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        sizes = ((width, hidden), (hidden, hidden), (hidden, after))
        self.layers = nnx.List(nnx.Linear(*size, kernel_init=kernel_init, dtype=dtype, rngs=rngs) for size in sizes)

    def __call__(self, x: Float[Array, "*s width"]) -> Float[Array, "*s after"]:
        first, second, last = self.layers
        return last(jax.nn.relu(second(jax.nn.relu(first(x)))))
