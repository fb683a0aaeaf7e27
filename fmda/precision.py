"""Number formats of parameters and computation.

Parameters, optimizer moments, averages of weights, losses and running statistics are float32; `precision` settings name
what matrix products and convolutions are computed in. There is no float16: it would need loss scaling.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


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
