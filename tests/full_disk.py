"""A disk that is full."""

import resource
from contextlib import contextmanager


@contextmanager
def full_disk(largest):
    """No file can grow past `largest` bytes: the kernel refuses writes, from whatever library, as on a full disk.

    Any user may ask for that, unlike for a small file system of one's own.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
