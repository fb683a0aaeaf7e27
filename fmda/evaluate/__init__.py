"""Scores, sliding windows, the `Segmenter` around any forward function, overlays and the HTML report."""

from fmda.evaluate.confusion import Scores, batch_confusion, confusion_matrix
from fmda.evaluate.dataset import evaluate_dataset
from fmda.evaluate.dead_classes import DeadClasses
from fmda.evaluate.label_free import LabelFree, label_free_scores
from fmda.evaluate.overlay import comparison, legend, overlay
from fmda.evaluate.protocol import Protocol
from fmda.evaluate.scoring import SegmentationEvaluator, score_on_mesh
from fmda.evaluate.segmenter import Segmentation, Segmenter
from fmda.evaluate.windows import Predictor, window_starts

__all__ = [
    "DeadClasses",
    "LabelFree",
    "Predictor",
    "Protocol",
    "Scores",
    "Segmentation",
    "SegmentationEvaluator",
    "Segmenter",
    "batch_confusion",
    "comparison",
    "confusion_matrix",
    "evaluate_dataset",
    "label_free_scores",
    "legend",
    "overlay",
    "score_on_mesh",
    "window_starts",
]
