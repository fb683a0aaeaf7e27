"""Which checkpoint a score without labels would choose, and how well it orders the checkpoints of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fmda.evaluate.label_free import LabelFree
from fmda.evaluate.sections import Section, Table

LAST, ORACLE = "last", "oracle"

TEXT = """\
Scores that need no labels, over the evaluations of {where}: Spearman's rank correlation with the true {truth} (1 is the
same order), and the evaluation that each would choose, beside the last and the best one, which only labels can name.
"""


@dataclass(frozen=True)
class Choice:
    """What one score makes of the evaluations of a run.

    Attributes:
        score: its name in the log; "last" and "oracle" for the last and the best evaluation by the true score.
        correlation: Spearman's rank correlation with the true score, larger is better; NaN for "last" and "oracle",
            below three evaluations, and where nothing varies.
        evaluations: with both scores.
        step: of the largest score, the earliest among equals.
        truth: the true score there.
    """

    score: str
    correlation: float
    evaluations: int
    step: int
    truth: float


def spearman(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Returns Spearman's rank correlation, -1..1; NaN for fewer than three pairs, or where nothing varies."""
    from scipy.stats import spearmanr  # slow to import

    if len(a) < 3 or not (np.ptp(a) > 0 and np.ptp(b) > 0):
        return float("nan")
    return float(spearmanr(a, b).statistic)


def checkpoint_choices(rows: Sequence[Mapping[str, float]], truth: str) -> list[Choice]:
    """Returns what each score of `LabelFree` would choose, the best correlation first, then "last" and "oracle".

    Args:
        rows: scores by name and "step", one row a step, in order.
        truth: name of the true score, such as "val/miou"; the larger, the better.
    """
    names = dict.fromkeys(name for row in rows for name in row if name.rpartition("/")[2] in LabelFree._fields)
    known = [row for row in rows if truth in row]
    choices = []
    for name in names:
        both = [row for row in known if name in row]
        if both:
            best = max(both, key=lambda row: row[name])
            correlation = spearman([row[name] for row in both], [row[truth] for row in both])
            choices.append(Choice(name, correlation, len(both), int(best["step"]), best[truth]))
    choices.sort(key=lambda choice: -np.nan_to_num(choice.correlation, nan=-2.0))
    if choices:
        for name, row in ((LAST, known[-1]), (ORACLE, max(known, key=lambda row: row[truth]))):
            choices.append(Choice(name, float("nan"), len(known), int(row["step"]), row[truth]))
    return choices


def choice_sections(rows: Sequence[Mapping[str, float]], where: str) -> list[Section]:
    """Returns a section of a report for each true mIoU of a training log that has scores without labels too."""
    sections = []
    for truth in dict.fromkeys(name for row in rows for name in row if name.endswith("/miou")):
        if choices := checkpoint_choices(rows, truth):
            columns = ("score", "rank correlation", "evaluations", "chosen step", f"{truth} there, %")
            cells = tuple((c.score, c.correlation, c.evaluations, c.step, round(100 * c.truth, 2)) for c in choices)
            text = TEXT.format(where=where or "the run", truth=truth)
            sections.append(Section("Checkpoint choice without labels", text, Table(columns, cells)))
    return sections
