"""Which templates make up the expert of each class, and how many of them, without labels."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from fmda.config import NonNegativeFloat
from fmda.errors import UserError
from fmda.methods.floss.criteria import shrunk


@dataclass(frozen=True)
class Guards:
    """What a template must fulfil besides a low risk. The defaults are the paper's: nothing but being predicted.

    Attributes:
        min_share: per cent of all pixels a template must give to the class to be eligible for it.
        shrink: per cent of all pixels at which a risk counts half and its template's mean risk half; 0 = off.
    """

    min_share: NonNegativeFloat = 0.0
    shrink: NonNegativeFloat = 0.0


def order(
    risks: Float[np.ndarray, "M K"], share: Float[np.ndarray, "M K"], guards: Guards = Guards()
) -> Int[np.ndarray, "M K"]:
    """Returns template ids per class, most trusted first; the lower id first on ties.

    Templates that never predict a class come last there, those below the guard's share just before them.
    """
    if guards.shrink:
        risks = shrunk(risks, share, guards.shrink)
    grade = np.where(share <= 0, 2, np.where(share < guards.min_share, 1, 0))
    ids = np.broadcast_to(np.arange(len(risks))[:, None], risks.shape)
    return np.lexsort((ids, risks, grade), axis=0).astype(np.int32)


def select(
    risks: Float[np.ndarray, "M K"],
    share: Float[np.ndarray, "M K"],
    n: int = 4,
    guards: Guards = Guards(),
) -> tuple[tuple[int, ...], ...]:
    """Returns the ids of the n most trusted templates of each class; fewer where fewer are eligible.

    A class that no template predicts gets none, and its expert is the ordinary classifier.
    """
    if not 1 <= n <= len(risks):
        raise UserError(f"n: {n} templates an expert, but there are {len(risks)}; choose 1 to {len(risks)}")
    ranked = order(risks, share, guards)
    eligible = ((share > 0) & (share >= guards.min_share)).sum(0)
    return tuple(tuple(int(i) for i in ranked[: min(n, eligible[k]), k]) for k in range(risks.shape[1]))


def choose_n(consistency: Mapping[int, float], slack: float = 0.005) -> int:
    """Returns how many templates an expert should have, without labels.

    The rule: a segmenter that is right about an image is right about its mirror image, so the fused labels of the best
    candidate change least when the image is mirrored. IoU is averaged over classes, so that a collapse onto few classes
    does not pay. Candidates within `slack` of the best count as equal, and the smallest is taken.

    Args:
        consistency: candidate -> mean IoU of the labels of images and of their mirror images, turned back.
    """
    best = max(consistency.values())
    return min(n for n, value in consistency.items() if value >= best - slack)
