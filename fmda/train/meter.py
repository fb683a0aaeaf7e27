"""How fast a run goes: examples a second, use of the devices, waiting for data, time left."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fmda.progress import duration

WARMUP_STEPS = 2


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
        self._paused = self._run_paused = self._waited = 0.0
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

    def read(self, waited: float = 0.0) -> dict[str, float]:
        """Returns the rates since the last reading and begins anew; `waited` sums all seconds of waiting for batches.

        Keys: `seconds` since the start of this process's run, `examples_per_second` over all devices, `data_wait`
        (share of the time that the host spent waiting for batches, 0 to 1), `mfu` (0 to 1) where it is known.
        """
        now = self._clock()
        elapsed = max(now - self._start - self._paused, 1e-9)
        rate = self._examples / elapsed
        reading = {"seconds": now - self._first, "examples_per_second": rate}
        reading["data_wait"] = min(1.0, (waited - self._waited) / elapsed)
        self._waited = waited
        if self._share is not None:
            reading["mfu"] = rate * self._share
        self._restart()
        return reading

    def seconds_left(self, steps: int) -> float | None:
        """Returns the seconds that `steps` more steps will take, or None before the rate is known."""
        if not self._run_steps:
            return None
        return steps * (self._clock() - self._run_start - self._run_paused) / self._run_steps

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
    if left is not None:
        parts.append(f"ETA {duration(left)}")
    return ", ".join(parts)
