"""Embeddings on disk: files named by their contents' hash, the least recently used ones deleted beyond a size."""

import contextlib
import os
import threading
from pathlib import Path

import numpy as np
from jaxtyping import Float

from fmda.atomic import replacing
from fmda.errors import disk_errors


class EmbeddingCache:
    """A folder of arrays by key, at most `most_bytes` in all. Threads of one process may share it."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self._lock = threading.Lock()

    def get(self, key: str) -> Float[np.ndarray, "k c h w"] | None:
        """Returns the array of a key; None where there is none, or its file is damaged."""
        path = self._path(key)
        try:
            array = np.load(path, allow_pickle=False)
            os.utime(path)
        except (OSError, ValueError, EOFError):
            return None
        return array

    def put(self, key: str, array: Float[np.ndarray, "k c h w"]) -> None:
        """Writes an array, then deletes the least recently used ones. Raises UserError for a full disk."""
        with self._lock, disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self._path(key)) as part:
                np.save(part, array)
            files = {path: path.stat() for path in self.folder.glob("[!.]*.npy")}
            size = sum(facts.st_size for facts in files.values())
            for path in sorted(files, key=lambda path: files[path].st_mtime_ns):
                if size <= self.most_bytes or path == self._path(key):
                    break
                # another process may have deleted it
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
                size -= files[path].st_size

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.npy"
