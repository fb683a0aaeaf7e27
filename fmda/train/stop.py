"""When a run stops or saves: signals, the minutes since the last save, the minutes of the whole run."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class Stopped(SystemExit):
    """Raised by the loop after it saved on request; ends the program with 128 + signal number, as shells expect."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


class StopSignals:
    """A context in which SIGTERM and SIGINT set `received` instead of ending the program at once.

    The second signal works as usual again, for those who do not want to wait. Outside the main thread Python allows no
    handlers; the context then does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._before[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        del frame
        self.received = signum
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}


class Watch:
    """Signals and clocks of a running loop. Several processes agree at log steps and act alike.

    Args:
        signals: of this process.
        save_seconds: between checkpoints.
        limit: seconds that training may take in all, or None.
        used: seconds that earlier calls took.
        every: steps between log steps.
        clock: seconds.
    """

    def __init__(
        self,
        signals: StopSignals,
        save_seconds: float,
        limit: float | None,
        used: float,
        every: int,
        clock: Callable[[], float],
    ) -> None:
        self._signals, self._save_seconds, self._every, self._clock = signals, save_seconds, every, clock
        self._limit, self._start, self._saved = limit, clock() - used, clock()
        self.seconds = used

    @property
    def share(self) -> float:
        """Share of the time limit that is used; 0 without a limit. Equal in all processes."""
        return self.seconds / self._limit if self._limit else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the time limit, None without one."""
        return self._limit - self.seconds if self._limit else None

    def saved(self) -> None:
        """Restarts the minutes to the next checkpoint."""
        self._saved = self._clock()

    def after(self, step: int, metrics: Any) -> tuple[int, bool]:
        """Returns (signal number or 0, whether a checkpoint is due) after a step, and updates `seconds`.

        `metrics` are those of the step, which may still run.
        """
        now = self._clock()
        state = (self._signals.received or 0, now - self._saved >= self._save_seconds, now - self._start)
        if jax.process_count() > 1:
            if step % self._every:
                return 0, False
            # on CPUs, two programs that run at once may deadlock in their collectives
            jax.block_until_ready(metrics)
            with jax.transfer_guard("allow"):
                state = multihost_utils.process_allgather(np.asarray(state, np.float32)).max(axis=0)
        self.seconds = float(state[2])
        return int(state[0]), bool(state[1])
