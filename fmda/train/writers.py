"""Where metrics go: a JSON line for each log step, TensorBoard if asked."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fmda.errors import UserError


class Writer(Protocol):
    """Takes scalars by step."""

    def scalars(self, step: int, values: Mapping[str, float], time: Mapping[str, float]) -> None:
        """Writes the values of a step, and how long things took."""
        ...

    def close(self) -> None:
        """Finishes writing."""
        ...


class JsonLines:
    """Appends `{"step": ..., <values>, "time": {...}}` lines to a file; what is not a finite number becomes null.

    Opening it for a run that goes on at `step` first cuts off all lines of later steps, and a half-written last line:
    together with the restored state the file then continues as if nothing had happened. Only the values under "time"
    differ from an unbroken run's.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        kept = [line for line in _lines(path) if _step_of(line) <= step]
        scratch = path.with_name(path.name + ".new")
        scratch.write_text("".join(kept), encoding="utf-8")
        os.replace(scratch, path)
        # Without a buffer a killed process loses nothing, and a full disk is met by the write, not by the close.
        self._file = path.open("ab", buffering=0)

    def scalars(self, step: int, values: Mapping[str, float], time: Mapping[str, float]) -> None:
        """Appends one line."""
        record: dict[str, Any] = {"step": step, **_finite(values)}
        if time:
            record["time"] = _finite(time)
        data = json.dumps(record).encode() + b"\n"
        while data:
            data = data[self._file.write(data) :]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


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


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []


def _step_of(line: str) -> float:
    """Returns the step of a line, infinity for one that was cut off in the middle."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf
