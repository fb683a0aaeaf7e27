"""Mask2Former, with a linear or a text classifier and learned or text queries."""

from fmda.models.mask2former.config import HeadConfig, Mask2FormerConfig
from fmda.models.mask2former.decoder import Predictions
from fmda.models.mask2former.mask2former import Mask2Former, Mask2FormerHead, log_scores, semantic_scores

__all__ = [
    "HeadConfig",
    "Mask2Former",
    "Mask2FormerConfig",
    "Mask2FormerHead",
    "Predictions",
    "log_scores",
    "semantic_scores",
]
