"""Append-only records of a run: one JSON value a line, safe against a kill at any byte and a full disk."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fmda.atomic import write_atomic
from fmda.errors import UserError


class Journal:
    """A file of JSON lines that one process appends to. A line counts once its line end is on disk.

    Opening cuts off the torn last line that a kill or a full disk left. `rows` are the lines on disk, in order.
    """

    def __init__(self, path: str | Path, keep: Callable[[Any], bool] | None = None) -> None:
        """Opens or creates the file; with `keep`, drops the first row it rejects and all rows after it.

        Raises UserError for a whole line that is not JSON, OSError where the file cannot be read or written.
        """
        self.path = Path(path)
        self.rows, torn = _read(self.path)
        if keep is not None:
            end = next((i for i, row in enumerate(self.rows) if not keep(row)), len(self.rows))
            torn = torn or end < len(self.rows)
            self.rows = self.rows[:end]
        if torn:
            write_atomic(self.path, "".join(_line(row) for row in self.rows))
        self._file: Any = None

    def append(self, *rows: Any) -> None:
        """Writes rows at the end; numbers that are not finite become null. Raises OSError for a full disk."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # unbuffered: a killed process loses nothing, and the write, not the close, meets a full disk
            self._file = self.path.open("ab", buffering=0)
        data = "".join(_line(row) for row in rows).encode()
        while data:
            data = data[self._file.write(data) :]
        self.rows.extend(rows)

    def close(self) -> None:
        """Closes the file; a later `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_rows(path: str | Path, *, finished: bool = False) -> list[Any]:
    """Returns the whole lines of a journal, none for a file that is not there; leaves the file as it is.

    Raises UserError for a whole line that is not JSON, and for a torn last line where the journal has to be `finished`.
    """
    rows, torn = _read(Path(path))
    if finished and torn:
        raise UserError(f"{path}, line {len(rows) + 1}: cut off; finish what was interrupted, or make the folder again")
    return rows


def write_rows(path: str | Path, rows: Iterable[Any]) -> None:
    """Writes a file of JSON lines that appears whole or not at all."""
    write_atomic(Path(path), "".join(_line(row) for row in rows))


def _read(path: Path) -> tuple[list[Any], bool]:
    """Returns (rows, whether a torn line follows them)."""
    if not path.exists():
        return [], False
    *lines, tail = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path}, line {number}: damaged, not JSON; remove the file to start it anew") from None
    return rows, bool(tail)


def _line(row: Any) -> str:
    return json.dumps(_finite(row), ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
