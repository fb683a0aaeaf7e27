"""Pseudo-labels as a dataset (kind `pseudo-labels`): what a segmenter is sure of, for a later run to train on.

A run of kind `uda` reads them by `target: {name: folder, root: @name/dataset, labels: true}`. A second round predicts
with the export of that run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8, UInt16

from fmda.atomic import write_json
from fmda.config import FolderOrName, Share
from fmda.data import ClassList, Dataset, read_image
from fmda.data.config import ImagesConfig
from fmda.errors import disk_errors
from fmda.evaluate import Predictor, Segmenter
from fmda.evaluate.segmenter import Forward
from fmda.png import is_whole, read_png, write_png
from fmda.progress import track
from fmda.runs.identity import claim
from fmda.runs.plan import Plan
from fmda.runs.stages import Stage, pending
from fmda.weights.network import CLASSES_FILE

LEVELS = 65535
"""Confidence 1 in a 16-bit file."""

UNSURE = 255
SPLIT = "train"
"""The split of the dataset that is written."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which images are predicted, by what, and which pixels keep their class. The defaults are FDA's.

    A pixel keeps its class where its confidence reaches the quantile of that class, or the cap. The p most confident
    of each class, as in CBST (Zou et al. 2018), are `quantile: 1 - p, cap: 1`.

    Attributes:
        data: the images.
        segmenter: folder of a finished run, or of a segmentation network.
        quantile: of the confidences of the pixels with one class, over all images.
        cap: confidence that always suffices.
    """

    data: ImagesConfig
    segmenter: FolderOrName
    quantile: Share = 0.66
    cap: Share = 0.9


def check(config: Config) -> None:
    """Raises UserError for missing images, or a segmenter that cannot be opened."""
    if not pending(config.data.root):
        config.data.open()
    if not pending(config.segmenter):
        Segmenter.load(config.segmenter)


def stages(config: Config) -> list[Stage]:
    """Returns predict (classes and confidences, image by image) and dataset."""

    def predict(folder: Path, done: dict[str, Path]) -> dict[str, Any]:
        images = config.data.open()
        write_predictions(Segmenter.load(config.segmenter), images, folder)
        return {"images": len(images)}

    def dataset(folder: Path, done: dict[str, Path]) -> dict[str, Any]:
        return write_dataset(config.data.open(), done["predict"], folder, config.quantile, config.cap)

    seen = {"data": config.data, "segmenter": config.segmenter}
    chosen = {"quantile": config.quantile, "cap": config.cap}
    return [
        Stage("predict", predict, seen, alone=True),
        Stage("dataset", dataset, chosen, ("predict",), alone=True),
    ]


def plan(config: Config) -> Plan:
    """Returns the stages and, where the images are on this machine, their number."""
    named = tuple((stage.name, "") for stage in stages(config))
    return Plan(stages=named, notes=() if pending(config.data.root) else (f"{len(config.data.open())} images",))


def confident_forward(segmenter: Segmenter) -> Forward:
    """Returns the forward of a segmenter with the probability of each label as its score.

    Of a network these are the softmax of its logits, averaged over windows and flips; their arg max is the label.
    """
    predictor = segmenter.forward
    if not isinstance(predictor, Predictor):
        return predictor
    scores = predictor.forward

    def probabilities(params: Any, pixels: Float[Array, "n H W 3"]) -> Float[Array, "n h w k"]:
        return jax.nn.softmax(scores(params, pixels).astype(jnp.float32))

    return Predictor(probabilities, predictor.params, predictor.protocol)


def write_predictions(segmenter: Segmenter, images: Dataset, folder: Path) -> None:
    """Writes `labels/<name>.png` and `confidence/<name>.png`, 16 bits for 0..1, and the class list.

    Images that have both files are not predicted again. Raises UserError for a folder of another segmenter or other
    images.
    """
    claim(folder, {"segmenter": segmenter.fingerprint, "data": images.digest(labels=False)})
    segmenter.classes.save(folder / CLASSES_FILE)
    forward = confident_forward(segmenter)
    for item in track(list(images.items), "predict"):
        paths = [_png(folder / part, item.name) for part in ("labels", "confidence")]
        if all(map(is_whole, paths)):
            continue
        labels, scores = forward(read_image(item.image))
        confidence = np.round(np.clip(np.asarray(scores), 0, 1) * LEVELS).astype(np.uint16)
        with disk_errors(folder):
            for path, values in zip(paths, (np.asarray(labels, np.uint8), confidence), strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_png(path, values)


def write_dataset(images: Dataset, predicted: Path, folder: Path, quantile: float, cap: float) -> dict[str, Any]:
    """Writes a dataset of kind `folder`, split `train`: links to the images, labels with 255 where unsure.

    Returns {"kept": share of all pixels, "classes": {name: {"predicted": share, "kept": share, "threshold"}}}, also
    written as `thresholds.json`.
    """
    classes = ClassList.load(predicted / CLASSES_FILE).names
    counts = np.zeros((len(classes), LEVELS + 1), np.int64)
    for item in images.items:
        counts += histogram(*_prediction(predicted, item.name), len(classes))
    levels = thresholds(counts, quantile, cap)
    for item in track(list(images.items), "labels"):
        labels, confidence = _prediction(predicted, item.name)
        path = _png(folder / SPLIT / "labels", item.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, sure_labels(labels, confidence, levels))
        image = Path(item.image).resolve()
        link = folder / SPLIT / "images" / f"{item.name}{image.suffix.lower()}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(image)
    (folder / CLASSES_FILE).write_bytes((predicted / CLASSES_FILE).read_bytes())
    total = max(int(counts.sum()), 1)
    kept = [int(row[level:].sum()) for row, level in zip(counts, levels, strict=True)]
    rows = {
        name: {"predicted": row.sum() / total, "kept": count / total, "threshold": level / LEVELS}
        for name, row, count, level in zip(classes, counts, kept, levels.tolist(), strict=True)
    }
    facts = {"kept": sum(kept) / total, "classes": rows}
    write_json(folder / "thresholds.json", facts)
    return facts


def histogram(
    labels: UInt8[np.ndarray, "h w"], confidence: UInt16[np.ndarray, "h w"], classes: int
) -> Int[np.ndarray, "k levels"]:
    """Returns the number of pixels by class and 16-bit confidence; labels that are no class are left out."""
    place = labels.astype(np.int64) * (LEVELS + 1) + confidence
    counted = np.bincount(place[labels < classes], minlength=classes * (LEVELS + 1))
    return counted.reshape(classes, LEVELS + 1)


def thresholds(counts: Int[np.ndarray, "k levels"], quantile: float, cap: float) -> Int[np.ndarray, " k"]:
    """Returns the least 16-bit confidence of each class: its quantile, at most `cap` (Yang and Soatto 2020, FDA)."""
    sizes = counts.sum(1)
    places = np.clip(np.round(sizes * quantile).astype(np.int64), 0, np.maximum(sizes - 1, 0))
    sums = counts.cumsum(1)
    levels = [np.searchsorted(row, place, side="right") for row, place in zip(sums, places, strict=True)]
    return np.minimum(levels, round(cap * LEVELS))


def sure_labels(
    labels: UInt8[np.ndarray, "h w"], confidence: UInt16[np.ndarray, "h w"], levels: Int[np.ndarray, " k"]
) -> UInt8[np.ndarray, "h w"]:
    """Returns the labels, 255 where the confidence is below the level of its class or there is no class."""
    least = np.full(256, LEVELS + 1)
    least[: len(levels)] = levels
    return np.where(confidence >= least[labels], labels, np.uint8(UNSURE))


def _png(folder: Path, name: str) -> Path:
    return folder / f"{name}.png"


def _prediction(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    return read_png(_png(folder / "labels", name)), read_png(_png(folder / "confidence", name))
