"""From a module's constructor to its graph and its plain parameter tree, without and with arrays."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Key

Tree = dict[Any, Any]


def abstract(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[nnx.GraphDef, Tree]:
    """Returns (graphdef, tree of ShapeDtypeStruct) of the module that `make(rngs)` builds; allocates nothing.

    `nnx.merge(graphdef, params)` gives the module back for any tree of that form.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)


def init(make: Callable[[nnx.Rngs], nnx.Module], key: Key[Array, ""] | Array) -> Tree:
    """Returns freshly drawn parameters of the module that `make(rngs)` builds, as a plain nested dict."""
    return jax.jit(lambda key: nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)))))(key)


def parameter_count(make: Callable[[nnx.Rngs], nnx.Module]) -> int:
    """Returns the number of trainable scalars; running statistics of batch normalisation are not among them."""
    state = nnx.state(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.to_pure_dict(state)))
