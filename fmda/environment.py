"""Settings of the environment: the cache folder, memory on the host, and the devices that jax may use.

Nothing here imports jax before a caller needs it.
"""

import ctypes
import os
import sys
from pathlib import Path

from fmda.config import user_path
from fmda.errors import UserError

LEAST_SECONDS = 0.2
"""Programs that compile faster are not kept."""


def cache_folder() -> Path | None:
    """Returns FMDA_CACHE, else `fmda` in the user's cache folder; None where that is not known (no HOME)."""
    if named := os.environ.get("FMDA_CACHE"):
        return user_path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fmda"
    except RuntimeError:
        return None


def keep_compiled_programs() -> None:
    """Lets jax keep compiled programs in `cache_folder()`, so that a second start does not compile again.

    Without a folder that can be written, jax compiles as usual. JAX_COMPILATION_CACHE_DIR names another folder;
    JAX_ENABLE_COMPILATION_CACHE=false switches the cache off.
    """
    folder = cache_folder()
    if folder is None or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        (folder / "jax").mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(folder / "jax", os.W_OK):
        return
    settings = {
        "jax_compilation_cache_dir": str(folder / "jax"),
        "jax_persistent_cache_min_compile_time_secs": LEAST_SECONDS,
    }
    jax = sys.modules.get("jax")
    for name, value in settings.items():
        # jax reads variables when it is imported, and child processes inherit them
        if os.environ.setdefault(name.upper(), str(value)) == str(value) and jax is not None:
            jax.config.update(name, value)


def keep_freed_memory() -> None:
    """Lets the C library keep what is freed, up to 2 GB, for the next step, where it is glibc.

    It gives large blocks back to the system at once otherwise. A training step on a CPU then spends much of its time on
    page faults, as its buffers of intermediate values are such blocks. The environment's own settings count.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    for option, name in ((-1, "MALLOC_TRIM_THRESHOLD_"), (-3, "MALLOC_MMAP_THRESHOLD_")):
        if name not in os.environ:
            libc.mallopt(option, 2**31 - 1)


def check_precision() -> None:
    """Raises UserError where jax is told to compute in 64 bits, for which no network or random draw here is written."""
    if os.environ.get("JAX_ENABLE_X64", "0").lower() not in ("", "0", "false", "f", "n", "no", "off"):
        raise UserError("JAX_ENABLE_X64: fmda computes in 32 bits; unset the variable")


def platform_fault() -> UserError | None:
    """Returns what is wrong with JAX_PLATFORMS where jax cannot start the devices that it names."""
    platforms = os.environ.get("JAX_PLATFORMS")
    jax = sys.modules.get("jax")
    if not platforms or jax is None:
        return None
    try:
        jax.devices()
    except Exception as fault:  # jax raises errors of several types; each says that the platform is not usable
        reason = " ".join(str(fault).split()) or "no such device was found"
        return UserError(
            f"JAX_PLATFORMS={platforms}: cannot be used on this machine ({reason[:200]}); unset the variable, or set "
            "it to cpu"
        )
    return None
