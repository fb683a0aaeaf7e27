"""Prediction of many files into a folder: label maps and overlays."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fmda.errors import UserError
from fmda.evaluate.images import image_files
from fmda.evaluate.segmenter import Segmenter, overlay_path
from fmda.progress import track


def predict_files(segmenter: Segmenter, images: Sequence[str | Path], out: str | Path) -> Iterator[dict]:
    """Yields one record per image after writing `<name>.png` (labels) and `<name>_overlay.jpg` into `out`.

    A record holds `image`, `labels`, `overlay` (paths) and `classes` (name -> share of the pixels, largest first).
    Everything is checked before the first prediction; existing files are not replaced.

    Raises:
        UserError: a missing image, two images of one name, or an output that exists.
    """
    out = Path(out)
    files = image_files(images)
    targets: dict[Path, Path] = {}
    for file in files:
        target = out / f"{file.stem}.png"
        if target in targets:
            raise UserError(f"{file}: has the same name as {targets[target]}; predict them into two folders")
        for path in (target, overlay_path(target)):
            if path.exists():
                raise UserError(f"{path}: exists already; choose another output folder or delete it")
        targets[target] = file
    for target, file in track(list(targets.items()), "predict"):
        result = segmenter.predict(file)
        labels, picture = result.save(target)
        values, counts = np.unique(result.labels, return_counts=True)
        found = sorted(zip(counts.tolist(), values.tolist(), strict=True), reverse=True)
        names = segmenter.classes.names
        shares = {names[k]: round(n / result.labels.size, 4) for n, k in found if k < len(names)}
        yield {"image": str(file), "labels": str(labels), "overlay": str(picture), "classes": shares}
