"""Which number format parameters, computation and outputs have."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fmda.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Policy:
    """Three dtypes: of stored parameters, of matmul and convolution inputs, and of what a network returns.

    Optimizer moments, averages of weights, losses, matching costs and running statistics stay in float32 whatever the
    policy says. There is no float16: it would need loss scaling.
    """

    param: DTypeLike = jnp.float32
    compute: DTypeLike = jnp.float32
    output: DTypeLike = jnp.float32

    @staticmethod
    def named(name: str) -> "Policy":
        """Returns the policy "float32" (all three) or "bfloat16" (computes in bfloat16, stores and returns float32).

        Raises UserError for any other name.
        """
        if name not in _POLICIES:
            raise UserError(f"precision: '{name}' is no policy{did_you_mean(name, _POLICIES)}")
        return _POLICIES[name]


_POLICIES = {"float32": Policy(), "bfloat16": Policy(compute=jnp.bfloat16)}


def cast(tree: Any, dtype: DTypeLike) -> Any:
    """Returns the tree with its floating-point leaves in `dtype`; integers, booleans and keys stay as they are.

    Works on arrays and on `jax.ShapeDtypeStruct`s alike.
    """

    def convert(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype == dtype:
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf.update(dtype=dtype)
        return leaf.astype(dtype)

    return jax.tree.map(convert, tree)
