"""Low-rank adapters (Hu et al. 2022) of the attention's projections, as trees beside the weights they change.

The adapter of a kernel [in, out] is {"a": [in, r], "b": [r, out]}, and stands in its tree where the layer of the kernel
stands in its own. A step adds the products to the kernels and runs the network as it is: what is exported is what was
trained.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from fmda import trees
from fmda.trees import Tree

TARGETS = tuple(f"*attention/{name}/kernel" for name in ("query", "key", "value", "out"))
"""Kernels with adapters, in the UNet and in the text encoder."""


def target_kernels(weights: Mapping[Any, Any]) -> dict[str, Any]:
    """Returns {path of the layer: kernel} of the kernels that get adapters; leaves need only a shape."""
    kernels = trees.flatten(trees.select(weights, *TARGETS))
    return {path.removesuffix("/kernel"): kernel for path, kernel in kernels.items()}


def init_adapters(key: Key[Array, ""], weights: Mapping[Any, Any], rank: int) -> Tree:
    """Returns fresh adapters: a normal of deviation 1 / rank in `a`, zeros in `b`, so that they change nothing yet."""
    flat: dict[str, Array] = {}
    for number, (path, kernel) in enumerate(target_kernels(weights).items()):
        width_in, width_out = kernel.shape
        flat[f"{path}/a"] = jax.random.normal(jax.random.fold_in(key, number), (width_in, rank)) / rank
        flat[f"{path}/b"] = jnp.zeros((rank, width_out))
    return trees.unflatten(flat)


def merged(weights: Mapping[Any, Any], adapters: Mapping[Any, Any], scale: float) -> Tree:
    """Returns the weights with `scale` * a b added to the kernels that have adapters; those come out in float32."""
    flat, added = trees.flatten(weights), trees.flatten(adapters)
    for path in (path.removesuffix("/a") for path in added if path.endswith("/a")):
        change = jnp.matmul(added[f"{path}/a"], added[f"{path}/b"], precision="highest")
        flat[f"{path}/kernel"] = flat[f"{path}/kernel"].astype(jnp.float32) + scale * change
    return trees.unflatten(flat)
