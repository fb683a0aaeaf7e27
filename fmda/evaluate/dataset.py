"""Scoring of a segmenter on a labelled dataset at the size of the labels; resumes image by image."""

import csv
import json
import time
from bisect import insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmda.atomic import replacing, write_json
from fmda.config import fingerprint
from fmda.data import ClassMap, Dataset, Example
from fmda.errors import UserError, disk_errors
from fmda.evaluate.confusion import Scores, confusion_matrix
from fmda.evaluate.maps import Common, Map, as_maps, common_list
from fmda.evaluate.overlay import comparison
from fmda.evaluate.protocol import Protocol
from fmda.evaluate.scoring import read_ahead
from fmda.evaluate.segmenter import Segmenter
from fmda.png import write_png
from fmda.progress import track
from fmda.runs.identity import claim
from fmda.runs.journal import Journal

IMAGES_LOG = "images.jsonl"
IDENTITY = "evaluation.json"


def evaluate_dataset(
    segmenter: Segmenter,
    dataset: Dataset,
    class_map: Map | Sequence[Map] | None = None,
    *,
    out: str | Path | None = None,
    keep: int = 4,
    limit: int | None = None,
    examples_of: str | Path | None = None,
) -> Scores:
    """Returns the scores over all images of a dataset; with `out`, also writes them, a table by image and figures.

    Pixels labelled 255 (also by a class map) are left out. A labelled pixel whose prediction has no class in the
    common list counts as a miss. `out` receives:

    * `evaluation.json`: fingerprint of the segmenter, digest of the dataset, class maps and protocol,
    * `images.jsonl`: counts of each finished image; a second call resumes after the last line with the same result,
    * `scores.json`: scores, counts, palette, model, dataset, protocol, and the examples,
    * `images.csv`: name, mIoU over the classes that occur, accuracy, labelled pixels,
    * `figures/{worst,best}-<rank>.png`: image, ground truth, prediction, errors,
    * `timing.json`: images per second of the last call.

    Args:
        segmenter: the model to score.
        dataset: labelled examples.
        class_map: see `fmda.evaluate.maps.common_list`.
        out: a folder for this evaluation alone, made if missing.
        keep: number of worst and of best images that become figures.
        limit: score only the first `limit` images.
        examples_of: folder of a finished evaluation of the same images, whose examples become the figures here.
            Default: the worst and the best images of this evaluation.

    Raises:
        UserError: class lists do not match, an image has no labels, or `out` holds the evaluation of another model,
            other images or labels, or another protocol.
    """
    common = common_list(segmenter.classes, dataset.classes, class_map)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    if count == 0:
        raise UserError(f"{dataset.name}: split '{dataset.split}' holds no image; check root and split")
    names = tuple("custom" if isinstance(m, ClassMap) else Path(m).name for m in as_maps(class_map))
    protocol = replace(segmenter.protocol, class_map=names)
    run = _Evaluation(segmenter, dataset, common, protocol, count, keep, _example_kinds(examples_of))
    if out is None:
        return run.in_memory()
    with disk_errors(out):
        return run.in_folder(Path(out))


class _ImageScore(NamedTuple):
    """Scores of one image over the classes that occur in it; columns of `images.csv`."""

    name: str
    miou: float
    accuracy: float
    pixels: int


class _Evaluation:
    """Sums and per-image scores of the images predicted so far."""

    def __init__(
        self, segmenter: Segmenter, dataset: Dataset, common: Common, protocol: Protocol, count: int, keep: int,
        kinds: Mapping[str, str],
    ) -> None:  # fmt: skip
        self.segmenter, self.dataset, self.common, self.protocol = segmenter, dataset, common, protocol
        self.count, self.keep, self.names = count, keep, common.classes.names
        self.kinds = kinds  # of the images that become figures; empty: the worst and the best
        self.total = np.zeros((len(self.names), len(self.names) + 1), np.int64)
        self.images: list[_ImageScore] = []
        self.extremes: list[tuple[float, int]] = []  # (mIoU, index) of the worst and the best `keep` images, ascending
        self.predictions: dict[int, np.ndarray] = {}  # of the figures, where this process computed them

    def in_memory(self) -> Scores:
        """Returns the scores and writes nothing."""
        for example in self._remaining():
            self._score(example)
        return Scores.from_confusion(self.total, self.names, self.protocol)

    def in_folder(self, folder: Path) -> Scores:
        """Returns the scores; counts of finished images are read from the journal of the folder."""
        remedy = "choose another output folder, or delete this one to score again"
        path = folder / IMAGES_LOG
        if not claim(folder, self._facts(), record=IDENTITY, remedy=remedy) and path.exists():
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
        seconds = round(time.perf_counter() - begin, 3)
        total = Scores.from_confusion(self.total, self.names, self.protocol)
        self._write_summary(folder, total, self._write_figures(folder))
        if images := self.count - resumed:
            rate = {"images": images, "seconds": seconds, "images_per_second": round(images / max(seconds, 1e-3), 3)}
            write_json(folder / "timing.json", rate)
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
        matrix = confusion_matrix(self.common.labels[example.labels], prediction, len(self.names), void=True)
        self.predictions[len(self.images)] = prediction
        self._add(example.name, matrix)
        return matrix

    def _predict(self, example: Example) -> np.ndarray:
        return self.common.predictions[self.segmenter.predict(example.image).labels]

    def _add(self, name: str, matrix: np.ndarray) -> None:
        index = len(self.images)
        scores = Scores.from_confusion(matrix, self.names)
        self.images.append(_ImageScore(name, scores.miou, scores.accuracy, int(matrix.sum())))
        self.total += matrix
        if not np.isnan(scores.miou):
            insort(self.extremes, (scores.miou, index))
            del self.extremes[self.keep : -self.keep or None]
        examples = {index for _, index in self.extremes}
        self.predictions = {
            k: prediction
            for k, prediction in self.predictions.items()
            if (self.images[k].name in self.kinds if self.kinds else k in examples)
        }

    def _examples(self) -> list[tuple[str, int]]:
        """Returns (kind, index) of the images that become figures, no image twice."""
        if self.kinds:
            indices = {image.name: k for k, image in enumerate(self.images)}
            if foreign := self.kinds.keys() - indices.keys():
                raise UserError(f"examples_of: image '{min(foreign)}' is not of {self.dataset.name}; leave it out")
            return [(kind, indices[name]) for name, kind in self.kinds.items()]
        order = [index for _, index in self.extremes]
        worst = order[: min(self.keep, (len(order) + 1) // 2)]
        best = [k for k in order[::-1][: self.keep] if k not in worst]
        return [("worst", k) for k in worst] + [("best", k) for k in best]

    def _facts(self) -> dict[str, Any]:
        return {
            "model": {"name": self.segmenter.name, "fingerprint": self.segmenter.fingerprint},
            "dataset": {
                "name": self.dataset.name,
                "split": self.dataset.split,
                "images": self.count,
                "contents": self.dataset[: self.count].digest(),
            },
            "classes": ", ".join(self.names),
            "prediction_map": fingerprint(self.common.predictions.tolist()),
            "label_map": fingerprint(self.common.labels.tolist()),
            "protocol": self.protocol,
        }

    def _write_figures(self, folder: Path) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for kind, index in self._examples():
            rank = 1 + sum(row["kind"] == kind for row in rows)
            figure, image = f"figures/{kind}-{rank:02}.png", self.images[index]
            rows.append({"kind": kind, "name": image.name, "miou": image.miou, "figure": figure})
            if (folder / figure).exists():
                continue
            example = self.dataset[index]
            assert example.labels is not None  # scored before
            prediction = self.predictions[index] if index in self.predictions else self._predict(example)
            row = comparison(example.image, self.common.labels[example.labels], prediction, self.common.classes)
            write_png(folder / figure, row)
        return rows

    def _write_summary(self, folder: Path, total: Scores, examples: list[dict[str, Any]]) -> None:
        with replacing(folder / "images.csv") as part, open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(_ImageScore._fields)
            for image in self.images:
                writer.writerow([image.name, f"{image.miou:.4f}", f"{image.accuracy:.4f}", image.pixels])
        # user data is named after its folder
        title = self.dataset.root.resolve().name if self.dataset.name == "folder" else self.dataset.name
        summary = {
            "model": self.segmenter.name,
            "fingerprint": self.segmenter.fingerprint,
            "dataset": title,
            "split": self.dataset.split,
            "images": self.count,
            "classes": list(self.names),
            "palette": np.asarray(self.common.classes.palette).tolist(),
            "scores": total.to_json(),
            "examples": examples,
        }
        write_json(folder / "scores.json", summary)


def _example_kinds(folder: str | Path | None) -> dict[str, str]:
    """Returns the kind of each image that is an example of an evaluation, by name."""
    if folder is None:
        return {}
    try:
        summary = json.loads((Path(folder) / "scores.json").read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"examples_of: {folder} holds no scores.json; give the folder of a score") from None
    return {row["name"]: row["kind"] for row in summary["examples"]}
