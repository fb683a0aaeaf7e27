"""Scores, sliding windows, the `Segmenter` around any forward function, overlays and the HTML report."""

from fmda.evaluate.confusion import Scores, batch_confusion, confusion_matrix
from fmda.evaluate.dataset import evaluate_dataset
from fmda.evaluate.overlay import comparison, legend, overlay
from fmda.evaluate.protocol import Protocol
from fmda.evaluate.segmenter import Segmentation, Segmenter
from fmda.evaluate.windows import labels_at, resize_scores, sliding_window, window_starts

__all__ = [
    "Protocol",
    "Scores",
    "Segmentation",
    "Segmenter",
    "batch_confusion",
    "comparison",
    "confusion_matrix",
    "evaluate_dataset",
    "labels_at",
    "legend",
    "overlay",
    "resize_scores",
    "sliding_window",
    "window_starts",
]
