"""Scoring of a segmenter on a labelled dataset at the size of the labels; resumes image by image."""

import csv
import json
import time
from bisect import insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fmda.atomic import replacing, write_json
from fmda.config import fingerprint
from fmda.data import ClassList, ClassMap, Dataset, Example
from fmda.errors import UserError, disk_errors
from fmda.evaluate.confusion import Scores, confusion_matrix
from fmda.evaluate.maps import Common, Maps, common_list
from fmda.evaluate.overlay import comparison
from fmda.evaluate.protocol import Protocol
from fmda.evaluate.scoring import read_ahead
from fmda.evaluate.segmenter import Segmenter
from fmda.progress import track
from fmda.runs.identity import claim
from fmda.runs.journal import Journal

IMAGES_LOG = "images.jsonl"
IDENTITY = "evaluation.json"


def evaluate_dataset(
    segmenter: Segmenter,
    dataset: Dataset,
    class_map: Maps | Sequence[Maps] = None,
    *,
    out: str | Path | None = None,
    keep: int = 4,
    limit: int | None = None,
    examples_of: str | Path | None = None,
) -> Scores:
    """Returns the scores over all images of a dataset; with `out`, also writes them, a table by image and figures.

    Pixels labelled 255 (also by a class map) are left out. A labelled pixel whose prediction has no class in the
    common list counts as a miss. `out` gets:

    * `evaluation.json`: fingerprint of the segmenter, digest of the dataset, class maps and protocol,
    * `images.jsonl`: one line per finished image with its counts; a second call continues after the last line and
      ends with the same files, byte for byte (examples scored before an interruption are predicted again),
    * `scores.json`: scores, counts, palette, model, dataset, protocol, and the examples,
    * `images.csv`: name, mIoU over the image's own classes, accuracy, labelled pixels,
    * `figures/{worst,best}-<rank>.png`: image, ground truth, prediction, errors,
    * `timing.json`: images a second of the last call.

    Args:
        segmenter: the model to score.
        dataset: labelled examples.
        class_map: see `fmda.evaluate.maps.common_list`.
        out: a folder for this evaluation alone, made if missing.
        keep: number of worst and of best images that become figures.
        limit: score only the first `limit` images.
        examples_of: folder of a finished evaluation of the same images; its examples become the figures here, so that
            both predictions can be compared. Default: the worst and the best images of this evaluation.

    Raises:
        UserError: class lists do not match, an image has no labels, or `out` holds the evaluation of another model,
            other images or labels, or another protocol.
    """
    common = common_list(segmenter.classes, dataset.classes, class_map)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    if count == 0:
        raise UserError(f"{dataset.name}: split '{dataset.split}' holds no image; check root and split")
    protocol = replace(segmenter.protocol, class_map=map_names(class_map))
    run = _Evaluation(segmenter, dataset, common, protocol, count, keep, _example_names(examples_of))
    with disk_errors(out or dataset.root):
        return run.in_memory() if out is None else run.in_folder(Path(out))


def map_names(class_map: Maps | Sequence[Maps]) -> tuple[str, ...]:
    """Returns the names of class maps as a protocol records them."""
    maps = [class_map] if class_map is None or isinstance(class_map, ClassMap | str | Path) else class_map
    return tuple("custom" if isinstance(m, ClassMap) else Path(m).name for m in maps if m is not None)


@dataclass(frozen=True)
class _ImageScore:
    """Scores of one image over the classes that occur in it."""

    name: str
    miou: float
    accuracy: float
    pixels: int


class _Evaluation:
    """Sums and per-image scores of the images predicted so far."""

    def __init__(
        self,
        segmenter: Segmenter,
        dataset: Dataset,
        common: Common,
        protocol: Protocol,
        count: int,
        keep: int,
        examples: Mapping[str, str],
    ) -> None:
        self.segmenter, self.dataset, self.common, self.protocol = segmenter, dataset, common, protocol
        self.count, self.keep, self.names = count, keep, common.classes.names
        self.chosen = examples  # kind of each image that becomes a figure; empty: the worst and the best do
        self.total = np.zeros((len(self.names), len(self.names) + 1), np.int64)
        self.images: list[_ImageScore] = []
        self.extremes: list[tuple[float, int]] = []  # (mIoU, index) of the worst and the best `keep` images, ascending
        self.predictions: dict[int, np.ndarray] = {}  # theirs, as far as this process predicted them

    def in_memory(self) -> Scores:
        """Returns the scores and writes nothing."""
        for example in self._remaining():
            self._score(example)
        return Scores.from_confusion(self.total, self.names, self.protocol)

    def in_folder(self, folder: Path) -> Scores:
        """Returns the scores, with the images that the folder's journal holds taken from there."""
        remedy = "choose another output folder, or delete this one to score again"
        recorded = claim(folder, self._facts(), record=IDENTITY, remedy=remedy)
        path = folder / IMAGES_LOG
        if not recorded and path.exists():
            raise UserError(f"{path}: belongs to an unknown evaluation (no {IDENTITY}); {remedy}")
        (folder / "figures").mkdir(exist_ok=True)
        begin = time.perf_counter()
        with Journal(path) as journal:
            for row in journal.rows:
                matrix = np.zeros_like(self.total)
                for truth, prediction, pixels in row["counts"]:
                    matrix[truth, prediction] = pixels
                self._add(row["name"], matrix)
            resumed = len(self.images)
            for example in self._remaining():
                matrix = self._score(example)
                counts = [[int(t), int(p), int(matrix[t, p])] for t, p in np.argwhere(matrix)]
                journal.append({"name": example.name, "counts": counts})
        seconds = time.perf_counter() - begin
        total = Scores.from_confusion(self.total, self.names, self.protocol)
        self._write_summary(folder, total, self._write_figures(folder))
        if resumed < self.count:
            write_json(folder / "timing.json", _timing(self.count - resumed, seconds))
        return total

    def _remaining(self) -> Iterator[Example]:
        indices = range(len(self.images), self.count)
        what = f"evaluate {self.segmenter.name} on {self.dataset.name}"
        return track(read_ahead(self.dataset.__getitem__, indices), what, len(indices))

    def _score(self, example: Example) -> np.ndarray:
        """Returns the confusion matrix of the next image after adding it to the sums."""
        if example.labels is None:
            raise UserError(f"{self.dataset.name}: image '{example.name}' has no label map; evaluate a labelled split")
        prediction = self._predict(example)
        labels = self.common.map_labels(example.labels)
        matrix = confusion_matrix(labels, prediction, len(self.names), void=True)
        self.predictions[len(self.images)] = prediction
        self._add(example.name, matrix)
        return matrix

    def _predict(self, example: Example) -> np.ndarray:
        return self.common.map_predictions(self.segmenter.predict(example.image).labels)

    def _add(self, name: str, matrix: np.ndarray) -> None:
        index = len(self.images)
        scores = Scores.from_confusion(matrix, self.names)
        self.images.append(_ImageScore(name, scores.miou, scores.accuracy, int(matrix.sum())))
        self.total += matrix
        if not np.isnan(scores.miou):
            insort(self.extremes, (scores.miou, index))
            del self.extremes[self.keep : -self.keep or None]
        if self.chosen:
            if name not in self.chosen:
                self.predictions.pop(index, None)
            return
        examples = {index for _, index in self.extremes}
        self.predictions = {index: labels for index, labels in self.predictions.items() if index in examples}

    def _examples(self) -> dict[str, list[int]]:
        """Returns the indices of the images that become figures by kind, no image in two."""
        if self.chosen:
            indices = {image.name: k for k, image in enumerate(self.images)}
            kinds: dict[str, list[int]] = {}
            for name, kind in self.chosen.items():
                kinds.setdefault(kind, []).append(indices[name])
            return kinds
        order = [index for _, index in self.extremes]
        worst = order[: min(self.keep, (len(order) + 1) // 2)]
        return {"worst": worst, "best": [k for k in order[::-1][: self.keep] if k not in worst]}

    def _facts(self) -> dict[str, Any]:
        def table(maps: Sequence[ClassMap], classes: ClassList) -> str:
            values = np.arange(len(classes.names), dtype=np.uint8)
            for step in maps:
                values = step.apply(values)
            return fingerprint(values.tolist()) if maps else "none"

        return {
            "model": {"name": self.segmenter.name, "fingerprint": self.segmenter.fingerprint},
            "dataset": {
                "name": self.dataset.name,
                "split": self.dataset.split,
                "images": self.count,
                "contents": self.dataset[: self.count].digest(),
            },
            "classes": ", ".join(self.names),
            "prediction_map": table(self.common.predictions, self.segmenter.classes),
            "label_map": table(self.common.labels, self.dataset.classes),
            "protocol": self.protocol,
        }

    def _write_figures(self, folder: Path) -> list[dict[str, Any]]:
        rows = []
        for kind, chosen in self._examples().items():
            for rank, index in enumerate(chosen, 1):
                figure = f"figures/{kind}-{rank:02}.png"
                image = self.images[index]
                rows.append({"kind": kind, "name": image.name, "miou": image.miou, "figure": figure})
                if (folder / figure).exists():
                    continue
                example = self.dataset[index]
                assert example.labels is not None  # scored before
                prediction = self.predictions[index] if index in self.predictions else self._predict(example)
                labels = self.common.map_labels(example.labels)
                with replacing(folder / figure) as part:
                    Image.fromarray(comparison(example.image, labels, [prediction], self.common.classes)).save(part)
        return rows

    def _write_summary(self, folder: Path, total: Scores, examples: list[dict[str, Any]]) -> None:
        with replacing(folder / "images.csv") as part, open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["name", "miou", "accuracy", "pixels"])
            for row in self.images:
                writer.writerow([row.name, f"{row.miou:.4f}", f"{row.accuracy:.4f}", row.pixels])
        summary = {
            "model": self.segmenter.name,
            "fingerprint": self.segmenter.fingerprint,
            "dataset": _title(self.dataset),
            "split": self.dataset.split,
            "images": self.count,
            "classes": list(self.names),
            "palette": np.asarray(self.common.classes.palette).tolist(),
            "scores": total.to_json(),
            "examples": examples,
        }
        write_json(folder / "scores.json", summary)


def _example_names(folder: str | Path | None) -> dict[str, str]:
    """Returns {image: kind} of the examples of an evaluation; none for None."""
    if folder is None:
        return {}
    summary = json.loads((Path(folder) / "scores.json").read_text(encoding="utf-8"))
    return {row["name"]: row["kind"] for row in summary["examples"]}


def _title(dataset: Dataset) -> str:
    """Returns the dataset's name; one's own folder is called by its own name."""
    return dataset.root.resolve().name if dataset.name == "folder" else dataset.name


def _timing(images: int, seconds: float) -> dict[str, Any]:
    rate = images / max(seconds, 1e-9)
    return {"images": images, "seconds": round(seconds, 3), "images_per_second": round(rate, 3)}
