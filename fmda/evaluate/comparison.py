"""A comparison of methods on targets: mean and range over seeds, gain over a baseline, as JSON, Markdown and a section.

A comparison may be partial: cells without a score are gaps, and a cell of fewer seeds says how many it has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fmda.evaluate.sections import Section, Table
from fmda.progress import duration

GAP = "–"
MARK = "†"


@dataclass(frozen=True)
class Outcome:
    """One training, scored on one target.

    Attributes:
        miou: its score, 0..1.
        seconds: wall time of the training.
        dead: classes without pseudo-labels at its end.
    """

    miou: float
    seconds: float
    dead: tuple[str, ...] = ()


@dataclass(frozen=True)
class Summary:
    """A method on a target, over seeds.

    Attributes:
        miou: by seed, 0..1.
        mean, least, most: of these.
        gain: mean difference to the baseline over the seeds that both have; None for the baseline, and without one.
        seconds: mean wall time of a training.
        dead: number of seeds in which a class ended without pseudo-labels, by class.
    """

    miou: dict[int, float]
    mean: float
    least: float
    most: float
    gain: float | None
    seconds: float
    dead: dict[str, int]


@dataclass(frozen=True)
class Comparison:
    """The scores of methods (rows) on targets (columns).

    Attributes:
        rows, columns, seeds: in order.
        baseline: the row that gains are measured from.
        outcomes: by (row, column, seed); any may be missing.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    seeds: Sequence[int]
    baseline: str
    outcomes: Mapping[tuple[str, str, int], Outcome]

    def summary(self, row: str, column: str) -> Summary | None:
        """Returns a cell; None where no seed has a score."""
        outcomes = {seed: self.outcomes[row, column, seed] for seed in self._known(row, column)}
        if not outcomes:
            return None
        scores = {seed: outcome.miou for seed, outcome in outcomes.items()}
        both = [seed for seed in self._known(self.baseline, column) if seed in scores and row != self.baseline]
        gains = [scores[seed] - self.outcomes[self.baseline, column, seed].miou for seed in both]
        dead = [name for outcome in outcomes.values() for name in outcome.dead]
        return Summary(
            miou=scores,
            mean=_mean(scores.values()),
            least=min(scores.values()),
            most=max(scores.values()),
            gain=_mean(gains) if gains else None,
            seconds=_mean(outcome.seconds for outcome in outcomes.values()),
            dead={name: dead.count(name) for name in sorted(set(dead))},
        )

    def to_json(self) -> dict[str, Any]:
        """Returns plain values: rows, columns, seeds, baseline, and the cells by row and column, null for gaps."""
        cells = {row: {column: self._plain(row, column) for column in self.columns} for row in self.rows}
        facts = {"rows": list(self.rows), "columns": list(self.columns), "seeds": list(self.seeds)}
        return facts | {"baseline": self.baseline, "cells": cells}

    def markdown(self) -> str:
        """Returns a Markdown table and what its numbers mean."""
        table = self._table()
        lines = [table.columns, ["---"] * len(table.columns), *table.rows]
        text = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
        return f"{text}\n\n{self._text()}\n"

    def section(self) -> Section:
        """Returns the table as a section of a report."""
        return Section("Comparison", self._text(), self._table())

    def _known(self, row: str, column: str) -> list[int]:
        return [seed for seed in self.seeds if (row, column, seed) in self.outcomes]

    def _plain(self, row: str, column: str) -> dict[str, Any] | None:
        summary = self.summary(row, column)
        return None if summary is None else asdict(summary)

    def _table(self) -> Table:
        rows = []
        for row in self.rows:
            cells = [self.summary(row, column) for column in self.columns]
            seconds = [cell.seconds for cell in cells if cell]
            time = duration(_mean(seconds)) if seconds else GAP
            rows.append((row, *(self._cell(cell) for cell in cells), time))
        return Table(("method", *self.columns, "one training"), tuple(rows))

    def _cell(self, summary: Summary | None) -> str:
        if summary is None:
            return GAP
        count, parts = len(summary.miou), []
        if count > 1:
            parts.append(f"{100 * summary.least:.1f}–{100 * summary.most:.1f}")
        if count < len(self.seeds):
            parts.append(f"{count} of {len(self.seeds)} seeds")
        text = f"{100 * summary.mean:.1f}" + (f" ({', '.join(parts)})" if parts else "")
        if summary.gain is not None:
            text += f" {100 * summary.gain:+.1f}".replace("-", "−")
        return f"{text} {MARK}" if summary.dead else text

    def _text(self) -> str:
        seeds = ", ".join(map(str, self.seeds))
        paragraphs = [
            f"mIoU in percent: mean (range) over the seeds {seeds}, and the mean gain over '{self.baseline}' of the "
            "same seeds. The last column is the mean wall time of one training."
        ]
        marked = []
        for row in self.rows:
            for column in self.columns:
                summary = self.summary(row, column)
                if summary and summary.dead:
                    count = len(summary.miou)
                    names = [name if n == count else f"{name} ({n} of {count})" for name, n in summary.dead.items()]
                    marked.append(f"{row}, {column}: {', '.join(names)}.")
        if marked:
            paragraphs.append(
                f"{MARK} Classes without pseudo-labels at the end; in brackets the number of seeds, where not all:"
            )
        return "\n\n".join([*paragraphs, *marked])


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)
