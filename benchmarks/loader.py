"""Images a second of the training loader, over a folder of PNG images and label maps, by number of workers.

The pictures are noise over gradients, so that PNG decoding costs about what a photograph's does. Each batch is a
random crop with flip, as training takes them. "resident" decodes all once, holds them on the device and crops there;
its first batch includes that. All take turns, several rounds.

    python benchmarks/loader.py --workers 0 2 --out benchmarks/results/loader-cpu.json
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from sides.record import record, write_record
from sides.timing import Timing

from fmda.augment.geometry import flipped, windows
from fmda.data import ClassList, open_dataset
from fmda.data.resident import resident
from fmda.data.streams import Stream, batches
from fmda.data.transforms import training_transform


def write_folder(folder: Path, count: int, height: int, width: int) -> None:
    """Writes `count` images with label maps in the layout of the data set "folder"."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    ClassList(tuple(f"class {k}" for k in range(19))).save(folder / "classes.yaml")
    slope = np.linspace(0, 180, width)[None, :, None] + np.zeros((height, 1, 3))
    for k in range(count):
        image = (slope + rng.normal(40, 6, (height, width, 3))).clip(0, 255).astype(np.uint8)
        labels = rng.integers(0, 19, (height // 16 + 1, width // 16 + 1)).astype(np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{k:04}.png")
        Image.fromarray(labels.repeat(16, 0).repeat(16, 1)[:height, :width]).save(folder / "labels" / f"{k:04}.png")


def rate(stream: Stream, workers: int | None, seconds: float) -> tuple[float, float]:
    """Returns (images a second after two batches, seconds until the first batch); `workers` None: resident."""
    begin, use = time.perf_counter(), jax.device_put
    if workers is None:
        held = resident(stream, float("inf"))
        assert held is not None
        arrays, stream = jax.device_put(held.arrays), held.stream

        @jax.jit
        def use(places: dict[str, jax.Array]) -> dict[str, jax.Array]:
            cut = windows(arrays, places["row"], places["top"], places["left"], held.crop)
            return flipped(cut, places["flip"])

    with batches(stream, 0, workers=workers or 0) as loader:
        jax.block_until_ready(use(next(loader)))
        first = time.perf_counter() - begin
        jax.block_until_ready(use(next(loader)))
        start, images = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            images += len(jax.block_until_ready(use(next(loader)))["image"])
        return images / (time.perf_counter() - start), first


def main() -> None:
    """Runs the benchmark and prints its record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--size", type=int, nargs=2, default=[512, 1024], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--side", type=int, default=448, help="of the crop, in pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out")
    options = parser.parse_args()

    cases = {f"{workers} workers": workers for workers in options.workers} | {"resident": None}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), options.images, *options.size)
        transform = training_transform((options.side, options.side), max_class_ratio=1.0)
        stream = Stream(open_dataset("folder", folder), transform, options.batch)
        for _ in range(options.rounds):
            for name, workers in cases.items():
                found[name].append(rate(stream, workers, options.seconds))
    ours = {}
    for name, values in found.items():
        rates = Timing(tuple(r for r, _ in values))
        ours[name] = {
            "images_per_second": rates.median,
            "spread": rates.spread,
            "first_batch_s": float(np.median([first for _, first in values])),
        }
    result = record(
        "loader",
        size=options.size,
        side=options.side,
        batch=options.batch,
        load_per_core=os.getloadavg()[0] / len(os.sched_getaffinity(0)),
        synthetic="PNG files of noise over gradients, in the page cache",
        ours=ours,
    )
    write_record(result, options.out)


if __name__ == "__main__":
    main()
