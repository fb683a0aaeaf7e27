"""Label-free criteria for templates: estimates from a tally of how well a template segments a class.

Each criterion is a risk [M, K]: the lower, the more trusted. All read the same sums (`tally.Tally`) of one pass.

The paper ranks by entropy. Confidence and margin are its nearest relatives in the literature on estimating accuracy
without labels (Hendrycks and Gimpel 2017; Guillory et al. 2021); consensus follows disagreement-based estimates (Jiang
et al. 2022), flip consistency under augmentation (Deng et al. 2021).
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Float

from fmda.errors import UserError
from fmda.evaluate.choice import spearman
from fmda.methods.floss.tally import Tally

Risk = Float[np.ndarray, "M K"]

PRIOR_SHARE = 0.1
"""Shrinkage: a (template, class) pair with this per cent of all pixels counts half, and its template's mean half."""


def _risk_of_iou(both: Risk, first: Risk, second: Risk) -> Risk:
    union = first + second - both
    return 1 - np.divide(both, union, out=np.zeros_like(both), where=union > 0)


def consensus(tally: Tally) -> Risk:
    """Returns one minus the IoU between the template's regions of the class and the ordinary classifier's."""
    return _risk_of_iou(tally.sums["consensus"], tally.sums["count"], tally.ordinary)


def flip(tally: Tally) -> Risk:
    """Returns one minus the IoU between the class's regions in an image and in its mirror image, turned back.

    Raises UserError where the pass processed no mirrored images.
    """
    if not tally.mirrored.any():
        raise UserError("criterion 'flip': the ranking processed no mirrored images; set ranking.flip=true")
    return _risk_of_iou(tally.sums["flip"], tally.sums["count"], tally.mirrored)


def entropy_consensus(tally: Tally) -> Risk:
    """Returns the mean of two ranks: by entropy, and by agreement with the ordinary classifier.

    Entropy alone may prefer a template that is sure and wrong; agreement alone one that changes nothing.
    """
    risks = (np.where(tally.sums["count"] == 0, np.inf, r) for r in (tally.mean("entropy"), consensus(tally)))
    ranks = [r.argsort(0, kind="stable").argsort(0) for r in risks]
    return (ranks[0] + ranks[1]) / 2.0


Criterion = Literal[
    "entropy", "confidence", "margin", "smoothness", "shrunk-entropy", "consensus", "flip", "entropy-consensus"
]

CRITERIA: dict[Criterion, Callable[[Tally], Risk]] = {
    # of the pixels given to the class: mean entropy in nats (the paper's), 1 - largest probability, 1 - its lead
    "entropy": lambda tally: tally.mean("entropy"),
    "confidence": lambda tally: 1 - tally.mean("confidence"),
    "margin": lambda tally: 1 - tally.mean("margin"),
    # share of the class's pixels whose right-hand neighbour has another label: ragged regions
    "smoothness": lambda tally: 1 - tally.mean("smooth"),
    # entropy drawn towards the template's mean where the class is rarely predicted
    "shrunk-entropy": lambda tally: shrunk(tally.mean("entropy"), tally.share),
    "consensus": consensus,
    "flip": flip,
    "entropy-consensus": entropy_consensus,
}


def shrunk(risks: Risk, share: Float[np.ndarray, "M K"], prior: float = PRIOR_SHARE) -> Risk:
    """Returns risks drawn towards each template's mean, weighted by share / (share + prior), both in per cent."""
    total = share.sum(1, keepdims=True)
    mean = (risks * share).sum(1, keepdims=True) / np.maximum(total, 1e-12)
    weight = share / (share + prior)
    return weight * risks + (1 - weight) * mean


def true_iou(tally: Tally) -> Float[np.ndarray, "M K"]:
    """Returns the IoU of each template's single classifier for each class, NaN where class and template are absent.

    For scoring alone. Raises UserError where the pass read no labels.
    """
    if not tally.truth.any():
        raise UserError("criteria: the images have no labels; compare criteria on a labelled split")
    hits = tally.sums["hits"]
    union = tally.sums["labelled"] + tally.truth[None] - hits
    return np.divide(hits, union, out=np.full_like(hits, np.nan), where=union > 0)


def rank_correlation(risks: Risk, iou: Float[np.ndarray, "M K"], count: Float[np.ndarray, "M K"]) -> np.ndarray:
    """Returns, per class, Spearman's correlation over templates of (minus risk) with IoU; 1 is a perfect order.

    Templates that never predict the class are left out; NaN where fewer than three are left, or nothing varies.
    """
    correlation = np.full(risks.shape[1], np.nan)
    for k in range(risks.shape[1]):
        used = (count[:, k] > 0) & np.isfinite(iou[:, k])
        correlation[k] = spearman(-risks[used, k], iou[used, k])
    return correlation


def comparison(tally: Tally, n: int) -> list[dict[str, float | str]]:
    """Returns one row a criterion: how it orders templates against their true IoU, best first.

    Columns: `correlation` (mean over classes), `classes_right` (share of classes with a positive one), `chosen_iou`
    (mean class IoU, per cent, of the n templates it chooses, each alone), beside `any_iou` (all templates) and
    `best_iou` (the n best by IoU).
    """
    iou, count = true_iou(tally), tally.sums["count"]
    present = tally.truth > 0
    table: list[dict[str, float | str]] = []
    for name, criterion in CRITERIA.items():
        if name == "flip" and not tally.mirrored.any():
            continue
        risks = criterion(tally)
        correlation = rank_correlation(risks, iou, count)[present]
        first = np.where(count > 0, risks, np.inf).argsort(0, kind="stable")[:n]
        known = correlation[np.isfinite(correlation)]
        table.append(
            {
                "criterion": name,
                "correlation": float(known.mean()) if len(known) else float("nan"),
                "classes_right": float((known > 0).mean()) if len(known) else float("nan"),
                "chosen_iou": _mean_iou(np.take_along_axis(iou, first, 0), present),
                "any_iou": _mean_iou(iou, present),
                "best_iou": _mean_iou(-np.sort(-np.nan_to_num(iou), 0)[:n], present),
            }
        )
    return sorted(table, key=lambda row: -np.nan_to_num(float(row["correlation"]), nan=-2.0))


def _mean_iou(iou: Float[np.ndarray, "n K"], present: np.ndarray) -> float:
    return float(100 * np.nan_to_num(iou[:, present]).mean())
