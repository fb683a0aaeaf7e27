"""An alarm for classes that the teacher of a self-training run no longer labels any pixel as."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmda.evaluate.sections import Cell, Section, Table
from fmda.progress import note

DEAD = 1e-5
"""A class with a smaller share of the pixels is dead: five pixels of a batch of two crops of 512^2."""

TEXT = """\
The teacher labels fewer than one in 100,000 pixels of the target as these classes, so the student learns them from the
source alone. Compare other seeds, and sample rare classes of the source more often.
"""


@dataclass(frozen=True)
class DeadClasses:
    """Counts classes without pseudo-labels during training, for `fmda.train.task`, and warns with a line of progress.

    Attributes:
        name: of the evaluation; scores are logged as `<name>/<score>`.
        every: steps between evaluations; 0 evaluates at the end only.
        classes: names.
        shares: training state -> share of the target pixels that the teacher gives to each class, a running mean.
    """

    name: str
    every: int
    classes: Sequence[str]
    shares: Callable[[Any], Any]

    def run(self, state: Any) -> Iterator[tuple[str, float]]:
        """Yields "dead", the number of classes whose share is below `DEAD`, and "share/<class>" of every class."""
        shares = np.asarray(self.shares(state), np.float64)
        dead = [name for name, share in zip(self.classes, shares, strict=True) if share < DEAD]
        if dead:
            note(f"warning: {self.name}: classes without pseudo-labels: {', '.join(dead)}")
        yield "dead", len(dead)
        for name, share in zip(self.classes, shares, strict=True):
            yield f"share/{name}", float(share)


def dead_class_sections(rows: Sequence[Mapping[str, float]]) -> list[Section]:
    """Returns a section of a report for each evaluation of a training log that ends with dead classes.

    Args:
        rows: scores by name and "step", one row a step, in order.
    """
    sections = []
    for count in dict.fromkeys(name for row in rows for name in row if name.endswith("/dead")):
        known = [row for row in rows if count in row]
        prefix = f"{count.removesuffix('dead')}share/"
        dead = _dead(known[-1], prefix)
        cells: list[tuple[Cell, ...]] = []
        for key in dead:
            alive = [k for k, row in enumerate(known) if row.get(key, 0.0) >= DEAD]
            first = known[alive[-1] + 1 if alive else 0]
            cells.append((key.removeprefix(prefix), int(first["step"]), known[-1][key]))
        if cells:
            table = Table(("class", "dead since step", "share at the end"), tuple(cells))
            sections.append(Section("Warning: dead classes", TEXT, table))
    return sections


def dead_classes(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Returns the classes that a training log ends with as dead, whoever labels them."""
    counts = dict.fromkeys(name for row in rows for name in row if name.endswith("/dead"))
    names: dict[str, None] = {}
    for count in counts:
        prefix, last = f"{count.removesuffix('dead')}share/", next(row for row in reversed(rows) if count in row)
        names |= dict.fromkeys(key.removeprefix(prefix) for key in _dead(last, prefix))
    return list(names)


def _dead(row: Mapping[str, float], prefix: str) -> list[str]:
    return [key for key in row if key.startswith(prefix) and row[key] < DEAD]
