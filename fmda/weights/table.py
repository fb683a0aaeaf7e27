"""The table engine: stored names and arrays -> our parameter tree, and back.

A table is a tuple of rows (stored name, path or paths of our leaves, transform). `{i}`, `{j}` stand for a number and
carry it across, so that a row reads the same in both directions. The engine demands that every stored name matches
exactly one row, that every leaf is filled, and that shapes agree, and reports all faults in one error.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fmda import trees
from fmda.errors import UserError
from fmda.weights.transforms import COPY, Transform

Arrays = Mapping[str, np.ndarray]
Names = Mapping[str, tuple[int, ...]]
"""{stored name: shape}, as far as the header of a file holds them; empty for Flax msgpack."""
_SLOT = re.compile(r"\{(\w)\}")


@dataclass(frozen=True)
class Row:
    """One line of a table. `targets` is empty for names that are known and not wanted, which need not be there."""

    source: str
    targets: tuple[str, ...]
    transform: Transform = COPY


def row(source: str, targets: str | tuple[str, ...], transform: Transform = COPY) -> Row:
    """Returns a row; a single path may be given as a string."""
    return Row(source, (targets,) if isinstance(targets, str) else targets, transform)


def count_numbers(names: Names, prefix: str) -> int:
    """Returns how many different numbers follow a prefix of stored names."""
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})


def drop(source: str) -> Row:
    """Returns a row that accepts a stored name and discards its array."""
    return Row(source, ())


class Export(NamedTuple):
    """The files of a saved network: weights under one name in one layout, and JSON objects by file name."""

    weights: str
    table: "Table"
    objects: Mapping[str, Mapping[str, Any]]


@dataclass
class Faults:
    """Everything that keeps a checkpoint from fitting a model, by kind."""

    missing: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    ambiguous: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Returns one line that lists every fault; empty without any."""
        kinds = {
            "missing": self.missing,
            "not known to the model": self.surplus,
            "matched by several rows": self.ambiguous,
            "of the wrong shape": self.shapes,
        }
        return "; ".join(f"{len(names)} {kind}: {', '.join(names)}" for kind, names in kinds.items() if names)


class Table:
    """Rows compiled for use in both directions; `layout` names their origin."""

    def __init__(self, rows: Iterable[Row], layout: str = "") -> None:
        self.rows, self.layout = tuple(rows), layout
        self._by_source = [(_compiled(row.source), row) for row in self.rows]
        self._by_target = [(_compiled(target), row) for row in self.rows for target in row.targets]

    def read(self, arrays: Arrays, shapes: Mapping[Any, Any], where: str) -> trees.Tree:
        """Returns the tree of NumPy arrays that fills every leaf of `shapes`, in the stored dtypes.

        Leaves of `shapes` need only a `.shape`; `where` names the checkpoint in the error. Raises UserError that lists
        every missing, surplus, ambiguous and misshapen name.
        """
        flat, faults = self.match(arrays, shapes)
        if line := str(faults):
            raise UserError(
                f"{where}: does not fit the configuration beside it; {line}; "
                "take weights and configuration from the same source"
            )
        return trees.unflatten({path: flat[path] for path in trees.flatten(shapes)})

    def match(self, arrays: Arrays, shapes: Mapping[Any, Any]) -> tuple[dict[str, np.ndarray], Faults]:
        """Returns ({path: array} for all that fits, the faults)."""
        leaves = trees.flatten(shapes)
        filled: dict[str, np.ndarray] = {}
        claimed: set[str] = set()
        faults = Faults()
        for name, array in arrays.items():
            matches = _find(self._by_source, name)
            if len(matches) > 1:
                faults.ambiguous.append(name)
                continue
            targets = [_fill(target, numbers) for row, numbers in matches for target in row.targets]
            if not matches or not leaves.keys() >= set(targets):
                faults.surplus.append(name)
            elif not claimed.isdisjoint(targets):
                faults.ambiguous.append(name)
            elif targets:
                claimed.update(targets)
                transform = matches[0][0].transform
                blanks = tuple(np.broadcast_to(np.float32(0), leaves[target].shape) for target in targets)
                expected = transform.inverse(blanks).shape
                if expected == () and array.shape == (1,):
                    array = array[0]
                if array.shape == expected:
                    filled.update(zip(targets, transform.forward(array), strict=True))
                else:
                    faults.shapes.append(f"{name} is {list(array.shape)} but should be {list(expected)}")
        # Several leaves may come from one stored array: each missing name is listed once.
        faults.missing = list(dict.fromkeys(self._source_name(path) for path in leaves if path not in claimed))
        return filled, faults

    def write(self, tree: Mapping[Any, Any]) -> dict[str, np.ndarray]:
        """Returns {stored name: array} of a parameter tree, the inverse of `read`.

        Raises ValueError for a leaf that no row, or more than one row, writes.
        """
        flat = {path: np.asarray(leaf) for path, leaf in trees.flatten(tree).items()}
        arrays: dict[str, np.ndarray] = {}
        for path in flat:
            matches = _find(self._by_target, path)
            if len(matches) != 1:
                raise ValueError(f"leaf '{path}' is written by {len(matches)} rows, not one")
            row, numbers = matches[0]
            name = _fill(row.source, numbers)
            if name not in arrays:
                parts = tuple(flat[_fill(target, numbers)] for target in row.targets)
                arrays[name] = np.array(row.transform.inverse(parts), order="C")
        return arrays

    def _source_name(self, path: str) -> str:
        """Returns the stored name from which the leaf at `path` should have come."""
        names = [_fill(row.source, numbers) for row, numbers in _find(self._by_target, path)]
        return names[0] if names else f"(no row for {path})"


def _compiled(pattern: str) -> re.Pattern[str]:
    """Returns the regular expression of a pattern: slots become named groups of digits, the rest is literal."""
    literals = _SLOT.split(pattern)
    return re.compile("".join(f"(?P<{x}>[0-9]+)" if k % 2 else re.escape(x) for k, x in enumerate(literals)))


def _find(rows: list[tuple[re.Pattern[str], Row]], name: str) -> list[tuple[Row, dict[str, str]]]:
    """Returns [(row, {slot: digits})] of all rows whose pattern is `name` with its slots filled."""
    matches = ((expression.fullmatch(name), row) for expression, row in rows)
    return [(row, match.groupdict()) for match, row in matches if match is not None]


def _fill(pattern: str, numbers: Mapping[str, str]) -> str:
    """Returns the pattern with each slot replaced by its digits."""
    return _SLOT.sub(lambda match: numbers[match.group(1)], pattern)
