"""What a training run carries from step to step: four trees of plain arrays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from fmda.trees import Tree


class TrainState(NamedTuple):
    """The carried state. Everything in it is donated to the step; frozen weights are passed beside it.

    `step` counts finished updates, `opt` is the optimizer's own tree, `ema` the running average of `params` (an empty
    dict where none is kept).
    """

    step: Int[Array, ""]
    params: Tree
    opt: Any
    ema: Tree


def create_state(params: Tree, tx: optax.GradientTransformation, *, ema: bool = True) -> TrainState:
    """Returns the state before the first update; call it inside a jitted `init`.

    The average starts as a copy: a buffer shared with the parameters could not be donated.
    """
    average = jax.tree.map(jnp.copy, params) if ema else {}
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), average)
