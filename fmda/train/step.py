"""The training step as a pure function over plain trees."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from fmda import trees
from fmda.errors import UserError
from fmda.train.state import TrainState
from fmda.trees import Tree

Metrics = dict[str, Float[Array, ""]]
LossFn = Callable[[Tree, Any, Any, Any], tuple[Float[Array, ""], Metrics]]
Step = Callable[[TrainState, Any, Any, Any], tuple[TrainState, Metrics]]


def make_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    ema_decay: float | Callable[[Int[Array, ""]], Any] | None = None,
    *,
    accumulate: int = 1,
    schedule: Callable[[Any], Any] | None = None,
) -> Step:
    """Returns `step(state, frozen, batch, key) -> (state, metrics)`, to be jitted with the state donated.

    `loss_fn(params, frozen, batch, key)` returns (scalar loss, dict of scalars). Each step folds its number into `key`,
    so the same key gives the same run, wherever it was interrupted. `ema_decay` is the share that the average keeps,
    a number or a function of the step (0 for the first); None leaves `state.ema` alone. With `accumulate` = n the batch
    is taken in n parts, of which part i holds the examples i, i + n, ...; the gradient is the mean over the parts, and
    part i sees the key folded with i. Metrics are those of `loss_fn` plus `loss`, `grad_norm` (before clipping) and, if
    a schedule is given, `learning_rate`.

    Raises UserError, when traced, for a batch that does not divide into n parts.
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def whole(params: Tree, frozen: Any, batch: Any, key: Any) -> tuple[Metrics, Tree]:
        (loss, metrics), grads = gradient(params, frozen, batch, key)
        return {**metrics, "loss": loss}, grads

    def in_parts(params: Tree, frozen: Any, batch: Any, key: Any) -> tuple[Metrics, Tree]:
        parts = jax.tree.map(lambda leaf: _parts(leaf, accumulate), batch)

        def one(index: Any) -> tuple[Metrics, Tree]:
            part = jax.tree.map(lambda leaf: leaf[index], parts)
            return whole(params, frozen, part, jax.random.fold_in(key, index))

        def add(total: Any, index: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, one(index)), None

        total, _ = jax.lax.scan(add, one(0), jnp.arange(1, accumulate))
        return jax.tree.map(lambda leaf: leaf / accumulate, total)

    def step(state: TrainState, frozen: Any, batch: Any, key: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        metrics, grads = (whole if accumulate == 1 else in_parts)(state.params, frozen, batch, key)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay is not None:
            keep = ema_decay(state.step) if callable(ema_decay) else ema_decay
            ema = jax.tree.map(lambda old, new: (old + (1 - keep) * (new - old)).astype(old.dtype), ema, params)
        metrics = {**metrics, "grad_norm": trees.norm(grads)}
        if schedule is not None:
            metrics["learning_rate"] = schedule(state.step)
        return TrainState(state.step + 1, params, opt, ema), metrics

    return step


def rising(decay: float) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
    """Returns the share that an average keeps at each step, min(decay, (1 + step) / (10 + step)).

    The parameters that a network begins with are forgotten at once, where a constant share carries decay^steps of them.
    """
    return lambda step: jnp.minimum(decay, (1 + step) / (10 + step))


def _parts(leaf: Any, count: int) -> Any:
    """Returns [B, ...] as [count, B / count, ...]; every part takes examples from all devices, none has to move."""
    if leaf.ndim == 0:
        return jnp.broadcast_to(leaf, (count,))
    if leaf.shape[0] % count:
        raise UserError(f"accumulate: a batch of {leaf.shape[0]} does not divide into {count} parts; choose a multiple")
    return leaf.reshape(leaf.shape[0] // count, count, *leaf.shape[1:]).swapaxes(0, 1)
