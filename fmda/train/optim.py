"""Optimizers and learning-rate schedules from a configuration."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from fmda import trees
from fmda.config import Decay, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Share
from fmda.errors import UserError, did_you_mean
from fmda.mesh import map_with_paths
from fmda.trees import Tree

Schedule = Callable[[Any], Float[Array, ""]]


@dataclass(frozen=True)
class OptimConfig:
    """An optimizer, its schedule, and what single parameters are exempt from.

    `no_decay` holds globs over parameter paths that take no weight decay. `multipliers` maps globs to factors on the
    learning rate; the first glob that matches a path counts, all other parameters have the factor 1.
    """

    method: Literal["adamw", "sgd"] = "adamw"
    learning_rate: NonNegativeFloat = 1e-3
    schedule: Literal["cosine", "linear", "poly", "step", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    end_factor: Share = 0.0
    """Learning rate at the end, as a share of the highest."""
    power: NonNegativeFloat = 0.9
    """Exponent of the poly schedule."""
    drops: tuple[PositiveInt, ...] = ()
    """Steps at which the step schedule falls to a tenth."""
    weight_decay: NonNegativeFloat = 0.0
    no_decay: tuple[str, ...] = ("*/bias", "*/scale", "*norm*")
    multipliers: dict[str, NonNegativeFloat] = field(default_factory=dict)
    clip_norm: PositiveFloat | None = None
    """Largest global gradient norm; larger gradients are scaled down to it."""
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: PositiveFloat = 1e-8
    momentum: Decay = 0.9


def make_schedule(config: OptimConfig, steps: int) -> Schedule:
    """Returns the learning rate as a function of the position in a run of `steps` updates: finished updates, or more.

    cosine, linear, constant: the warm-up rises linearly and reaches the full rate with update `warmup_steps`; its first
    update already moves. Then the rate falls to `end_factor` of the full one at the end of the run.
    poly, step: as mmcv, counted from step 0: ((1 - t / steps) ** power, or a tenth after each of `drops`) times the
    warm-up factor 1 - (1 - t / warmup_steps) (1 - 1e-6). Raises UserError for a warm-up longer than the run.
    """
    if not 0 <= config.warmup_steps <= steps:
        raise UserError(
            f"optim.warmup_steps: {config.warmup_steps} does not fit into a run of {steps} steps; choose fewer"
        )
    warmup = max(1, config.warmup_steps)
    from_zero = config.schedule in ("poly", "step")
    begin = 0 if from_zero else config.warmup_steps
    span = max(1, steps - begin)

    def schedule(position: Any) -> Float[Array, ""]:
        done = jnp.asarray(position, jnp.float32)
        left = 1.0 - jnp.clip((done - begin) / span, 0.0, 1.0)
        shapes = {
            "cosine": 0.5 - 0.5 * jnp.cos(jnp.pi * left),
            "linear": left,
            "poly": left**config.power,
            "step": jnp.asarray(0.1) ** sum((done >= drop).astype(jnp.float32) for drop in config.drops),
            "constant": jnp.ones_like(left),
        }
        decay = config.end_factor + (1.0 - config.end_factor) * shapes[config.schedule]
        rise = (done + 1.0) / warmup
        if from_zero:
            rise = jnp.where(done < config.warmup_steps, 1e-6 + (1.0 - 1e-6) * done / warmup, 1.0)
        return jnp.asarray(config.learning_rate, jnp.float32) * jnp.minimum(1.0, rise) * decay

    return schedule


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Returns the optax chain: clip, moments, weight decay, multipliers, schedule. Its `update` takes `position=`.

    AdamW decays apart from the moments (Loshchilov and Hutter, 2019); SGD adds the decay to the gradient before the
    momentum, as its users expect. Its `init` raises UserError for a multiplier whose glob matches no parameter.
    """
    decay = optax.add_decayed_weights(config.weight_decay, mask=lambda params: _decayed(params, config.no_decay))
    if config.method == "adamw":
        core = [optax.scale_by_adam(config.b1, config.b2, config.eps), decay]
    else:
        core = [decay, optax.trace(config.momentum)]
    clip = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    multiply = [_multiplied(config.multipliers)] if config.multipliers else []
    return optax.chain(*clip, *core, *multiply, _scaled(make_schedule(config, steps)))


def _scaled(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """Returns the stateless transformation that multiplies updates by minus the rate at `position`."""

    def update(updates: Tree, state: Any, params: Tree | None = None, *, position: Any, **_: Any) -> tuple[Tree, Any]:
        del params
        rate = schedule(position)
        return jax.tree.map(lambda leaf: -jnp.asarray(rate, leaf.dtype) * leaf, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _decayed(params: Tree, no_decay: tuple[str, ...]) -> Tree:
    """Returns a tree of booleans: whether weight decay acts on the leaf."""
    return map_with_paths(lambda path, _: not any(trees.matches(path, p) for p in no_decay), params)


def _multiplied(multipliers: dict[str, float]) -> optax.GradientTransformation:
    """Returns the stateless transformation that scales each leaf by the factor of the first glob matching its path."""

    def factor(path: str) -> float:
        return next((value for glob, value in multipliers.items() if trees.matches(path, glob)), 1.0)

    def init(params: Tree) -> optax.EmptyState:
        paths = trees.leaf_paths(params)
        for glob in multipliers:
            if not any(trees.matches(path, glob) for path in paths):
                raise UserError(f"optim.multipliers: '{glob}' matches no parameter{did_you_mean(glob, paths)}")
        return optax.EmptyState()

    def update(updates: Tree, state: optax.EmptyState, params: Tree | None = None) -> tuple[Tree, optax.EmptyState]:
        del params
        return map_with_paths(lambda path, leaf: leaf * jnp.asarray(factor(path), leaf.dtype), updates), state

    return optax.GradientTransformation(init, update)
