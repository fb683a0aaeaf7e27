"""Files that appear whole or not at all, also on a disk that fills up and in a process that is killed."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fmda.progress import process_index


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a hidden file beside `path` to write to, which takes its place when the context ends.

    If it ends by an exception, such as OSError for a full disk, the hidden file is removed and `path` is as before.
    The processes of one run may write the same file at the same time, if they write the same.
    """
    number = process_index()
    # the suffix stays last: libraries choose a format by it
    part = path.with_name(f".{path.stem}.part{number or ''}{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes text (UTF-8) or bytes so that a reader sees the old file or the new one, never half of it."""
    with replacing(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, as `write_atomic` does."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def occupied(folder: Path) -> bool:
    """Returns whether a folder is there and holds anything but files that a kill left half written."""
    return folder.is_dir() and any(
        not (path.name.startswith(".") and ".part" in path.name) for path in folder.iterdir()
    )


def check_writable(path: Path) -> None:
    """Raises OSError if `path` could not be written later; what is there stays as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    probe = path.with_name(f".{path.name}.probe")
    probe.touch()
    probe.unlink()
    if path.is_dir() or path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(13, "cannot be written", str(path))
