"""Prediction of many files into a folder: label maps and overlays. An interrupted call resumes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmda.data.digest import file_evidence
from fmda.errors import UserError, disk_errors
from fmda.evaluate.images import image_files
from fmda.evaluate.segmenter import Segmentation, Segmenter, overlay_path
from fmda.progress import track
from fmda.runs.journal import Journal, read_rows

JOURNAL = "predictions.jsonl"
"""Image and model of each label map in the folder; a line is written before its files."""

SHOWN = 3


def predict_files(segmenter: Segmenter, images: Sequence[str | Path], out: str | Path) -> Iterator[dict[str, Any]]:
    """Yields one record per image after writing `<name>.png` (labels) and `<name>_overlay.jpg` into `out`.

    A record holds `image`, `labels`, `overlay` (paths) and `classes` (name -> share of the pixels, largest first).
    What an earlier call predicted from the same image with the same model is kept, an image that changed is predicted
    again, and no other file is replaced. An image that cannot be read does not stop the others.

    Raises:
        UserError: before the first prediction a missing image, two images of one name, or an output that exists; after
            the last one the images that could not be predicted.
    """
    out = Path(out)
    targets = _targets(image_files(images), out)
    rows = {row["name"]: row for row in read_rows(out / JOURNAL)}
    for target, file in targets.items():
        _refuse_others(target, file, rows.get(target.name), segmenter.fingerprint)
    faults: list[str] = []
    with Journal(out / JOURNAL) as journal:
        for target, file in track(list(targets.items()), "predict"):
            row, outputs = rows.get(target.name, {}), (target, overlay_path(target))
            try:
                evidence = file_evidence(file).hex()
                finished = row.get("evidence") == evidence and all(path.exists() for path in outputs)
                result = None if finished else segmenter.predict(file)
            except (UserError, OSError) as fault:
                faults.append(str(fault))
                continue
            if result is not None:
                row = {"name": target.name, "image": str(file), "model": segmenter.fingerprint}
                row |= {"evidence": evidence, "classes": _shares(result)}
                with disk_errors(journal.path):
                    for path in outputs:
                        path.unlink(missing_ok=True)
                    journal.append(row)
                result.save(target)
            labels, overlay = map(str, outputs)
            yield {"image": str(file), "labels": labels, "overlay": overlay, "classes": row["classes"]}
    if faults:
        more = f" (and {len(faults) - SHOWN} more)" if len(faults) > SHOWN else ""
        raise UserError(
            f"{len(faults)} of {len(targets)} images could not be predicted: {'; '.join(faults[:SHOWN])}{more}; fix or "
            "remove them and run the same command again"
        )


def _targets(files: Sequence[Path], out: Path) -> dict[Path, Path]:
    """Returns the label map's path -> the image."""
    targets: dict[Path, Path] = {}
    for file in files:
        target = out / f"{file.stem}.png"
        if target in targets:
            raise UserError(f"{file}: has the same name as {targets[target]}; predict them into two folders")
        targets[target] = file
    return targets


def _refuse_others(target: Path, file: Path, row: dict[str, Any] | None, model: str) -> None:
    """Raises UserError for an output that exists and was made from another image or by another model."""
    path = next((path for path in (target, overlay_path(target)) if path.exists()), None)
    if path is None:
        return
    if row is None:
        fault = "exists already"
    elif row["model"] != model:
        fault = "was predicted by another model"
    elif Path(row["image"]).absolute() == file.absolute() or file_evidence(file).hex() == row["evidence"]:
        return
    else:
        fault = f"was predicted from {row['image']}"
    raise UserError(f"{path}: {fault}; choose another output folder or delete it")


def _shares(result: Segmentation) -> dict[str, float]:
    """Returns each class's share of the pixels, largest first."""
    values, counts = np.unique(result.labels, return_counts=True)
    ranked = sorted(zip(counts.tolist(), values.tolist(), strict=True), reverse=True)
    names = result.classes.names
    return {names[k]: round(n / result.labels.size, 4) for n, k in ranked if k < len(names)}
