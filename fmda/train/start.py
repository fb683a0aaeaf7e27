"""Where a run begins. The order stands here and nowhere else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmda import trees
from fmda.errors import UserError, did_you_mean
from fmda.train.checkpoints import Checkpoints
from fmda.train.step import TrainState
from fmda.trees import Tree


def starting_state(
    checkpoints: Checkpoints,
    init: Callable[[Any], TrainState],
    key: Any,
    target: TrainState,
    *,
    continue_from: str | Path | None = None,
    weights: Tree | None = None,
) -> tuple[TrainState, Any, str]:
    """Returns (state on the devices, loader position or None, a phrase that says where it came from).

    First of these that applies: the newest checkpoint of this run; the newest of the run `continue_from`, with its step
    and position; `init(key)` with the parameters of `weights` in place of its own, in the teacher too;
    `init(key)`. `target` is the state as `ShapeDtypeStruct`s with shardings.
    """
    step = checkpoints.latest()
    if step is not None:
        return *checkpoints.restore(step, target), f"resuming at step {step}"
    if continue_from is not None:
        with Checkpoints(Path(continue_from)) as other:
            step = other.latest()
            if step is None:
                raise UserError(f"{continue_from}: holds no checkpoint to continue from; name another run folder")
            return *other.restore(step, target), f"continuing {continue_from} at step {step}"
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    state = jax.jit(init, out_shardings=shardings)(key)
    if weights is None:
        return state, None, "starting from random parameters"
    _check_weights(weights, target.params)
    state = jax.jit(_with_weights, out_shardings=shardings, donate_argnums=0)(state, _placed(weights, target.params))
    return state, None, f"starting from given weights ({trees.count(weights):,} of {trees.count(state.params):,})"


def _with_weights(state: TrainState, weights: Tree) -> TrainState:
    """Returns the state with copies of the weights: what the caller holds must not be donated."""
    given = trees.flatten(weights)

    def filled(tree: Tree) -> Tree:
        flat = trees.flatten(tree)
        return trees.unflatten(
            {path: jnp.copy(given[path]).astype(leaf.dtype) if path in given else leaf for path, leaf in flat.items()}
        )

    return state._replace(params=filled(state.params), teacher=filled(state.teacher))


def _placed(weights: Tree, params: Tree) -> Tree:
    """Returns the weights cut up like the parameters they are for, wherever they were before."""
    own = trees.flatten(params)

    def put(path: str, leaf: Any) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, own[path].sharding, lambda index: host[index])

    return trees.unflatten({path: put(path, leaf) for path, leaf in trees.flatten(weights).items()})


def _check_weights(weights: Tree, params: Tree) -> None:
    own = trees.flatten(params)
    for path, leaf in trees.flatten(weights).items():
        if path not in own:
            raise UserError(f"initial weights: '{path}' is no parameter of the model{did_you_mean(path, own)}")
        if leaf.shape != own[path].shape:
            raise UserError(f"initial weights: '{path}' has shape {leaf.shape}, the model wants {own[path].shape}")
