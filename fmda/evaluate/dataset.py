"""Scoring of a segmenter on a labelled data set, at the labels' own size, resumable image by image."""

import csv
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fmda.atomic import replacing, write_atomic
from fmda.data import Dataset
from fmda.errors import UserError
from fmda.evaluate.confusion import Scores, confusion_matrix
from fmda.evaluate.maps import Common, Maps, common_list
from fmda.evaluate.overlay import comparison
from fmda.evaluate.segmenter import Segmenter, write_labels
from fmda.progress import track

IMAGES_LOG = "images.jsonl"


def evaluate_dataset(
    segmenter: Segmenter,
    dataset: Dataset,
    class_map: Maps | Sequence[Maps] = None,
    *,
    out: str | Path | None = None,
    keep: int = 4,
    limit: int | None = None,
) -> Scores:
    """Returns the scores over all images of a data set; with `out`, also writes them, a table by image and figures.

    Pixels labelled 255 (also by a class map) are left out. A labelled pixel whose prediction has no class in the
    common list counts as a miss. `out` gets:

    * `images.jsonl`: one line per finished image with its counts; a second call continues after the last line and
      ends with the same files, byte for byte,
    * `scores.json`: scores, counts, palette, what was evaluated, and the examples,
    * `images.csv`: name, mIoU over the image's own classes, accuracy, labelled pixels,
    * `figures/{worst,best}-<rank>.png`: image, truth, prediction, errors,
    * `timing.json`: images a second of the last call.

    Args:
        segmenter: what predicts.
        dataset: labelled examples.
        class_map: see `fmda.evaluate.maps.common_list`.
        out: a folder of its own, made if missing.
        keep: how many of the worst and of the best images become figures.
        limit: score the first `limit` images alone.

    Raises:
        UserError: class lists do not meet, an image has no labels, or `out` holds another evaluation.
    """
    common = common_list(segmenter.classes, dataset.classes, class_map)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    if count == 0:
        raise UserError(f"{dataset.name}: split '{dataset.split}' holds no image; check root and split")
    try:
        return _evaluate(segmenter, dataset, common, count, None if out is None else Path(out), keep)
    except OSError as fault:
        # a full disk does not say for which file it was asked
        where = fault.filename or out or dataset.name
        raise UserError(
            f"{where}: {fault.strerror or fault}; make room or mend the path, and evaluate again to go on"
        ) from fault


def _evaluate(
    segmenter: Segmenter, dataset: Dataset, common: Common, count: int, out: Path | None, keep: int
) -> Scores:
    log = _Log(out, _header(segmenter, dataset, common, count))
    todo = range(len(log.rows), count)
    begin = time.perf_counter()
    for index in track(todo, f"evaluate {segmenter.name} on {dataset.name}"):
        example = dataset[index]
        if example.labels is None:
            raise UserError(f"{dataset.name}: image '{example.name}' has no label map; evaluate a labelled split")
        prediction = _mapped_prediction(segmenter, common, example)
        matrix = confusion_matrix(common.map_labels(example.labels), prediction, len(common.classes.names), void=True)
        log.add(example.name, matrix, prediction, common, keep)
    seconds = time.perf_counter() - begin
    total = Scores.from_confusion(log.total, common.classes.names)
    if log.folder is not None:
        figures = _write_figures(log, segmenter, dataset, common, keep)
        _write_summary(log, total, common, figures, _timing(len(todo), seconds))
    return total


@dataclass(frozen=True)
class _Row:
    """One finished image: its name and its scores over its own classes."""

    name: str
    miou: float
    accuracy: float
    pixels: int


class _Log:
    """Counts of the images done so far, in memory and, with a folder, on disk."""

    def __init__(self, folder: Path | None, header: dict[str, Any]) -> None:
        self.folder, self.header = folder, header
        self.classes = tuple(header["classes"])
        self.total = np.zeros((len(self.classes), len(self.classes) + 1), np.int64)
        self.rows: list[_Row] = []
        if folder is None:
            return
        try:
            (folder / "figures").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from None
        self.path = folder / IMAGES_LOG
        if self.path.exists():
            self._restore()
        else:
            write_atomic(self.path, json.dumps(header) + "\n")

    def _restore(self) -> None:
        lines = self.path.read_bytes().split(b"\n")
        # what stands after the last line end was cut off by a kill; the image is done again
        complete, rest = lines[:-1], lines[-1]
        try:
            records = [json.loads(line) for line in complete]
            if not records or records[0] != self.header:
                raise UserError(f"{self.folder}: holds another evaluation; choose another folder or delete it")
            for record in records[1:]:
                matrix = np.zeros_like(self.total)
                for truth, guess, count in record["counts"]:
                    matrix[truth, guess] = count
                self._append(record["name"], matrix)
        except (ValueError, KeyError, TypeError, IndexError):
            raise UserError(f"{self.path}: is not what an evaluation wrote; choose another folder") from None
        if rest:
            write_atomic(self.path, b"\n".join(complete) + b"\n")

    def _append(self, name: str, matrix: np.ndarray) -> None:
        scores = Scores.from_confusion(matrix, self.classes)
        self.rows.append(_Row(name, scores.miou, scores.accuracy, int(matrix.sum())))
        self.total += matrix

    def add(self, name: str, matrix: np.ndarray, prediction: np.ndarray, common: Common, keep: int) -> None:
        """Records one image; keeps its label map while it is among the worst or best so far."""
        self._append(name, matrix)
        if self.folder is None:
            return
        index = len(self.rows) - 1
        if any(index in chosen for chosen in self.examples(keep).values()):
            write_labels(prediction, self.label_path(index), common.classes)
        counts = [[int(t), int(p), int(matrix[t, p])] for t, p in np.argwhere(matrix)]
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "counts": counts}) + "\n")

    def examples(self, keep: int) -> dict[str, list[int]]:
        """Returns the indices of the worst and the best images by mIoU, no image in both."""
        known = [k for k, row in enumerate(self.rows) if not np.isnan(row.miou)]
        order = sorted(known, key=lambda k: (self.rows[k].miou, k))
        worst = order[: min(keep, (len(order) + 1) // 2)]
        return {"worst": worst, "best": [k for k in order[::-1][:keep] if k not in worst]}

    def label_path(self, index: int) -> Path:
        """Returns where the label map of an image is kept."""
        assert self.folder is not None
        return self.folder / "figures" / f".labels-{index:06}.png"


def _header(segmenter: Segmenter, dataset: Dataset, common: Common, count: int) -> dict[str, Any]:
    def table(maps: Sequence[Any], classes: Any) -> list[int]:
        values = np.arange(len(classes.names), dtype=np.uint8)[None]
        for step in maps:
            values = step.apply(values)
        return values[0].tolist()

    return {
        "model": segmenter.name,
        "dataset": dataset.name,
        "split": dataset.split,
        "images": count,
        "classes": list(common.classes.names),
        "prediction_map": table(common.predictions, segmenter.classes) if common.predictions else None,
        "label_map": table(common.labels, dataset.classes) if common.labels else None,
    }


def _mapped_prediction(segmenter: Segmenter, common: Common, example: Any) -> np.ndarray:
    return common.map_predictions(segmenter.predict(example.image).labels)


def _write_figures(
    log: _Log, segmenter: Segmenter, dataset: Dataset, common: Common, keep: int
) -> list[dict[str, Any]]:
    assert log.folder is not None
    rows = []
    for kind, chosen in log.examples(keep).items():
        for rank, index in enumerate(chosen, 1):
            example = dataset[index]
            path = log.label_path(index)
            if path.exists():
                with Image.open(path) as picture:
                    prediction = np.asarray(picture)
            else:
                prediction = _mapped_prediction(segmenter, common, example)
            assert example.labels is not None  # scored before
            labels = common.map_labels(example.labels)
            figure = f"figures/{kind}-{rank:02}.png"
            with replacing(log.folder / figure) as part:
                Image.fromarray(comparison(example.image, labels, [prediction], common.classes)).save(part)
            rows.append({"kind": kind, "name": example.name, "miou": log.rows[index].miou, "figure": figure})
    for path in (log.folder / "figures").glob(".labels-*.png"):
        path.unlink()
    return rows


def _write_summary(log: _Log, total: Scores, common: Common, examples: list[dict], timing: dict | None) -> None:
    assert log.folder is not None
    with replacing(log.folder / "images.csv") as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["name", "miou", "accuracy", "pixels"])
        for row in log.rows:
            writer.writerow([row.name, f"{row.miou:.4f}", f"{row.accuracy:.4f}", row.pixels])
    palette = np.asarray(common.classes.palette).tolist()
    summary = {**log.header, "palette": palette, "scores": total.to_json(), "examples": examples}
    write_atomic(log.folder / "scores.json", json.dumps(summary, indent=1) + "\n")
    if timing is not None:
        write_atomic(log.folder / "timing.json", json.dumps(timing) + "\n")


def _timing(images: int, seconds: float) -> dict[str, Any] | None:
    if images == 0:
        return None
    rate = images / max(seconds, 1e-9)
    return {"images": images, "seconds": round(seconds, 3), "images_per_second": round(rate, 3)}
