"""Metrics of a run, fetched from the devices one log step late so that the loop never waits for them; its speed."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from fmda.errors import UserError, disk_errors
from fmda.progress import duration
from fmda.runs.journal import Journal, read_rows
from fmda.train.checkpoints import METRICS

WARMUP_STEPS = 2


class MetricLog:
    """Writes the metrics of a run folder, on process 0: lines {"step", <values>, "time": {...}} in `metrics.jsonl`.

    Training lines hold "loss", those of evaluations only their scores. Only the values under "time" differ from those
    of an unbroken run: lines later than `step`, at which a run resumes, are cut off.

    Attributes:
        loss: the last one written.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool = False) -> None:
        self.loss: float | None = None
        self._folder = folder
        self._pending: tuple[int, Any, Mapping[str, float]] | None = None
        self._journal: Journal | None = None
        self._board: TensorBoard | None = None
        if jax.process_index() == 0:
            with disk_errors(folder):
                self._journal = Journal(folder / METRICS, keep=lambda row: row["step"] <= step)
            if tensorboard:
                self._board = TensorBoard(folder / "tensorboard", step)

    def take(self, step: int, metrics: Any, time: Mapping[str, float]) -> None:
        """Writes the metrics taken before, and keeps these (still on the devices) for the next call."""
        self.flush()
        self._pending = (step, metrics, time)

    def flush(self) -> None:
        """Writes what is pending, once its step is done; raises UserError for a non-finite loss."""
        if self._pending is not None:
            step, metrics, time = self._pending
            self._pending = None
            values = self.check(step, metrics)
            self.loss = values.get("loss")
            self.write(step, values, time)

    def write(self, step: int, values: Mapping[str, float], time: Mapping[str, float] | None = None) -> None:
        """Writes values that are on the host already."""
        with disk_errors(self._folder):
            if self._journal:
                self._journal.append({"step": step, **values, **({"time": dict(time)} if time else {})})
            if self._board:
                self._board.scalars(step, values, time or {})

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
        for writer in (self._journal, self._board):
            if writer:
                writer.close()


def last_metrics(folder: Path) -> dict[str, Any]:
    """Returns the last training line of a run folder; {} where there is none."""
    return next((row for row in reversed(read_rows(folder / METRICS)) if "loss" in row), {})


class TensorBoard:
    """Writes event files for TensorBoard through tensorboardX. Events later than `step` are marked as void.

    Raises UserError when tensorboardX is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError("tensorboard: tensorboardX is not installed; run `pip install tensorboardX`") from None
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float], time: Mapping[str, float]) -> None:
        """Adds one point for each value; times come under `time/`."""
        for name, value in {**values, **{f"time/{name}": value for name, value in time.items()}}.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is left and closes."""
        self._writer.close()


class Meter:
    """Rates over the steps since the last reading, and over the run. Pauses and the first two steps are left out.

    `flops_per_example` is the model's own work for one example (forward and backward), `peak_flops` what all devices
    together could do in a second; without either there is no MFU.
    """

    def __init__(
        self,
        flops_per_example: float | None = None,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._share = flops_per_example / peak_flops if flops_per_example and peak_flops else None
        self._start = self._run_start = self._first = clock()
        self._paused = self._run_paused = self._waited = self._idle = 0.0
        self._steps = self._run_steps = self._examples = 0
        self._warm = False

    def count(self, examples: int) -> None:
        """Notes one more step over this many examples."""
        self._steps += 1
        self._run_steps += 1
        self._examples += examples
        if not self._warm and self._steps == WARMUP_STEPS:
            self._warm = True
            self._restart()
            self._run_start, self._run_paused, self._run_steps = self._start, 0.0, 0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves out what happens inside: evaluation, saving."""
        start = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - start
            self._paused += seconds
            self._run_paused += seconds

    def read(self, waited: float = 0.0, idle: float | None = None) -> dict[str, float]:
        """Returns the rates since the last reading and begins anew.

        Keys: `seconds` since the start of this process's run, `examples_per_second` over all devices, `data_wait`
        (share of the time that the host spent waiting for batches, 0 to 1), `mfu` (0 to 1) where it is known,
        `label_wait` (share of the time that the devices spent waiting for labels) where `idle` is given.

        Args:
            waited: all seconds for which the host waited for batches.
            idle: all seconds for which the devices waited for labels.
        """
        now = self._clock()
        elapsed = max(now - self._start - self._paused, 1e-9)
        rate = self._examples / elapsed
        reading = {"seconds": now - self._first, "examples_per_second": rate}
        reading["data_wait"] = min(1.0, (waited - self._waited) / elapsed)
        self._waited = waited
        if idle is not None:
            reading["label_wait"] = min(1.0, (idle - self._idle) / elapsed)
            self._idle = idle
        if self._share is not None:
            reading["mfu"] = rate * self._share
        self._restart()
        return reading

    def seconds_left(self, steps: int, limit: float | None = None) -> float | None:
        """Returns the seconds, at most `limit`, that `steps` more steps will take; None before the rate is known.

        Compilation does not count: the clock starts after it, and the first steps are left out.
        """
        if not self._run_steps:
            return limit
        seconds = steps * (self._clock() - self._run_start - self._run_paused) / self._run_steps
        return seconds if limit is None else min(seconds, limit)

    def _restart(self) -> None:
        self._start = self._clock()
        self._paused = 0.0
        self._steps = self._examples = 0


def status(what: str, step: int, steps: int, loss: float | None, reading: dict[str, float], left: float | None) -> str:
    """Returns the progress line, such as "train: step 120/1000, loss 0.432, 512.3 images/s, data wait 3%, ETA 2:03"."""
    parts = [f"{what}: step {step}/{steps}"]
    if loss is not None:
        parts.append(f"loss {loss:.4g}")
    if reading.get("examples_per_second"):
        parts.append(f"{reading['examples_per_second']:.1f} images/s")
    if "mfu" in reading:
        parts.append(f"MFU {reading['mfu']:.1%}")
    if "data_wait" in reading:
        parts.append(f"data wait {reading['data_wait']:.0%}")
    if "label_wait" in reading:
        parts.append(f"label wait {reading['label_wait']:.0%}")
    if left is not None:
        parts.append(f"ETA {duration(left)}")
    return ", ".join(parts)
