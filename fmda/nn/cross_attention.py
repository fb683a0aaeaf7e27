"""Attention between two sequences, with its projections."""

from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fmda.nn.attention import attention

DRAWN = nnx.initializers.lecun_normal()


class CrossAttention(nnx.Module):
    """Attention with projections to `inner` channels (default: `width`) and back. [b, t, width] -> the same."""

    def __init__(
        self, width: int, heads: int, *, inner: int | None = None, kernel_init: Initializer = DRAWN,
        out_init: Initializer = DRAWN, dtype: DTypeLike, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.heads, inner = heads, inner or width
        self.query, self.key, self.value = (
            nnx.Linear(width, inner, kernel_init=kernel_init, dtype=dtype, rngs=rngs) for _ in range(3)
        )
        self.out = nnx.Linear(inner, width, kernel_init=out_init, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        query: Float[Array, "b t width"],
        key: Float[Array, "b s width"],
        value: Float[Array, "b s width"],
        bias: Float[Array, "b 1 t s"] | None = None,
    ) -> Float[Array, "b t width"]:
        parts = (self.query(query), self.key(key), self.value(value))
        q, k, v = (x.reshape(*x.shape[:2], self.heads, -1) for x in parts)
        return self.out(attention(q, k, v, bias=bias).reshape(*query.shape[:2], -1))
