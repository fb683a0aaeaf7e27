"""A small training run shared by the tests: two layers that fit a random linear map, from numbered batches."""

import dataclasses
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmda.data.streams import Stream
from fmda.mesh import LargestAxis, P, make_mesh
from fmda.train import OptimConfig, Outcome, Task, TrainerConfig, TrainState
from fmda.train.loop import fit

WIDTH = 16
BATCH = 16
RULES = (("*/up/kernel", P(None, "fsdp")), ("*/down/kernel", P("fsdp", None)), ("*", LargestAxis(min_size=0)))


def batch(number: int, size: int = BATCH) -> dict[str, np.ndarray]:
    """Returns inputs [B, 8] and targets [B, 4] of one number."""
    random = np.random.default_rng(number)
    inputs = random.normal(size=(size, 8)).astype(np.float32)
    weights = np.random.default_rng(99).normal(size=(8, 4)).astype(np.float32)
    return {"inputs": inputs, "targets": inputs @ weights}


class NumberedBatches:
    """A loader whose batches are made by a function of their number 0, 1, 2, ..."""

    def __init__(self, make_batch: Callable[[int], Any]) -> None:
        self._make_batch = make_batch
        self._next = 0

    def __next__(self) -> Any:
        batch = self._make_batch(self._next)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Returns the number of the next batch."""
        return {"next": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a batch."""
        self._next = state["next"]


def init(key: Any) -> Any:
    """Returns the parameters of the two layers."""
    up, down = jax.random.split(key)
    return {
        "up": {"kernel": jax.random.normal(up, (8, WIDTH)) / 3, "bias": jnp.zeros((WIDTH,))},
        "down": {"kernel": jax.random.normal(down, (WIDTH, 4)) / 4, "bias": jnp.zeros((4,))},
    }


def objective(params: Any, state: TrainState, frozen: Any, batch: Any, key: Any) -> Outcome:
    """Returns the mean squared error under dropout noise, so that the key matters."""
    hidden = jnp.tanh(batch["inputs"] @ params["up"]["kernel"] + params["up"]["bias"][None])
    hidden = hidden * (1 + 0.1 * jax.random.normal(key, hidden.shape))
    outputs = (hidden @ params["down"]["kernel"] + params["down"]["bias"][None]) * frozen["scale"]
    error = jnp.mean(jnp.square(outputs - batch["targets"]))
    return Outcome(error, {"error": error}, {})


OPTIM = OptimConfig(learning_rate=0.01, warmup_steps=2, weight_decay=0.01, clip_norm=5.0)


def task(**changes: Any) -> Task:
    """Returns the training task; its batches come from a loader, or from the stream of numbers 0 to 15."""
    stream = Stream([batch(number, 1) for number in range(16)], take_row, BATCH)
    pieces = {
        "name": "train", "objective": objective, "init": init, "optim": OPTIM, "streams": stream,
        "frozen": {"scale": np.float32(1.5)}, "teacher_decay": 0.9, "rules": RULES,
    }  # fmt: skip
    return Task(**{**pieces, **changes})


def take_row(example: Any, rng: np.random.Generator) -> Any:
    """Returns the only row of a batch of one."""
    return {name: leaf[0] for name, leaf in example.items()}


def stopping(step: int) -> NumberedBatches:
    """Returns a loader that asks the program to stop during a step."""

    def make_batch(number: int) -> Any:
        if number == step:
            signal.raise_signal(signal.SIGTERM)
        return batch(number)

    return NumberedBatches(make_batch)


def settings(steps: int = 10, **changes: Any) -> TrainerConfig:
    """Returns the settings of a run."""
    return TrainerConfig(**{"steps": steps, "batch": BATCH, "log_every": 2, **changes})


def run(
    folder: Any, steps: int = 10, *, mesh: Any = None, loader: Any = None, clock: Any = time.monotonic, **changes: Any
) -> TrainState:
    """Returns the state of a run on numbered batches, on one device; `changes` are of the task or of the settings."""
    names = {field.name for field in dataclasses.fields(TrainerConfig)}
    of_settings = {name: changes.pop(name) for name in list(changes) if name in names}
    loader = loader or NumberedBatches(batch)
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    return fit(task(**changes), settings(steps, **of_settings), folder, loader, mesh, clock)
