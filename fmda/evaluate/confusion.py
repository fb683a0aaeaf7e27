"""Confusion matrices and the scores derived from them.

A matrix counts pixels: row = truth, column = prediction. Matrices of images, batches and processes are added, and
scores are computed from the sum. A mean of per-image scores is a different number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fmda.config import from_dict, to_dict
from fmda.data import IGNORE
from fmda.errors import UserError
from fmda.evaluate.protocol import Protocol


def confusion_matrix(
    labels: Int[np.ndarray, "..."], predictions: Int[np.ndarray, "..."], classes: int, *, void: bool = False
) -> Int[np.ndarray, "K C"]:
    """Returns the pixel counts int64[K, K] of (truth, prediction).

    Pixels labelled 255 are dropped. So are pixels predicted as 255, unless `void` is set: then a last column
    (int64[K, K + 1]) counts labelled pixels without a predicted class, which are misses and no false alarms.

    Args:
        labels: integers of any shape, each 0..classes-1 or 255.
        predictions: the same shape and range.
        classes: K, 1..255.
        void: add the column of unassigned predictions.

    Raises:
        UserError: shapes differ, or a value is neither a class nor 255.
    """
    if np.shape(labels) != np.shape(predictions):
        raise UserError(
            f"labels have shape {np.shape(labels)} but predictions {np.shape(predictions)}; score at label size"
        )
    truth, guess = _as_uint8(labels, "label", classes), _as_uint8(predictions, "prediction", classes)
    # one histogram over all 256 x 256 pairs needs no mask and also shows values out of range
    counts = np.bincount(truth.astype(np.uint16) * np.uint16(256) + guess, minlength=65536).reshape(256, 256)
    for what, axis in (("label", 1), ("prediction", 0)):
        outside = np.flatnonzero(counts.sum(axis)[classes:IGNORE]) + classes
        if outside.size:
            raise UserError(_out_of_range(what, int(outside[0]), classes))
    columns = [*range(classes), IGNORE] if void else range(classes)
    return counts[:classes, columns].astype(np.int64)


def batch_confusion(
    labels: Int[Array, "..."], predictions: Int[Array, "..."], classes: int, *, void: bool = False
) -> Int[Array, "K C"]:
    """Returns int32[K, K] (or [K, K + 1] with `void`) counts of fewer than 2^31 pixels, inside jit.

    As `confusion_matrix`, but values out of range are dropped, since a device cannot raise. Sum batches on the host
    in int64.
    """
    truth, guess = labels.astype(jnp.int32).ravel(), predictions.astype(jnp.int32).ravel()
    columns = classes + int(void)
    if void:
        guess = jnp.where(guess == IGNORE, classes, guess)
    valid = (truth >= 0) & (truth < classes) & (guess >= 0) & (guess < columns)
    pair = jnp.where(valid, truth * columns + guess, classes * columns)
    counts = jnp.bincount(pair, length=classes * columns + 1)[:-1]
    return counts.astype(jnp.int32).reshape(classes, columns)


def _as_uint8(values: np.ndarray, what: str, classes: int) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype.kind not in "iub":
        raise UserError(f"{what}s have type {values.dtype}; give integers 0..{classes - 1} or {IGNORE}")
    if values.dtype != np.uint8 and values.size:
        for value in (int(values.min()), int(values.max())):
            if not 0 <= value <= 255:
                raise UserError(_out_of_range(what, value, classes))
    return values.astype(np.uint8, copy=False).ravel()


def _out_of_range(what: str, value: int, classes: int) -> str:
    return f"{what} value {value} is outside 0..{classes - 1} and not {IGNORE} (ignored); check the class list or map"


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of a set of pixels, all derived from counts that can be added.

    Attributes:
        names: K class names.
        confusion: int64[K, K], row = truth, column = prediction.
        void: int64[K], labelled pixels without a predicted class (misses).
        protocol: of the predictions, where recorded.
    """

    names: tuple[str, ...]
    confusion: Int[np.ndarray, "K K"]
    void: Int[np.ndarray, " K"]
    protocol: Protocol | None = None

    def __post_init__(self) -> None:
        if self.confusion.shape != (len(self.names), len(self.names)):
            raise UserError(f"confusion has shape {self.confusion.shape} but there are {len(self.names)} class names")

    @classmethod
    def from_confusion(
        cls, matrix: Int[np.ndarray, "K C"], names: Sequence[str], protocol: Protocol | None = None
    ) -> "Scores":
        """Returns the scores of a [K, K] matrix, or of [K, K + 1] with a last column of unassigned pixels."""
        matrix, size = np.asarray(matrix, np.int64), len(names)
        if matrix.shape == (size, size + 1):
            return cls(tuple(names), matrix[:, :size], matrix[:, size], protocol)
        return cls(tuple(names), matrix, np.zeros(size, np.int64), protocol)

    def __add__(self, other: "Scores") -> "Scores":
        """Returns the scores of both pixel sets together; class names and protocols must be equal."""
        if self.names != other.names:
            raise UserError("scores of different class lists cannot be added; map both to one list first")
        if self.protocol != other.protocol:
            raise UserError("scores of different protocols cannot be added; evaluate both under one protocol")
        return Scores(self.names, self.confusion + other.confusion, self.void + other.void, self.protocol)

    def __eq__(self, other: object) -> bool:
        """Returns whether names and all counts are equal."""
        if not isinstance(other, Scores):
            return NotImplemented
        same = np.array_equal(self.confusion, other.confusion) and np.array_equal(self.void, other.void)
        return self.names == other.names and same

    def named(self) -> Iterator[tuple[str, float]]:
        """Yields ("miou", value), "accuracy", and "iou/<class>" for each class that occurs; values in 0..1."""
        yield "miou", self.miou
        yield "accuracy", self.accuracy
        for name, iou in zip(self.names, self.iou, strict=True):
            if not np.isnan(iou):
                yield f"iou/{name}", float(iou)

    @property
    def pixels(self) -> Int[np.ndarray, " K"]:
        """Labelled pixels of each class."""
        return self.confusion.sum(1) + self.void

    @property
    def iou(self) -> Float[np.ndarray, " K"]:
        """Intersection over union of each class, 0..1; nan for a class neither labelled nor predicted."""
        return _ratio(np.diagonal(self.confusion), self.pixels + self.confusion.sum(0) - np.diagonal(self.confusion))

    @property
    def class_accuracy(self) -> Float[np.ndarray, " K"]:
        """Recall: correctly predicted share of each class's labelled pixels, 0..1; nan for an unlabelled class."""
        return _ratio(np.diagonal(self.confusion), self.pixels)

    @property
    def precision(self) -> Float[np.ndarray, " K"]:
        """Share of each class's predicted pixels that are right, 0..1; nan for a class never predicted."""
        return _ratio(np.diagonal(self.confusion), self.confusion.sum(0))

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that occur in labels or predictions, 0..1; nan when none does."""
        return _mean(self.iou)

    @property
    def mean_accuracy(self) -> float:
        """Mean of `class_accuracy` over the labelled classes, 0..1."""
        return _mean(self.class_accuracy)

    @property
    def accuracy(self) -> float:
        """Share of labelled pixels that are right, 0..1; nan for no pixel."""
        return float(_ratio(np.trace(self.confusion)[None], self.pixels.sum()[None])[0])

    @property
    def frequency_weighted_iou(self) -> float:
        """IoU weighted by each class's share of the labelled pixels, 0..1; nan for no pixel."""
        total = self.pixels.sum()
        return float(np.nansum(self.iou * (self.pixels / total))) if total else float("nan")

    @property
    def summary(self) -> dict[str, float]:
        """The four scores over all classes by their names in tables."""
        return {
            "mIoU": self.miou,
            "pixel accuracy": self.accuracy,
            "mean class accuracy": self.mean_accuracy,
            "frequency weighted IoU": self.frequency_weighted_iou,
        }

    def table(self) -> str:
        """Returns a plain text table in percent: one line per class, then `summary`."""
        width = max(map(len, (*self.names, *self.summary)))
        lines = [f"{'class':<{width}}  {'IoU':>6}  {'recall':>6}  {'precision':>9}  {'% pixels':>8}"]
        shares = self.pixels / max(int(self.pixels.sum()), 1)
        rows = zip(self.names, self.iou, self.class_accuracy, self.precision, shares, strict=True)
        for name, iou, recall, precision, share in rows:
            cells = f"{_percent(iou):>6}  {_percent(recall):>6}  {_percent(precision):>9}  {_percent(share):>8}"
            lines.append(f"{name:<{width}}  {cells}")
        lines.append("-" * len(lines[0]))
        return "\n".join(lines + [f"{name:<{width}}  {_percent(value):>6}" for name, value in self.summary.items()])

    def to_json(self) -> dict:
        """Returns plain data: the summary scores for readers, names and counts to restore from. nan becomes None."""
        summary = ("miou", "accuracy", "mean_accuracy", "frequency_weighted_iou")
        return {
            **{name: _plain(getattr(self, name)) for name in summary},
            "iou": {name: _plain(value) for name, value in zip(self.names, self.iou, strict=True)},
            "names": list(self.names),
            "confusion": self.confusion.tolist(),
            "void": self.void.tolist(),
            "protocol": to_dict(self.protocol),
        }

    @classmethod
    def from_json(cls, data: dict, where: str = "scores") -> "Scores":
        """Returns the scores of `to_json`. Raises UserError, with `where`, for missing or malformed counts."""
        try:
            names, protocol = tuple(data["names"]), data["protocol"]
            confusion, void = (np.array(data[key], np.int64) for key in ("confusion", "void"))
            return cls(names, confusion, void, protocol and from_dict(Protocol, protocol, where))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{where}: holds no confusion counts ({error}); evaluate again") from None


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


def _mean(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.2f}"
