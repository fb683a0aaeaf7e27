"""The state of a training run and its step, a pure function over plain trees."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from fmda import trees
from fmda.errors import UserError
from fmda.perf.trace import training_flops
from fmda.trees import Tree

Metrics = dict[str, Float[Array, ""]]


class TrainState(NamedTuple):
    """Everything that a step carries on: donated, sharded by rules and checkpointed as a whole.

    Attributes:
        step: finished updates.
        params: what the optimizer changes.
        opt: the optimizer's own state.
        teacher: running average of `params`, of the same structure; {} where none is kept.
        aux: what the objective itself carries on: batch statistics, centres, class counts; {} where nothing.
    """

    step: Int[Array, ""]
    params: Tree
    opt: Any
    teacher: Tree
    aux: Tree


class Outcome(NamedTuple):
    """What an objective returns: a scalar loss, scalars to log, and the auxiliary state after this batch."""

    loss: Float[Array, ""]
    metrics: Metrics
    aux: Tree


Objective = Callable[[Tree, TrainState, Any, Any, Any], Outcome]
"""(params, state, frozen, batch, key) -> Outcome; differentiated in `params` alone, may read the whole state."""

Step = Callable[..., tuple[TrainState, Metrics]]


def create_state(
    params: Tree, tx: optax.GradientTransformation, *, teacher: bool = True, aux: Tree | None = None
) -> TrainState:
    """Returns the state before the first update; call it inside a jitted `init`.

    The teacher starts as a copy: a buffer shared with the parameters could not be donated.
    """
    average = jax.tree.map(jnp.copy, params) if teacher else {}
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), average, {} if aux is None else aux)


def make_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    teacher_decay: float | Callable[[Int[Array, ""]], Any] | None = None,
    teacher_when: Literal["before", "after"] = "after",
    accumulate: int = 1,
    schedule: Callable[[Any], Any] | None = None,
) -> Step:
    """Returns `step(state, frozen, batch, key, position=None) -> (state, metrics)`, to be jitted; donate the state.

    Each step folds its number into `key`, so the result does not depend on where a run was interrupted. `position` is
    the place in the learning-rate schedule, by default `state.step`; a run limited by time is ahead of its steps.

    Args:
        objective: see `Objective`.
        tx: the optimizer.
        teacher_decay: share that the teacher keeps at each step: a number, a function of the step (0 for the first),
            or None, which leaves `state.teacher` as it is.
        teacher_when: "after" averages the updated parameters in; "before" averages the current ones in before the
            objective reads the teacher, as DACS and DAFormer do.
        accumulate: parts n that a batch is taken in. Part i holds the examples i, i + n, ... and sees the key folded
            with i. Gradient, metrics and floating-point `aux` are means over the parts; changes of integer `aux` are
            summed.
        schedule: learning rate by position, to be logged.

    The metrics are those of the objective, `loss`, `grad_norm` (before clipping), `learning_rate` where a schedule is
    given, and `teacher_decay` where it is a function. Raises UserError, when traced, for a batch that does not divide
    into n parts.
    """

    gradient = jax.grad(scalar_loss(objective), has_aux=True)
    tx = optax.with_extra_args_support(tx)

    def in_parts(state: TrainState, frozen: Any, batch: Any, key: Any) -> tuple[Tree, tuple[Metrics, Tree]]:
        parts = jax.tree.map(lambda leaf: _parts(leaf, accumulate), batch)

        def one(index: Any) -> Any:
            part = jax.tree.map(lambda leaf: leaf[index], parts)
            return gradient(state.params, state, frozen, part, jax.random.fold_in(key, index))

        def add(total: Any, index: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, one(index)), None

        grads, (metrics, aux) = jax.lax.scan(add, one(0), jnp.arange(1, accumulate))[0]
        grads, metrics = jax.tree.map(lambda leaf: leaf / accumulate, (grads, metrics))
        return grads, (metrics, jax.tree.map(lambda total, old: _merged(total, old, accumulate), aux, state.aux))

    def step(state: TrainState, frozen: Any, batch: Any, key: Any, position: Any = None) -> tuple[TrainState, Metrics]:
        position = state.step if position is None else position
        key = jax.random.fold_in(key, state.step)
        decay = teacher_decay(state.step) if callable(teacher_decay) else teacher_decay
        if decay is not None and teacher_when == "before":
            state = state._replace(teacher=_averaged(state.teacher, state.params, decay))
        if accumulate == 1:
            grads, (metrics, aux) = gradient(state.params, state, frozen, batch, key)
        else:
            grads, (metrics, aux) = in_parts(state, frozen, batch, key)
        updates, opt = tx.update(grads, state.opt, state.params, position=position)
        params = optax.apply_updates(state.params, updates)
        teacher = state.teacher
        if decay is not None and teacher_when == "after":
            teacher = _averaged(teacher, params, decay)
        metrics = {**metrics, "grad_norm": trees.norm(grads)}
        if schedule is not None:
            metrics["learning_rate"] = schedule(position)
        if callable(teacher_decay):
            metrics["teacher_decay"] = decay
        return TrainState(state.step + 1, params, opt, teacher, aux), metrics

    return step


def rising(decay: float) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
    """Returns the share that an average keeps at each step, min(decay, (1 + step) / (10 + step)).

    The initial parameters are forgotten at once; a constant share would still carry decay^steps of them.
    """
    return lambda step: jnp.minimum(decay, (1 + step) / (10 + step))


def _averaged(average: Tree, params: Tree, keep: Any) -> Tree:
    return jax.tree.map(lambda old, new: (old + (1 - keep) * (new - old)).astype(old.dtype), average, params)


def _merged(total: Any, before: Any, parts: int) -> Any:
    """Returns a leaf of `aux` from the sum of its values after each part, all of which began with `before`."""
    if jnp.issubdtype(total.dtype, jnp.inexact):
        return total / parts
    return total - (parts - 1) * before


def _parts(leaf: Any, count: int) -> Any:
    """Returns [B, ...] as [count, B / count, ...]; every part takes examples from all devices, none has to move."""
    if leaf.ndim == 0:
        return jnp.broadcast_to(leaf, (count,))
    if leaf.shape[0] % count:
        raise UserError(f"accumulate: a batch of {leaf.shape[0]} does not divide into {count} parts; choose a multiple")
    return leaf.reshape(leaf.shape[0] // count, count, *leaf.shape[1:]).swapaxes(0, 1)


def scalar_loss(objective: Objective) -> Callable[..., tuple[Any, tuple[Metrics, Tree]]]:
    """Returns the objective as (loss, (metrics with the loss, auxiliary state)), for `jax.grad(has_aux=True)`."""

    def loss(params: Tree, state: TrainState, frozen: Any, batch: Any, key: Any) -> tuple[Any, tuple[Metrics, Tree]]:
        value, metrics, aux = objective(params, state, frozen, batch, key)
        return value, ({**metrics, "loss": value}, aux)

    return loss


def step_flops(objective: Objective, state: TrainState, frozen: Any, batch: Any, key: Any) -> int:
    """Returns the model's own FLOPs of a training step on a batch, the numerator of MFU; arrays or their shapes."""
    return training_flops(scalar_loss(objective), state.params, state, frozen, batch, key)
