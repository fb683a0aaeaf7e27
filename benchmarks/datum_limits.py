"""What limits DATUM: the number of its images, the autoencoder, or what the diffusion model draws? Does the image help?

    python benchmarks/datum_limits.py runs/adaptation --out benchmarks/results/cpu-datum-limits.json

Reads a folder of `configs/tables/adaptation.yaml` whose rows `dacs`, `untouched model` and `datum` are finished. For
each seed, trains as `datum` does, but on real images of the target: as many windows of the size that the model draws,
and the same windows encoded and decoded by its autoencoder, which no diffusion model on top of it can surpass; and on
generated images, DATUM's or the untouched model's, beside as many windows of the one image that DATUM saw. Scores are
mIoU on the table's test images, beside those of the table's rows.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from sides.record import record, write_record

from fmda.data import open_dataset, read_image
from fmda.evaluate import Segmenter, evaluate_dataset
from fmda.methods.kinds import open_run
from fmda.models.sd_vae import signed
from fmda.png import write_png
from fmda.weights.files import read_json, write_json
from fmda.weights.load import load_vae

ROWS = ("source only", "dacs", "untouched model", "datum")
GENERATED = {"untouched model": "generate untouched", "datum": "generate"}
MODEL, BATCH = "street-diffusion", 20


def placed(value: Any, table: Path) -> Any:
    """Returns a cell's configuration with the folders of the table it refers to."""
    if isinstance(value, dict):
        return {name: placed(one, table) for name, one in value.items()}
    return str(table / value[1:]) if isinstance(value, str) and value.startswith("@") else value


def cell_folder(table: Path, row: str, column: str, seed: int) -> Path:
    """Returns the folder of a finished cell, of a row that is trained once for all columns too."""
    cells = table / "cells" / row
    return (cells / column if (cells / column).is_dir() else cells) / str(seed)


def scored(table: Path, row: str, column: str, seed: int) -> float:
    """Returns the test mIoU of a finished cell."""
    score = read_json(cell_folder(table, row, column, seed) / f"test-{column}/stage.json")
    return round(score["outputs"]["miou"], 4)


def write_windows(table: Path, column: str, count: int, folder: Path) -> None:
    """Writes windows of the target in `crops/` and what the autoencoder makes of them in `through autoencoder/`."""
    vae = load_vae(MODEL)
    side = vae.config.sample_size
    through = jax.jit(lambda images: vae.decode(vae.encode(images)[0]))
    files = sorted((table / "training/render" / column / "images").glob("*.png"))[:count]
    for start in range(0, len(files), BATCH):
        images = np.stack([read_image(file) for file in files[start : start + BATCH]])
        left = (images.shape[2] - side) // 2
        images = images[:, :side, left : left + side]
        again = np.asarray(through(signed(images)))
        again = np.clip(np.rint((again + 1) * 127.5), 0, 255).astype(np.uint8)
        for name, shown in (("crops", images), ("through autoencoder", again)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            for file, image in zip(files[start:], shown, strict=False):
                write_png(folder / name / file.name, image)


def write_beside_the_image(table: Path, row: str, column: str, seed: int, folder: Path) -> None:
    """Writes a row's generated images, and as many windows of the one image of the target that the seed's DATUM saw."""
    files = sorted((cell_folder(table, GENERATED[row], column, seed) / "images/images").glob("*.png"))
    personalised = read_json(cell_folder(table, "personalise", column, seed) / "identity.json")["config"]
    image = read_image(table / personalised["image"][1:])
    side = read_image(files[0]).shape[1]
    folder.mkdir(parents=True)
    for number, (file, left) in enumerate(
        zip(files, np.linspace(0, image.shape[1] - side, len(files), dtype=int), strict=True)
    ):
        write_png(folder / f"generated-{number:03}.png", read_image(file))
        write_png(folder / f"window-{number:03}.png", image[:side, left : left + side])


def trained(table: Path, column: str, seed: int, images: Path, work: Path) -> float:
    """Returns the test mIoU of DATUM's training on a folder of images."""
    values = placed(read_json(cell_folder(table, "datum", column, seed) / "identity.json")["config"], table)
    values["target"]["root"] = str(images)
    write_json(work.with_suffix(".yaml"), {"kind": "uda", **values})
    done = open_run(work.with_suffix(".yaml"), [f"work_dir={work}"]).execute(print)
    test = open_dataset("world", table / "test/render", split=column)
    return evaluate_dataset(Segmenter.load(done["export"]), test, out=work / "test").miou


def main() -> None:
    """Trains the two rows for each seed and prints the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("--column", default="night")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    table = options.table.resolve()
    scores = {row: {str(seed): scored(table, row, options.column, seed) for seed in options.seeds} for row in ROWS}
    with tempfile.TemporaryDirectory(prefix="fmda-limits-") as name:
        folder = Path(name)
        write_windows(table, options.column, options.count, folder)
        for seed in options.seeds:
            images = {row: folder / row for row in ("crops", "through autoencoder")}
            for row in GENERATED:
                images[f"{row} and the image"] = folder / f"{row}-{seed}"
                write_beside_the_image(table, row, options.column, seed, folder / f"{row}-{seed}")
            for row, root in images.items():
                miou = trained(table, options.column, seed, root, folder / f"{row.replace(' ', '-')}-{seed}")
                scores.setdefault(row, {})[str(seed)] = round(miou, 4)
                print(f"{row}, seed {seed}: {100 * miou:.1f}", flush=True)
    write_record(record("datum_limits", column=options.column, count=options.count, miou=scores), options.out)


if __name__ == "__main__":
    main()
