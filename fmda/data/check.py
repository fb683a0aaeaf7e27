"""Checks before a run: `check` reports every fault of a dataset, `check_images` decodes the images of a training."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int64

from fmda.data.catalog import CATALOG
from fmda.data.classes import ClassList
from fmda.data.dataset import Dataset, check_size
from fmda.data.files import FileFault, read_image
from fmda.errors import UserError
from fmda.progress import note, track

THREADS = 2
WINDOW = 64
SHOWN_FAULTS = 20

Result = TypeVar("Result")


@dataclass(frozen=True)
class DataReport:
    """The state of a dataset on disk.

    Attributes:
        name, split: the dataset.
        images: how many images it has; `expected` is the published number, where it is known.
        labelled: how many images have a label file; without any, the dataset is fit as unlabelled images only.
        faults: everything that would stop a run; empty means fit.
        notes: what is odd but harmless.
        sizes: how many images have each (height, width).
        pixels: int64 [K], labelled pixels of each class.
        ignored: pixels without a class.
    """

    name: str
    split: str
    images: int
    labelled: int
    expected: int | None
    faults: tuple[FileFault, ...]
    notes: tuple[str, ...]
    sizes: dict[tuple[int, ...], int]
    classes: ClassList
    pixels: Int64[np.ndarray, "K"]
    ignored: int

    @property
    def shares(self) -> np.ndarray:
        """float64 [K]: each class's share of the labelled pixels; 0 where nothing is labelled."""
        return self.pixels / max(1, int(self.pixels.sum()))

    @property
    def verdict(self) -> str:
        """One line: fit for a run, fit as unlabelled images alone, or not fit."""
        if self.faults:
            return f"not fit for a run: {len(self.faults)} faults"
        return "fit for a run" if self.labelled else "fit only as unlabelled images: there are no labels"

    def text(self) -> str:
        """Returns the whole report for a terminal: counts, sizes, notes, classes, faults."""
        sizes = ", ".join(f"{w}x{h} ({n})" for (h, w), n in Counter(self.sizes).most_common(4))
        more = f", and {len(self.sizes) - 4} more" if len(self.sizes) > 4 else ""
        lines = [f"{self.name} {self.split}: {self.images} images, {sizes or 'no size'}{more}"]
        lines += [f"note: {note}" for note in self.notes]
        total = int(self.pixels.sum()) + self.ignored
        if total:
            width = max((len(name) for name in self.classes.names), default=5)
            lines += ["", f"{'class':<{width}}  {'pixels':>14}  {'share':>7}"]
            for name, count, share in zip(self.classes.names, self.pixels, self.shares, strict=True):
                lines.append(f"{name:<{width}}  {int(count):>14,}  {100 * share:>6.2f}%")
            lines.append(f"{'no class':<{width}}  {self.ignored:>14,}  {100 * self.ignored / total:>6.2f}% of all")
        lines += ["", *(f"{kind}: {count}" for kind, count in Counter(f.kind for f in self.faults).items())]
        lines += [f"  {fault}" for fault in self.faults[:SHOWN_FAULTS]]
        if len(self.faults) > SHOWN_FAULTS:
            lines.append(f"  ... and {len(self.faults) - SHOWN_FAULTS} more")
        lines.append(self.verdict)
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {
            "name": self.name,
            "split": self.split,
            "images": self.images,
            "expected": self.expected,
            "fit": bool(not self.faults and self.labelled),
            "fit_unlabelled": not self.faults,
            "labelled": self.labelled,
            "faults": [{"kind": f.kind, "file": f.path, "message": str(f)} for f in self.faults],
            "notes": list(self.notes),
            "sizes": [[h, w, n] for (h, w), n in sorted(self.sizes.items())],
            "pixels": {n: int(c) for n, c in zip(self.classes.names, self.pixels, strict=True)},
            "shares": {n: float(s) for n, s in zip(self.classes.names, self.shares, strict=True)},
            "ignored": self.ignored,
        }


class _Examined(NamedTuple):
    faults: list[FileFault]
    size: tuple[int, ...] | None
    counts: Int64[np.ndarray, "256"]
    has_255: bool


def check(dataset: Dataset) -> DataReport:
    """Returns a report on every file of a dataset; decodes all of them and changes none.

    Faults are: no image, images without label and labels without image (of a dataset opened with `strict=False`),
    files that `read_image` or `read_labels` refuses, image and label of different size, and label values outside the
    class list.
    """
    faults: list[FileFault] = []
    sizes: Counter[tuple[int, ...]] = Counter()
    counts = np.zeros(256, np.int64)
    labelled = sum(item.label is not None for item in dataset.items)
    reduced = 0
    examine = functools.partial(_examine, dataset, labelled > 0)
    for examined in track(_in_threads(examine, range(len(dataset))), f"check {dataset.name}", len(dataset)):
        faults += examined.faults
        counts += examined.counts
        reduced += examined.has_255
        if examined.size is not None:
            sizes[examined.size] += 1
    faults += [
        FileFault(path, "label without image", "label without image; remove it or add the image")
        for path in dataset.orphans
    ]
    if not len(dataset):
        faults.append(FileFault(dataset.root, "empty", "no images; check the folder and the split"))
    part = CATALOG[dataset.name].splits.get(dataset.split)
    expected = part.size if part else None
    notes = []
    if expected is not None and expected != len(dataset):
        notes.append(f"the published split has {expected} images, this folder {len(dataset)}")
    if reduced:
        notes.append(
            f"255 occurs in {reduced} label files, but never in the published {dataset.name} labels: their ids were "
            "probably reduced by one already, and every class would be one too low; use the published files"
        )
    if not labelled and dataset.label_pattern:
        notes.append(f"looked for labels {dataset.label_pattern} in {dataset.root}")
    known = len(dataset.classes)
    absent = [name for name, count in zip(dataset.classes.names, counts[:known], strict=True) if not count]
    if labelled and absent:
        notes.append(f"classes without a pixel: {', '.join(absent)}")
    return DataReport(
        name=dataset.name,
        split=dataset.split,
        images=len(dataset),
        labelled=labelled,
        expected=expected,
        faults=tuple(faults),
        notes=tuple(notes),
        sizes=dict(sizes),
        classes=dataset.classes,
        pixels=counts[:known],
        ignored=int(counts[known:].sum()),
    )


def check_images(images: Dataset | Sequence[str | Path]) -> None:
    """Decodes each image once, those of a Dataset with their labels. Raises UserError that names the broken files.

    For a training that draws images at random: a broken file stops it before the first step.
    """

    def read(index: int) -> None:
        images[index] if isinstance(images, Dataset) else read_image(images[index])

    _all_read(read, len(images))


def class_pixels(dataset: Dataset) -> Int64[np.ndarray, "n k"]:
    """Returns the pixels of each class in each label map, at its own size; decodes the images too, as `check_images`.

    Raises UserError that names the broken files.
    """

    def counts(index: int) -> Int64[np.ndarray, " k"]:
        return np.bincount(np.asarray(dataset[index].labels).ravel(), minlength=256)[: len(dataset.classes)]

    return np.stack(_all_read(counts, len(dataset)))


def without_broken(images: Dataset) -> Dataset:
    """Returns the dataset of the images that can be read; a warning line, once a process, names the others.

    Raises UserError where no image can be read.
    """
    stats = [(item.image, Path(item.image).lstat()) for item in images.items]
    broken = _broken(tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in stats))
    if len(broken) == len(images):
        raise UserError(f"{images.root}: none of the {len(images)} images can be read; copy or download them again")
    return images.subset([index for index in range(len(images)) if index not in broken])


@functools.lru_cache(maxsize=8)
def _broken(files: tuple[tuple[str, int, int], ...]) -> frozenset[int]:
    """Returns which of the files (path, time, size) cannot be read as images; notes them, if these are not all."""
    faults = list(_faults(lambda index: read_image(files[index][0]).size, len(files)))
    broken = {index: files[index][0] for index, fault in enumerate(faults) if isinstance(fault, FileFault)}
    if 0 < len(broken) < len(files):
        names = ", ".join(list(broken.values())[:3]) + (", ..." if len(broken) > 3 else "")
        note(f"warning: {len(broken)} of {len(files)} images cannot be read and are left out: {names}")
    return frozenset(broken)


def _all_read(read: Callable[[int], Result], count: int) -> list[Result]:
    """Returns what `read` returns for each index. Raises UserError that names the files that it refuses."""
    results = list(_faults(read, count))
    faults = [str(result) for result in results if isinstance(result, FileFault)]
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise UserError(f"{len(faults)} of {count} images cannot be used: {'; '.join(faults[:3])}{more}")
    return [result for result in results if not isinstance(result, FileFault)]


def _faults(read: Callable[[int], Result], count: int) -> Iterator[Result | FileFault]:
    """Yields what `read` returns for each index, or the fault that it raises."""

    def result(index: int) -> Result | FileFault:
        try:
            return read(index)
        except FileFault as fault:
            return fault

    return track(_in_threads(result, range(count)), "check images", count)


def _in_threads(function: Callable[[int], Result], indices: Sequence[int]) -> Iterator[Result]:
    """Yields results in order; decoding releases the interpreter lock, so threads help."""
    with ThreadPoolExecutor(THREADS) as pool:
        # a bounded window: a plain map over a large dataset would queue every result
        for start in range(0, len(indices), WINDOW):
            yield from pool.map(function, indices[start : start + WINDOW])


def _examine(dataset: Dataset, expects_label: bool, index: int) -> _Examined:
    item = dataset.items[index]
    faults: list[FileFault] = []
    size, labels, has_255 = None, None, False
    counts = np.zeros(256, np.int64)
    try:
        size = read_image(item.image).shape[:2]
    except FileFault as fault:
        faults.append(fault)
    try:
        if item.label is None and expects_label:
            message = "image without label; add the label or remove the image"
            raise FileFault(item.image, "image without label", message)
        labels = dataset.labels(index)
        if labels is not None:
            counts = np.bincount(labels.ravel(), minlength=256)
            raw = dataset.raw_labels(index) if item.form and item.form.lacks_255 else None
            has_255 = raw is not None and 255 in raw
            if size is not None:
                check_size(item, labels, size)
    except FileFault as fault:
        faults.append(fault)
    return _Examined(faults, size, counts, has_255)
