"""What every trainer shares: the settings of its loop, and the loop run on its data."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from fmda.atomic import write_atomic
from fmda.config import FREE, NonNegativeInt, PositiveFloat, PositiveInt, identity, to_dict
from fmda.data.loader import Transform
from fmda.data.streams import Stream, batches
from fmda.mesh import FSDP_RULES, Rule, make_mesh
from fmda.perf.peaks import peak_flops
from fmda.train import TrainState, fit
from fmda.train.step import Step
from fmda.trees import Tree


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Settings of a training loop; a trainer's own configuration adds data, network and losses.

    Attributes:
        steps: optimizer steps of the whole run.
        batch: rows of the loader's source per step, over all devices and processes.
        seed: of the parameters, the order of the data, and every random choice.
        mesh: sizes of the axes data and fsdp; -1 takes the rest of the devices.
        workers: loader processes; 0 loads in threads.
        log_every: steps between lines of metrics.
        save_steps, save_minutes: a checkpoint is due after either.
        tensorboard: write TensorBoard files beside the metrics.
    """

    steps: PositiveInt
    batch: PositiveInt
    seed: NonNegativeInt = 0
    mesh: tuple[int, int] = (-1, 1)
    workers: NonNegativeInt = 0
    log_every: PositiveInt = field(default=25, metadata=FREE)
    save_steps: PositiveInt = field(default=250, metadata=FREE)
    save_minutes: PositiveFloat = field(default=5.0, metadata=FREE)
    tensorboard: bool = field(default=False, metadata=FREE)


def train(
    config: TrainerConfig,
    folder: Path,
    step: Step,
    start: Callable[[Any], TrainState],
    frozen: Any,
    source: Sequence[Any],
    transform: Transform | None,
    *,
    what: str,
    flops_per_row: float,
    rules: Sequence[Rule] = FSDP_RULES,
    rows: int | None = None,
    marks: Mapping[str, Any] | None = None,
    weights: Tree | None = None,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    evaluate_steps: int | Collection[int] | None = None,
    precision: str = "bfloat16",
) -> TrainState:
    """Returns the state after `config.steps`, from `start(key)` or from the last checkpoint in the folder.

    Args:
        config: also what a later run with the same folder must agree with.
        folder: checkpoints and metrics.
        step, start, frozen: as `fmda.train.fit` takes them.
        source, transform: of the `Stream` of the run.
        what: name of the run in the progress line.
        flops_per_row: of one row of a batch, forward and backward.
        rules: how parameters are sharded.
        rows: rows of a batch, where they are not `config.batch`.
        marks: further values that must not change between the parts of a run.
        weights, evaluate, evaluate_steps: as `fmda.train.fit` takes them.
        precision: of the products, "bfloat16" or "float32", for the peak that MFU is told of.
    """
    loader = batches(
        Stream(source, transform, rows or config.batch), config.seed, workers=config.workers,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    with loader:
        return fit(
            step, start, frozen, loader, steps=config.steps, mesh=make_mesh(*config.mesh), rules=rules,
            folder=folder, key=jax.random.key(config.seed), log_every=config.log_every, save_steps=config.save_steps,
            save_minutes=config.save_minutes, evaluate=evaluate, evaluate_steps=evaluate_steps, weights=weights,
            config=identity(config) | dict(marks or {}), tensorboard=config.tensorboard, what=what,
            flops_per_example=flops_per_row, peak_flops=peak_flops(dtype=precision),
        )  # fmt: skip


def write_summary(path: Path, config: TrainerConfig, trained: Path, **more: Any) -> None:
    """Writes {"config", "last", **more}, to lie beside weights: the configuration, and the last line of the metrics."""
    lines = (trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    summary = {"config": to_dict(config), "last": json.loads(lines[-1]), **more}
    write_atomic(path, json.dumps(summary, indent=1) + "\n")
