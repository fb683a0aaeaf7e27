"""Metrics on their way from the devices to the run folder, one log step late, so that the loop never waits for them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from fmda.errors import UserError
from fmda.train.checkpoints import disk_errors
from fmda.train.writers import JsonLines, TensorBoard, Writer


class MetricLog:
    """Writes the metrics of a run's folder, on process 0. `loss` is the last one written."""

    def __init__(self, folder: Path, step: int, tensorboard: bool = False) -> None:
        self.loss: float | None = None
        self._folder = folder
        self._pending: tuple[int, Any, Mapping[str, float]] | None = None
        self._writers: list[Writer] = []
        if jax.process_index() == 0:
            with disk_errors(folder):
                self._writers.append(JsonLines(folder / "metrics.jsonl", step))
            if tensorboard:
                self._writers.append(TensorBoard(folder / "tensorboard", step))

    def take(self, step: int, metrics: Any, time: Mapping[str, float]) -> None:
        """Writes the metrics taken before, and keeps these (still on the devices) for the next call."""
        self.flush()
        self._pending = (step, metrics, time)

    def flush(self) -> None:
        """Writes what is pending, once its step is done; raises UserError for a loss that is no number."""
        if self._pending is not None:
            step, metrics, time = self._pending
            self._pending = None
            values = self.check(step, metrics)
            self.loss = values.get("loss")
            self.write(step, values, time)

    def write(self, step: int, values: Mapping[str, float], time: Mapping[str, float] | None = None) -> None:
        """Writes values that are on the host already."""
        with disk_errors(self._folder):
            for writer in self._writers:
                writer.scalars(step, values, time or {})

    def check(self, step: int, metrics: Any) -> dict[str, float]:
        """Returns the metrics as floats; raises UserError when the loss or the gradient is not finite."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values.get(name, 0.0)):
                raise UserError(
                    f"{self._folder}: {name} is {values[name]} at step {step}; lower the learning rate or clip the "
                    "gradient, and start in another work_dir="
                )
        return values

    def close(self) -> None:
        """Closes the files; what is pending and not flushed is dropped."""
        for writer in self._writers:
            writer.close()
