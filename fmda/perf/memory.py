"""Memory: of a process on the host, of a compiled program, of a device, and of a training state before it exists."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


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


def run_measured(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> Usage:
    """Returns peak memory and time of a command, run to its end with this process's output streams."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "usage"
        between = [sys.executable, "-I", "-S", "-c", _BETWEEN, str(path), *command]
        subprocess.run(between, env=None if env is None else dict(env), check=True)
        code, peak, seconds = path.read_text().split()
    # Linux counts kibibytes, macOS bytes
    return Usage(int(code), int(peak) * (1 if sys.platform == "darwin" else 1024), float(seconds))


def compiled_memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Returns the bytes per device of a compiled program: arguments, outputs, temporaries, reused, code, and the total.

    `reused` are outputs that take the place of donated arguments; they are in the total once. Empty where the backend
    does not tell.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return {}
    parts = {
        "arguments": int(analysis.argument_size_in_bytes),
        "outputs": int(analysis.output_size_in_bytes),
        "temporaries": int(analysis.temp_size_in_bytes),
        "reused": int(analysis.alias_size_in_bytes),
        "code": int(analysis.generated_code_size_in_bytes),
    }
    total = sum(value for name, value in parts.items() if name != "reused") - parts["reused"]
    return {**parts, "total": total}


def device_memory(device: jax.Device | None = None) -> dict[str, int]:
    """Returns `in_use`, `peak` and `limit` in bytes of a device (default: the first); empty where it does not tell."""
    stats = (device or jax.local_devices()[0]).memory_stats() or {}
    names = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use", "limit": "bytes_limit"}
    return {name: int(stats[key]) for name, key in names.items() if key in stats}


def training_bytes(
    trainable: int,
    frozen: int = 0,
    *,
    moments: int = 2,
    ema: bool = True,
    frozen_dtype: Any = "float32",
    shards: int = 1,
) -> int:
    """Returns the bytes per device of a training state, without activations.

    Parameters, gradients, optimizer moments and EMA are float32 and divided over `shards` devices; so are frozen
    parameters, in their own type.
    """
    copies = 2 + moments + int(ema)
    return -(-(4 * copies * trainable + jnp.dtype(frozen_dtype).itemsize * frozen) // shards)
