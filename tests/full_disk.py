"""A disk that is full."""

import resource
from contextlib import contextmanager

import jax

LEAST_SECONDS = "jax_persistent_cache_min_compile_time_secs"


@contextmanager
def full_disk(largest):
    """No file can grow past `largest` bytes: the kernel refuses writes, from whatever library, as on a full disk.

    Any user may ask for that, unlike for a small file system of one's own. The compilation cache of the tests lies on
    another disk: programs that are compiled meanwhile are not kept, else torn entries would stay in it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    seconds = getattr(jax.config, LEAST_SECONDS)
    jax.config.update(LEAST_SECONDS, 1e9)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        jax.config.update(LEAST_SECONDS, seconds)
