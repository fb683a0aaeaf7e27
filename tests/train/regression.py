"""A small training run shared by the tests: two layers that fit a random linear map, from numbered batches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmda.mesh import LargestAxis, P
from fmda.train import NumberedBatches, OptimConfig, Outcome, TrainState, create_state, make_optimizer, make_step

WIDTH = 16
BATCH = 16
RULES = (("*/up/kernel", P(None, "fsdp")), ("*/down/kernel", P("fsdp", None)), ("*", LargestAxis(min_size=0)))


def batch(number: int, size: int = BATCH) -> dict[str, np.ndarray]:
    """Returns inputs [B, 8] and targets [B, 4] of one number."""
    random = np.random.default_rng(number)
    inputs = random.normal(size=(size, 8)).astype(np.float32)
    weights = np.random.default_rng(99).normal(size=(8, 4)).astype(np.float32)
    return {"inputs": inputs, "targets": inputs @ weights}


def init(key: Any, tx: Any) -> TrainState:
    """Returns the state of the two layers."""
    up, down = jax.random.split(key)
    params = {
        "up": {"kernel": jax.random.normal(up, (8, WIDTH)) / 3, "bias": jnp.zeros((WIDTH,))},
        "down": {"kernel": jax.random.normal(down, (WIDTH, 4)) / 4, "bias": jnp.zeros((4,))},
    }
    return create_state(params, tx)


def objective(params: Any, state: TrainState, frozen: Any, batch: Any, key: Any) -> Outcome:
    """Returns the mean squared error under dropout noise, so that the key matters."""
    hidden = jnp.tanh(batch["inputs"] @ params["up"]["kernel"] + params["up"]["bias"][None])
    hidden = hidden * (1 + 0.1 * jax.random.normal(key, hidden.shape))
    outputs = (hidden @ params["down"]["kernel"] + params["down"]["bias"][None]) * frozen["scale"]
    error = jnp.mean(jnp.square(outputs - batch["targets"]))
    return Outcome(error, {"error": error}, {})


def parts(steps: int) -> dict[str, Any]:
    """Returns what `fit` wants: step, init, frozen, batches."""
    tx = make_optimizer(OptimConfig(learning_rate=0.01, warmup_steps=2, weight_decay=0.01, clip_norm=5.0), steps)
    return {
        "step": make_step(objective, tx, teacher_decay=0.9),
        "init": lambda key: init(key, tx),
        "frozen": {"scale": np.float32(1.5)},
        "batches": NumberedBatches(batch),
    }
