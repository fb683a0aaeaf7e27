"""Low-rank adapters (Hu et al. 2022) as trees beside the weights they change.

The adapter of a kernel [in, out] is {"a": [in, r], "b": [r, out]}, and stands in its tree where the layer of the kernel
stands in its own. A step adds the products to the kernels and runs the network as it is: what is exported is what was
trained.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from fmda import trees
from fmda.trees import Tree

ATTENTION = tuple(f"*attention/{name}/kernel" for name in ("query", "key", "value", "out"))
"""Kernels of the attention's projections, in the UNet and in the text encoder."""


def target_kernels(weights: Mapping[Any, Any], targets: Sequence[str] = ATTENTION) -> dict[str, Any]:
    """Returns {path of the layer: kernel} of the kernels that get adapters; leaves need only a shape."""
    kernels = trees.flatten(trees.select(weights, *targets))
    return {path.removesuffix("/kernel"): kernel for path, kernel in kernels.items()}


def init_adapters(
    key: Key[Array, ""], weights: Mapping[Any, Any], rank: int, targets: Sequence[str] = ATTENTION
) -> Tree:
    """Returns fresh adapters: a normal of deviation 1 / rank in `a`, zeros in `b`, so that they change nothing yet."""
    flat: dict[str, Array] = {}
    for number, (path, kernel) in enumerate(target_kernels(weights, targets).items()):
        width_in, width_out = kernel.shape
        flat[f"{path}/a"] = jax.random.normal(jax.random.fold_in(key, number), (width_in, rank)) / rank
        flat[f"{path}/b"] = jnp.zeros((rank, width_out))
    return trees.unflatten(flat)


def minor_adapters(weights: Mapping[Any, Any], rank: int, scale: float, targets: Sequence[str] = ATTENTION) -> Tree:
    """Returns adapters whose `scale` * a b is what the `rank` smallest singular values add to each kernel.

    Begun from these, beside kernels without that part, training leaves the principal directions of a network as they
    are. Source: Yun et al. 2025 (SoMA).
    """
    flat: dict[str, np.ndarray] = {}
    for path, kernel in target_kernels(weights, targets).items():
        left, values, right = np.linalg.svd(np.asarray(kernel, np.float32), full_matrices=False)
        root = np.sqrt(values[-rank:] / np.float32(scale))
        flat[f"{path}/a"], flat[f"{path}/b"] = left[:, -rank:] * root[None], root[:, None] * right[-rank:]
    return trees.unflatten(flat)


def merged(weights: Mapping[Any, Any], adapters: Mapping[Any, Any], scale: float) -> Tree:
    """Returns the weights with `scale` * a b added to the kernels that have adapters; those come out in float32."""
    flat, added = trees.flatten(weights), trees.flatten(adapters)
    for path in (path.removesuffix("/a") for path in added if path.endswith("/a")):
        change = jnp.matmul(added[f"{path}/a"], added[f"{path}/b"], precision="highest")
        flat[f"{path}/kernel"] = flat[f"{path}/kernel"].astype(jnp.float32) + scale * change
    return trees.unflatten(flat)
