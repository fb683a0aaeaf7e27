"""When to stop a personalisation: the rule that picks a step from curves of alignment, diversity and coverage."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from fmda.errors import UserError

LEAST_GAIN = 0.02
"""Share of the distance at step 0 that counts as learned."""

TOLERANCE = 0.05
"""Share of the best score that an earlier step may lack."""


@dataclass(frozen=True, eq=False)
class Choice:
    """The step a personalisation should have stopped at, and why.

    Attributes:
        step: the chosen one.
        score: float64[S], gain times kept diversity, in units of the alignment distance.
        gain: float64[S], share of the distance at step 0 that is gone; negative where it has grown.
        kept: float64[S], share of the diversity at step 0 that is left, 0..1.
        admitted: bool[S], steps whose coverage is above the floor, up to one standard error.
        reason: one line for a report.
    """

    step: int
    score: Float[np.ndarray, " S"]
    gain: Float[np.ndarray, " S"]
    kept: Float[np.ndarray, " S"]
    admitted: Bool[np.ndarray, " S"]
    reason: str


def choose_step(
    steps: Sequence[int],
    alignment: Sequence[float],
    diversity: Sequence[float],
    coverage: Sequence[float] | None = None,
    *,
    alignment_error: Sequence[float] | None = None,
    diversity_error: Sequence[float] | None = None,
    coverage_error: Sequence[float] | None = None,
    repeated: float = 0.0,
    coverage_floor: float = 0.8,
) -> Choice:
    """Returns the step after which more alignment to the target no longer pays for lost diversity; reads no label.

    The score of step t is

        (alignment[0] - alignment[t]) * kept[t],   kept = (diversity[t] - r) / (diversity[0] - r) within 0..1,

    and its maximum lies where one percent more gain begins to cost more than one percent of the diversity. A factor on
    either curve leaves the choice unchanged, so the product needs no weight, and a longer run can only add candidates.
    `kept` does not rise above 1: a model that falls apart makes diverse images too. r is the diversity of a model that
    only repeats the target, such as that of the target's crops; it counts up to half of the diversity at step 0.

    Three rules complete it:

    * a step that covers less than `coverage_floor` of what step 0 covers, by more than one standard error, is not
      admitted;
    * a best gain below `LEAST_GAIN` of the distance at step 0 chooses step 0;
    * of the steps within one standard error or `TOLERANCE` of the best score, whichever is wider, the earliest is
      chosen (the one-standard-error rule of Breiman et al. 1984). A gain no larger than its error chooses step 0.

    Limits: with an encoder that does not separate the domains, alignment is flat and step 0 is chosen; one that encodes
    content more than style rewards repeated layouts; if step 0 spans many domains, adaptation itself costs diversity
    and moves the choice forward; images that repeat the target's layout under new textures may count as diverse (see
    `Alignment.nearest`); the best step may lie between two checkpoints or after the last.

    Args:
        steps: S of them, ascending, the first 0 (the untouched model).
        alignment: distance of the generated images to the target; any measure with a zero.
        diversity: larger is more diverse; any measure with a zero.
        coverage: larger is more complete; None admits all steps.
        alignment_error, diversity_error, coverage_error: standard errors (`quality.standard_error`); None counts as 0.
        repeated: r, in units of `diversity`.
        coverage_floor: a share, 0..1.

    Raises:
        UserError: lengths differ, steps do not ascend from 0, or step 0 has no distance or no diversity.
    """
    count = len(steps)
    far, wide = _curve(alignment, "alignment", count), _curve(diversity, "diversity", count)
    covered = _curve(coverage, "coverage", count, default=1.0)
    far_error = _curve(alignment_error, "alignment_error", count)
    wide_error = _curve(diversity_error, "diversity_error", count)
    covered_error = _curve(coverage_error, "coverage_error", count)
    if count == 0 or steps[0] != 0 or any(b <= a for a, b in zip(steps[:-1], steps[1:], strict=True)):
        raise UserError(f"steps: {list(steps)} must ascend from 0, the model before personalisation; measure it too")
    if far[0] <= 0 or wide[0] <= 0:
        raise UserError("step 0 has no distance to the target or no diversity; check the images and the encoder")

    span = wide[0] - min(max(repeated, 0.0), wide[0] / 2)
    ratio = 1 - (wide[0] - wide) / span
    kept = np.clip(ratio, 0.0, 1.0)
    drop = far[0] - far
    score = drop * kept
    # first-order propagation; step 0 is the origin of both factors and has none
    kept_error = np.hypot(wide_error, wide_error[0] * ratio) / span
    error = np.hypot(kept * np.hypot(far_error, far_error[0]), drop * kept_error)
    error[0] = 0.0
    chance = np.hypot(covered_error, coverage_floor * covered_error[0])
    admitted = covered + chance >= coverage_floor * covered[0]
    gain = drop / far[0]

    best = int(np.argmax(np.where(admitted, score, -np.inf)))
    index = 0
    if gain[best] >= LEAST_GAIN:
        bar = score[best] - max(error[best], TOLERANCE * score[best])
        index = int(np.flatnonzero(admitted & (score >= bar))[0])
    reason = _reason(steps, index, best, gain, kept, admitted)
    return Choice(int(steps[index]), score, gain, kept, admitted, reason)


def _reason(
    steps: Sequence[int], index: int, best: int, gain: np.ndarray, kept: np.ndarray, admitted: np.ndarray
) -> str:
    parts = [f"step {steps[index]}: {100 * gain[index]:.0f} % nearer to the target, {100 * kept[index]:.0f} % of the "]
    parts[0] += "diversity kept"
    if index == 0:
        largest = f"best at step {steps[best]}, {100 * gain[best]:.1f} % of the distance" if best else "none at all"
        parts = [f"step 0: no gain in alignment beyond chance ({largest})"]
    elif index != best:
        parts.append(f"step {steps[best]} is better by no more than chance or tolerance")
    if 0 < index == len(steps) - 1:
        parts.append("the last step measured, a longer run may do better")
    if not admitted.all():
        parts.append(f"too few classes at step {', '.join(map(str, np.asarray(steps)[~admitted]))}")
    return "; ".join(parts)


def _curve(values: Sequence[float] | None, what: str, count: int, default: float = 0.0) -> Float[np.ndarray, " S"]:
    curve = np.full(count, default) if values is None else np.asarray(values, np.float64)
    if curve.shape != (count,) or not np.isfinite(curve).all():
        raise UserError(f"{what}: {curve.shape} values for {count} steps; give one finite number per step")
    return curve
