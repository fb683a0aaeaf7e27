"""Times of calls that run asynchronously: waited for at both ends, warm-up left out, spread reported."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated calls.

    Attributes:
        seconds: one value a call, warm-up left out.
        note: what was not real about the call, such as "random weights, noise image".
    """

    seconds: tuple[float, ...]
    note: str = ""

    @property
    def median(self) -> float:
        """Median seconds a call."""
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """Distance between the first and third quartile over the median: 0.1 means +-5 %."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float((high - low) / self.median)

    def to_json(self) -> dict[str, Any]:
        """Returns median, spread, fastest, number of calls and the note."""
        values = {"median_s": self.median, "spread": self.spread, "best_s": min(self.seconds)}
        return {**values, "calls": len(self.seconds), "note": self.note}


def measure(
    function: Callable[..., Any],
    *arguments: Any,
    repeats: int = 10,
    warmup: int = 2,
    note: str = "",
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Returns the times of `function(*arguments)` after `warmup` calls (compilation, caches) that do not count.

    Results may be jax arrays, which are waited for, or anything else. `clock` is for tests.
    """
    return alternate({"": lambda: function(*arguments)}, repeats=repeats, warmup=warmup, note=note, clock=clock)[""]


def alternate(
    calls: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 10,
    warmup: int = 2,
    note: str = "",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Returns the times of several calls made in turn, so that a busy or warming machine strikes all alike.

    The order is reversed in every second round.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}")
    for _ in range(warmup):
        for call in calls.values():
            jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
            begin = clock()
            jax.block_until_ready(calls[name]())
            seconds[name].append(clock() - begin)
    return {name: Timing(tuple(values), note) for name, values in seconds.items()}


def measured_peak(dtype: str = "float32", size: int = 1024, repeats: int = 5) -> float:
    """Returns the FLOP/s that a square matrix product reaches on the first device, the best of `repeats`.

    A stand-in where no data sheet is known, such as on CPUs; say so beside any MFU made with it.
    """
    factor = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), dtype)
    timing = measure(jax.jit(jnp.matmul), factor, factor, repeats=repeats)
    return 2 * size**3 / min(timing.seconds)
