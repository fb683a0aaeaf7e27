"""One JSON object per benchmark: what ran, where, with which versions, and what came out."""

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from fmda.atomic import write_atomic
from fmda.errors import UserError

PLACES = ("--out", "--work")
PACKAGES = ("fmda", "jax", "jaxlib", "flax", "numpy", "torch", "transformers", "diffusers", "grain")


def record(name: str, **values: Any) -> dict[str, Any]:
    """Returns {"name", "command", "device", "versions", "cores", **values} of the running benchmark.

    "command" begins with XLA_FLAGS where they are set.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    said = [f"XLA_FLAGS='{flags}'"] if flags else []
    return {
        "name": name,
        "command": " ".join([*said, f"python benchmarks/{Path(sys.argv[0]).name}", *_said(sys.argv[1:])]),
        "device": device_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions(),
        **values,
    }


def _said(arguments: list[str]) -> list[str]:
    """Returns the arguments without the places of this machine's files."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument not in PLACES:
            kept.append(argument)
        skip = argument in PLACES
    return kept


def write_record(values: dict[str, Any], out: str | Path | None = None) -> None:
    """Prints a record as JSON and, with `out`, writes it there too.

    Raises:
        UserError: `out` cannot be written.
    """
    text = json.dumps(values, indent=1)
    print(text)
    if out is None:
        return
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(out), text + "\n")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the installed packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name() -> str:
    """Returns the kind of jax's first device; for a CPU also the processor's own name where the system tells it."""
    import jax

    kind = jax.devices()[0].device_kind
    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} x {kind}"
    return f"cpu: {_processor() or kind}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
