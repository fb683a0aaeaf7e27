"""Is a dataset fit for a run? `check` reports every fault with its file; `check_images` decodes before training."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int64

from fmda.data.catalog import CATALOG
from fmda.data.classes import ClassList
from fmda.data.dataset import Dataset
from fmda.data.files import FileFault, read_image
from fmda.errors import UserError
from fmda.progress import track

THREADS = 2
WINDOW = 64
SHOWN_FAULTS = 20


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: a short `kind`, the file, and what to do in one line."""

    kind: str
    file: str
    message: str


@dataclass(frozen=True)
class DataReport:
    """What `check` found.

    Attributes:
        name, split: the dataset.
        images: how many images it has; `expected` is the published number, where it is known.
        labelled: how many images have a label file. A set without any is fit as unlabelled images alone.
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
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]
    sizes: dict[tuple[int, int], int]
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
        return "fit for a run" if self.labelled else "fit only as unlabelled images: no label found"

    def table(self) -> str:
        """Returns the classes with their pixels and shares, as aligned text."""
        width = max((len(name) for name in self.classes.names), default=5)
        rows = [f"{'class':<{width}}  {'pixels':>14}  {'share':>7}"]
        for name, count, share in zip(self.classes.names, self.pixels, self.shares, strict=True):
            rows.append(f"{name:<{width}}  {int(count):>14,}  {100 * share:>6.2f}%")
        every = max(1, int(self.pixels.sum()) + self.ignored)
        rows.append(f"{'no class':<{width}}  {self.ignored:>14,}  {100 * self.ignored / every:>6.2f}% of all")
        return "\n".join(rows)

    def text(self) -> str:
        """Returns the whole report for a terminal: counts, sizes, notes, classes, faults."""
        sizes = ", ".join(f"{w}x{h} ({n})" for (h, w), n in Counter(self.sizes).most_common(4))
        more = f", and {len(self.sizes) - 4} more" if len(self.sizes) > 4 else ""
        lines = [f"{self.name} {self.split}: {self.images} images, {sizes or 'no size'}{more}"]
        lines += [f"note: {note}" for note in self.notes]
        if self.pixels.any() or self.ignored:
            lines += ["", self.table()]
        lines += ["", *(f"{kind}: {count}" for kind, count in Counter(f.kind for f in self.faults).items())]
        lines += [f"  {fault.message}" for fault in self.faults[:SHOWN_FAULTS]]
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
            "faults": [{"kind": f.kind, "file": f.file, "message": f.message} for f in self.faults],
            "notes": list(self.notes),
            "sizes": [[h, w, n] for (h, w), n in sorted(self.sizes.items())],
            "pixels": {n: int(c) for n, c in zip(self.classes.names, self.pixels, strict=True)},
            "shares": {n: float(s) for n, s in zip(self.classes.names, self.shares, strict=True)},
            "ignored": self.ignored,
        }


@dataclass(frozen=True)
class _Seen:
    faults: list[Fault]
    size: tuple[int, int] | None
    counts: np.ndarray
    has_255: bool = False


def check(dataset: Dataset) -> DataReport:
    """Returns a report on every file of a dataset; opens and decodes all of them.

    Found are: no images, images without label and labels without image (open the set with `strict=False`, else the
    first such pair is already an error), missing, truncated, 16-bit, lossy and colour files, image and label of
    different size, and label values outside the class list. Pixels are counted by class, 255 apart. Nothing is changed.
    """
    faults: list[Fault] = []
    sizes: Counter[tuple[int, int]] = Counter()
    counts = np.zeros(256, np.int64)
    labelled = sum(item.label is not None for item in dataset.items)
    reduced = 0
    for examined in track(_examine(dataset, labelled > 0), f"check {dataset.name}", len(dataset)):
        faults += examined.faults
        counts += examined.counts
        reduced += examined.has_255
        if examined.size:
            sizes[examined.size] += 1
    for path in dataset.orphans:
        faults.append(Fault("label without image", path, f"{path}: label without image; remove it or add the image"))
    if not len(dataset):
        where = str(dataset.root)
        faults.append(Fault("empty", where, f"{where}: no images; check the folder and the split"))
    entry = CATALOG.get(dataset.name)
    part = entry.splits.get(dataset.split) if entry else None
    expected = part.size if part else None
    notes = []
    if expected is not None and expected != len(dataset):
        notes.append(f"the published split has {expected} images, this folder {len(dataset)}")
    known = len(dataset.classes)
    absent = [n for n, c in zip(dataset.classes.names, counts[:known], strict=True) if not c]
    if reduced:
        notes.append(
            f"255 occurs in {reduced} label files, which the published {dataset.name} labels never hold: their "
            "ids were probably lowered by one already, and every class would be one too low; use the published files"
        )
    if not labelled and dataset.label_pattern:
        notes.append(f"looked for labels {dataset.label_pattern} in {dataset.root}")
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
        pixels=counts[:known].copy(),
        ignored=int(counts[known:].sum()),
    )


Item = TypeVar("Item")
Result = TypeVar("Result")


def check_images(images: Dataset | Sequence[str | Path], skip: bool = False) -> Any:
    """Returns the images that are whole, a Dataset or a list of paths, after decoding each once, with its labels.

    For a training that draws images at random: a broken file is found before the first step.

    Raises UserError naming the broken files, unless `skip`: then a warning names them and they are left out.
    """
    if isinstance(images, Dataset):
        faults = [examined.faults for examined in track(_examine(images, True), f"check {images.name}", len(images))]
    else:
        faults = list(track(_in_threads(_image_faults, images), "check images", len(images)))
    whole = [i for i, image_faults in enumerate(faults) if not image_faults]
    messages = [fault.message for image_faults in faults for fault in image_faults]
    if messages:
        more = f" (and {len(messages) - 3} more)" if len(messages) > 3 else ""
        text = "; ".join(messages[:3]) + more
        if not skip or not whole:
            raise UserError(f"{len(faults) - len(whole)} of {len(faults)} images cannot be used: {text}")
        warnings.warn(f"{len(faults) - len(whole)} of {len(faults)} images are left out: {text}", stacklevel=2)
    if isinstance(images, Dataset):
        return images.subset(whole) if messages else images
    return [images[i] for i in whole]


def _in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yields results in order; decoding releases the interpreter lock, so threads help."""
    with ThreadPoolExecutor(THREADS) as pool:
        # a bounded window: a plain map over a large set would queue every result
        for start in range(0, len(items), WINDOW):
            yield from pool.map(function, items[start : start + WINDOW])


def _examine(dataset: Dataset, wants_labels: bool) -> Iterator[_Seen]:
    return _in_threads(lambda i: _examine_one(dataset, i, wants_labels), range(len(dataset)))


def _image_faults(path: str | Path) -> list[Fault]:
    try:
        read_image(path)
    except FileFault as fault:
        return [Fault(fault.kind, fault.path, str(fault))]
    return []


def _examine_one(dataset: Dataset, index: int, wants_labels: bool) -> _Seen:
    item = dataset.items[index]
    faults: list[Fault] = []
    size: tuple[int, int] | None = None
    labels, has_255 = None, False
    try:
        height, width, _ = read_image(item.image).shape
        size = (height, width)
    except FileFault as fault:
        faults.append(Fault(fault.kind, fault.path, str(fault)))
    try:
        labels = dataset.labels(index)
        if labels is not None and item.form and item.form.lacks_255:
            raw = dataset.raw_labels(index)
            has_255 = raw is not None and bool((raw == 255).any())
    except FileFault as fault:
        faults.append(Fault(fault.kind, fault.path, str(fault)))
    if item.label is None and wants_labels:
        message = f"{item.image}: image without label; add the label or remove the image"
        faults.append(Fault("image without label", item.image, message))
    if labels is not None and size is not None and labels.shape != size:
        message = (
            f"{item.label}: labels are {labels.shape[1]}x{labels.shape[0]}, the image {size[1]}x{size[0]}; "
            "give both one size"
        )
        faults.append(Fault("size differs", str(item.label), message))
    counts = np.zeros(256, np.int64)
    if labels is not None:
        counts += np.bincount(labels.ravel(), minlength=256)
    return _Seen(faults, size, counts, has_255)
