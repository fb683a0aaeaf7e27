"""From a module's constructor to its graph and its plain parameter tree, without and with arrays."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from fmda.nn.norm import BatchNorm

Tree = dict[Any, Any]
Make = Callable[[nnx.Rngs], nnx.Module]


class _Keys:
    """Stands in for `nnx.Rngs` while a module is built: every stream gives fresh keys from one counter.

    `nnx.Rngs` keeps its counters in variables; advancing one inside a trace costs time that grows with the program
    traced so far, which made building a large net quadratic in its number of layers.
    """

    def __init__(self, key: Array) -> None:
        self._key, self._count = key, 0

    def __getattr__(self, stream: str) -> Callable[[], Array]:
        if stream.startswith("__"):
            raise AttributeError(stream)
        return self

    def __call__(self) -> Array:
        self._count += 1
        return jax.random.fold_in(self._key, self._count)


def _build(make: Make, key: Array) -> nnx.Module:
    return make(cast(nnx.Rngs, _Keys(key)))


def abstract(make: Make) -> tuple[nnx.GraphDef, Tree]:
    """Returns (graphdef, tree of ShapeDtypeStruct) of the module that `make(rngs)` builds; allocates nothing.

    `nnx.merge(graphdef, params)` gives the module back for any tree of that form.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: _build(make, jax.random.key(0))))
    return graphdef, nnx.to_pure_dict(state)


def init(make: Make, key: Key[Array, ""] | Array) -> Tree:
    """Returns freshly drawn parameters of the module that `make(rngs)` builds, as a plain nested dict."""
    return jax.jit(lambda key: nnx.to_pure_dict(nnx.state(_build(make, key))))(key)


def parameter_count(make: Make) -> int:
    """Returns the number of trainable scalars; running statistics of batch normalisation are not among them."""
    module = nnx.eval_shape(lambda: _build(make, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(module, nnx.Param))))


def separated(graphdef: nnx.GraphDef, tree: Tree) -> tuple[Tree, Tree]:
    """Returns (parameters, running statistics of batch normalisation) of a network's whole tree."""
    _, *parts = nnx.split(nnx.merge(graphdef, tree), nnx.Param, nnx.BatchStat)
    params, statistics = map(nnx.to_pure_dict, parts)
    return params, statistics


def assembled(graphdef: nnx.GraphDef, params: Tree, statistics: Tree, *, batch_statistics: bool = False) -> Any:
    """Returns the module of separated trees; with `batch_statistics` its `BatchNorm` layers normalise by the batch.

    Its calls then move its own running statistics, which `statistics_of` returns; a teacher's are simply not read.
    Assemble and call it inside one jax transformation.
    """
    module = nnx.merge(graphdef, params, statistics)
    module.set_attributes(BatchNorm, batch_statistics=batch_statistics, raise_if_not_found=False)
    return module


def statistics_of(module: nnx.Module) -> Tree:
    """Returns the running statistics that a module has now; {} where it has none."""
    return nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))


@partial(jax.jit, static_argnums=0)
def _applied(graphdef: nnx.GraphDef, params: Tree, x: Array, key: Array | None, rate: Array) -> Array:
    """Returns x after a block without running statistics; blocks that differ in parameters alone are traced once.

    Tracing takes most of a plan's time, and much of what precedes compilation.
    """
    return cast(Any, nnx.merge(graphdef, params))(x, key, rate)


def apply_blocks(
    blocks: Sequence[nnx.Module],
    x: Array,
    key: Key[Array, ""] | None,
    rates: Sequence[float],
    *,
    first: int = 0,
    remat: bool = False,
    scan: bool = False,
) -> Array:
    """Returns x after each block in turn, called as `block(x, key, rate)`.

    rates: of the branches that a key drops, one number a block. first: the index of the first block, from which and
    from `key` its own key is made, none at rate 0. remat: the backward pass computes each block again from its input.
    scan: blocks that differ in their parameters alone run in one loop, so that one is compiled for all.
    """
    indices = range(first, first + len(blocks))
    graphdefs = [nnx.graphdef(block) for block in blocks]
    trees = [nnx.to_pure_dict(nnx.state(block)) for block in blocks]
    if not scan or len(blocks) == 1:
        for index, graphdef, tree, rate in zip(indices, graphdefs, trees, rates, strict=True):
            run = partial(_applied, graphdef, tree)
            own = None if key is None or not rate else jax.random.fold_in(key, index)
            x = (jax.checkpoint(run) if remat else run)(x, own, jnp.float32(rate))
        return x

    keys = None if key is None else jax.vmap(partial(jax.random.fold_in, key))(jnp.asarray(indices))

    def body(x: Array, one: tuple[Tree, Array | None, Array]) -> tuple[Array, None]:
        return _applied(graphdefs[0], one[0], x, *one[1:]), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    return jax.lax.scan(jax.checkpoint(body) if remat else body, x, (stacked, keys, jnp.asarray(rates, jnp.float32)))[0]


def with_blocks(graphdef: nnx.GraphDef, tree: Tree, **how: bool) -> nnx.GraphDef:
    """Returns a network's graph that applies its blocks with `remat` or `scan`; ValueError where it has none."""
    module = nnx.merge(graphdef, tree)
    module.set_attributes(**how)
    return nnx.split(module)[0]
