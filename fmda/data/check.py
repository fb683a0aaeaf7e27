"""`check`: is a data set fit for a run? Every fault with its file, and the pixels of each class."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64

from fmda.data.catalog import CATALOG
from fmda.data.classes import ClassList
from fmda.data.dataset import Dataset
from fmda.data.files import FileFault, read_image
from fmda.progress import track

THREADS = 2
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
        name, split: the data set.
        images: how many images it has; `expected` is the published number, where it is known.
        faults: everything that would stop a run; empty means fit.
        notes: what is odd but harmless.
        sizes: how many images have each (height, width).
        pixels: int64 [K], labelled pixels of each class.
        ignored: pixels without a class.
    """

    name: str
    split: str
    images: int
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
        lines.append("fit for a run" if not self.faults else f"not fit for a run: {len(self.faults)} faults")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {
            "name": self.name,
            "split": self.split,
            "images": self.images,
            "expected": self.expected,
            "fit": not self.faults,
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


def check(dataset: Dataset) -> DataReport:
    """Returns a report on every file of a data set; opens and decodes all of them.

    Found are: no images, images without label and labels without image (open the set with `strict=False`, else the
    first such pair is already an error), missing, truncated, 16-bit and colour files, image and label of different
    size, and label values outside the class list. Pixels are counted by class, 255 apart. Nothing is changed.
    """
    faults: list[Fault] = []
    sizes: Counter[tuple[int, int]] = Counter()
    counts = np.zeros(256, np.int64)
    wants_labels = any(item.label is not None for item in dataset.items)
    for seen in track(_examine(dataset, wants_labels), f"check {dataset.name}", len(dataset)):
        faults += seen.faults
        counts += seen.counts
        if seen.size:
            sizes[seen.size] += 1
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
    if wants_labels and absent:
        notes.append(f"classes without a pixel: {', '.join(absent)}")
    return DataReport(
        name=dataset.name,
        split=dataset.split,
        images=len(dataset),
        expected=expected,
        faults=tuple(faults),
        notes=tuple(notes),
        sizes=dict(sizes),
        classes=dataset.classes,
        pixels=counts[:known].copy(),
        ignored=int(counts[known:].sum()),
    )


def _examine(dataset: Dataset, wants_labels: bool) -> Iterator[_Seen]:
    """Yields what each example shows, in order; decoding lets go of the interpreter, so threads help."""
    with ThreadPoolExecutor(THREADS) as pool:
        # a bounded window: a plain map over a large set would queue every result
        step = 64
        for start in range(0, len(dataset), step):
            window = range(start, min(start + step, len(dataset)))
            yield from pool.map(lambda i: _examine_one(dataset, i, wants_labels), window)


def _examine_one(dataset: Dataset, index: int, wants_labels: bool) -> _Seen:
    item = dataset.items[index]
    faults: list[Fault] = []
    size: tuple[int, int] | None = None
    labels = None
    try:
        height, width, _ = read_image(item.image).shape
        size = (height, width)
    except FileFault as fault:
        faults.append(Fault(fault.kind, fault.path, str(fault)))
    try:
        labels = dataset.labels(index)
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
    return _Seen(faults, size, counts)
