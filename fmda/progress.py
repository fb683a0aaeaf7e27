"""One line of progress on standard error: live on a terminal, a plain line every ten seconds elsewhere.

Standard output is left to results. With several processes only the first one writes. Nothing here imports jax.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TextIO, TypeVar

Item = TypeVar("Item")

PLAIN_SECONDS = 10.0
LIVE_SECONDS = 0.1
CLEAR = "\r\x1b[2K"
"""Control codes of a terminal: back to the start of the line, and erase it."""

_open_lines: list["Line"] = []


def process_index() -> int:
    """Returns this process's number, 0 when it is alone. Never starts a jax backend before its time."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        return jax.process_index()
    return int(os.environ.get("FMDA_PROCESS", "0"))


def duration(seconds: float) -> str:
    """Returns seconds as "m:ss" or "h:mm:ss"."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


class Line:
    """The single live line of a running task. Use it as a context manager, or call `close`.

    On a terminal the text is redrawn in place. Elsewhere it is printed when ten seconds have passed since the last
    print, and once more at the end. Lines may nest: the inner one is shown until it closes.
    """

    def __init__(self, *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._silent = process_index() != 0
        self._terminal = self._stream.isatty()
        self._text = ""
        self._shown = ""
        self._live = False
        self._last = clock()
        if _open_lines:
            _open_lines[-1]._end()
        _open_lines.append(self)

    def __enter__(self) -> "Line":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, text: str, live_only: bool = False) -> None:
        """Sets the text, and shows it when it is time to; with `live_only` on a terminal alone."""
        if live_only and not self._terminal:
            return
        self._text = text
        pause = LIVE_SECONDS if self._terminal and self._shown else 0.0 if self._terminal else PLAIN_SECONDS
        if self._clock() - self._last >= pause and _open_lines[-1:] == [self]:
            self._show()

    def note(self, text: str) -> None:
        """Prints a line that stays, above the live one."""
        if not self._silent:
            print(f"{CLEAR if self._live else ''}{text}", file=self._stream, flush=True)
            if self._live:
                self._show()

    def close(self) -> None:
        """Shows the last text if it was not shown yet, and gives the line back. A second call does nothing."""
        if self not in _open_lines:
            return
        if self._text != self._shown:
            self._show()
        self._end()
        _open_lines.remove(self)

    def _show(self) -> None:
        self._shown, self._last = self._text, self._clock()
        if self._silent:
            return
        if self._terminal:
            self._live = True
            text = self._text[: shutil.get_terminal_size().columns - 1]
            print(f"{CLEAR}{text}", end="", file=self._stream, flush=True)
        else:
            print(self._text, file=self._stream, flush=True)

    def _end(self) -> None:
        """Leaves the line on a terminal as it is; the next output begins below it."""
        if self._live:
            print(file=self._stream, flush=True)
            self._live = False


def note(text: str) -> None:
    """Prints a line that stays, above the live one where a task is running."""
    with Line() as line:
        line.note(text)


BURST = 0.1
"""Seconds within which the items of one batch arrive; they say nothing of the rate."""


def track(
    items: Iterable[Item],
    what: str,
    total: int | None = None,
    unit: str = "images",
    *,
    more: Callable[[], str] = str,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Item]:
    """Yields the items, and shows how many are done, how fast, and how long the rest will take.

    `what` names the task ("rank camvid"). `total` defaults to `len(items)` where that exists; without it there is no
    ETA. The rate leaves out the first item, which pays for compilation. `more` returns what else the line shows, such
    as "3 refused". `stream` and `clock` (seconds) are for tests.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    start = clock()
    done, first = 0, 0.0
    with Line(stream=stream, clock=clock) as line:
        line.update(f"{what}: starting", live_only=True)
        for item in items:
            yield item
            done += 1
            now = clock()
            if done == 1:
                first = now
            rate = (done - 1) / (now - first) if now - first >= BURST else 0.0
            line.update(_status(what, done, total, unit, more(), rate, now - start))


def _status(what: str, done: int, total: int | None, unit: str, more: str, rate: float, seconds: float) -> str:
    """Returns "rank camvid: 120/500 images, 24.0 images/s, ETA 0:16"."""
    parts = [f"{what}: {done}" + (f"/{total}" if total is not None else "") + f" {unit}", *([more] if more else [])]
    if rate:
        parts.append(f"{rate:.1f} {unit}/s")
    if total is not None and rate and done < total:
        parts.append(f"ETA {duration((total - done) / rate)}")
    elif done == total:
        parts.append(f"in {duration(seconds)}")
    return ", ".join(parts)
