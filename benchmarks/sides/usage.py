"""Peak memory and time of a command and everything that it starts."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Usage:
    """What a finished process used.

    Attributes:
        returncode: its exit status, negative for the signal that ended it.
        peak_bytes: largest resident memory of the process or of any child it waited for.
        seconds: wall-clock time.
    """

    returncode: int
    peak_bytes: int
    seconds: float


# A forked process starts with the resident memory of its parent on its account, so a small process stands between.
_BETWEEN = """
import os, sys, time
begin = time.perf_counter()
child = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(child, 0)
with open(sys.argv[1], "w") as file:
    print(os.waitstatus_to_exitcode(status), usage.ru_maxrss, time.perf_counter() - begin, file=file)
"""


def run_measured(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, timeout: float | None = None
) -> Usage:
    """Returns peak memory and time of a command, run to its end with this process's output streams.

    Nothing that the command started goes on when `timeout` seconds have passed or the wait is interrupted.

    Raises:
        subprocess.TimeoutExpired: the command took longer than `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "usage"
        between = [sys.executable, "-I", "-S", "-c", _BETWEEN, str(path), *command]
        process = subprocess.Popen(between, env=None if env is None else dict(env))
        try:
            ended = process.wait(timeout)
        finally:
            if process.poll() is None:
                _kill_tree(process.pid)
                process.wait()
        if ended:
            raise subprocess.CalledProcessError(ended, list(command))
        code, peak, seconds = path.read_text().split()
    # Linux counts kibibytes, macOS bytes
    return Usage(int(code), int(peak) * (1 if sys.platform == "darwin" else 1024), float(seconds))


def _kill_tree(root: int, patience: float = 10) -> None:
    """Kills a process and all that descend from it, and waits up to `patience` seconds until they have ended.

    The family is found by its parents: compilers' workers are in sessions of their own, where no signal to a group
    would reach them. All are stopped before the first is killed, so that none is born or adopted meanwhile.
    """
    found: set[int] = set()
    new = {root}
    while new:
        _signal(new, signal.SIGSTOP)
        found |= new
        new = {child for child, parent in _parents().items() if parent in found} - found
    _signal(found, signal.SIGKILL)
    end = time.monotonic() + patience
    while found & _parents().keys() and time.monotonic() < end:
        time.sleep(0.05)


def _signal(processes: set[int], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def _parents() -> dict[int, int]:
    """Returns the parent of every process that has not ended."""
    rows: list[list[str]] = []
    if Path("/proc/self/stat").exists():
        for path in Path("/proc").glob("[0-9]*/stat"):
            # it may have ended since it was listed
            with contextlib.suppress(OSError):
                # number (name, which may hold anything) state parent ...
                state, parent = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
                rows.append([path.parent.name, parent, state])
    else:
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True)
        rows = [line.split() for line in listed.stdout.splitlines()]
    return {int(number): int(parent) for number, parent, state in rows if state[0] not in "ZX"}
