"""A request to stop, from Ctrl-C or the machine's scheduler, turned into a flag that the loop looks at."""

import signal
import threading
from types import FrameType
from typing import Any


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
