"""`open_dataset`: a known dataset, or a folder of the user, as a sequence of examples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from jaxtyping import Int32, UInt8

from fmda.data.catalog import ALIASES, CATALOG, Entry, Labels, Split
from fmda.data.classes import ClassList, ClassMap, class_list
from fmda.data.digest import digest, file_evidence
from fmda.data.files import FileFault, read_image, read_labels
from fmda.data.search import label_file, label_files, locate, unique_names
from fmda.errors import UserError, did_you_mean
from fmda.places import data_root


@dataclass(frozen=True, eq=False)
class Example:
    """An image and its label map.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        labels: uint8 [H, W] in the dataset's class list, 255 where there is no class; None without labels.
        name: the image's name, unique in its dataset.
        margins: int32 [4], of a crop the rows of the whole image above and below it and the columns left and right of
            it; None elsewhere, and where `training_transform` is not asked for them.
    """

    image: UInt8[np.ndarray, "H W 3"]
    labels: UInt8[np.ndarray, "H W"] | None
    name: str
    margins: Int32[np.ndarray, "4"] | None = None


@dataclass(frozen=True)
class Item:
    """One image of a dataset: its name, its file, its label file if there is one, and how to read that."""

    name: str
    image: str
    label: str | None
    form: Labels | None


class Dataset(Sequence[Example]):
    """A sequence of examples that are read on access. Made by `open_dataset`; light, and picklable.

    Attributes:
        name, split, root: the dataset, its part and its folder.
        classes: the class list of the labels.
        items: the files.
        class_map: a further map that the labels go through (`mapped`).
        orphans: label files without an image, of a dataset opened with `strict=False`.
        label_pattern: the expected label files; None where none are expected.
    """

    def __init__(
        self,
        name: str,
        split: str,
        root: Path,
        items: Sequence[Item],
        classes: ClassList,
        *,
        class_map: ClassMap | None = None,
        orphans: Sequence[str] = (),
        label_pattern: str | None = None,
    ) -> None:
        self.name, self.split, self.root = name, split, Path(root)
        self.items = tuple(items)
        self.classes = classes if class_map is None else class_map.target
        self.class_map = class_map
        self.orphans = tuple(orphans)
        self.label_pattern = label_pattern
        self._file_classes = classes

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Dataset": ...
    def __getitem__(self, index: "int | slice") -> "Example | Dataset":
        """Returns one example, or a dataset of some of them. Raises FileFault naming the file and the fault."""
        if isinstance(index, slice):
            return self.subset(range(len(self))[index])
        item = self.items[index]
        image = read_image(item.image)
        labels = self.labels(index)
        if labels is not None:
            check_size(item, labels, image.shape[:2])
        return Example(image, labels, item.name)

    def __repr__(self) -> str:
        return f"Dataset({self.name} {self.split}: {len(self)} images, {len(self.classes)} classes)"

    def labels(self, index: int) -> UInt8[np.ndarray, "H W"] | None:
        """Returns one label map, uint8 [H, W] in `classes`, without reading its image; None without labels.

        Raises FileFault for a faulty file or a value outside the class list.
        """
        raw = self.raw_labels(index)
        if raw is None:
            return None
        item = self.items[index]
        to_list = ClassMap.load(item.form.class_map) if item.form and item.form.class_map else None
        in_file = to_list.source if to_list else self._file_classes
        allowed = in_file.allowed()[raw]
        if not allowed.all():
            text = f"0-{len(in_file) - 1}, {in_file.ignore} for none"
            message = f"label value {raw[~allowed][0]} is outside the class list ({text}); correct the file or the list"
            raise FileFault(str(item.label), "value outside", message)
        labels = to_list.apply(raw) if to_list else np.where(raw < len(in_file), raw, np.uint8(in_file.ignore))
        return labels if self.class_map is None else self.class_map.apply(labels)

    def raw_labels(self, index: int) -> UInt8[np.ndarray, "H W"] | None:
        """Returns the values in a label file, uint8 [H, W], before any map; None without labels."""
        item = self.items[index]
        if item.label is None or item.form is None:
            return None
        return read_labels(item.label, red16=item.form.red16)

    def digest(self, *, labels: bool = True) -> str:
        """Returns 16 hexadecimal digits of image names, file contents and, with `labels`, how the labels are read.

        Independent of the root's place and of file times; see `fmda.data.digest.file_evidence`.
        """

        def parts() -> Iterator[str | bytes]:
            for item in self.items:
                yield item.name
                yield file_evidence(item.image)
                if labels and item.label is not None and item.form is not None:
                    yield file_evidence(item.label)
                    yield repr(item.form)
            if labels:
                yield repr((self._file_classes.names, self._file_classes.void))
                yield b"" if self.class_map is None else self.class_map.table.tobytes()

        return digest(parts())

    def subset(self, indices: Sequence[int]) -> "Dataset":
        """Returns the dataset of the examples at `indices`, in that order."""
        items = [self.items[i] for i in indices]
        return Dataset(self.name, self.split, self.root, items, self._file_classes, class_map=self.class_map)

    def only(self, names: Sequence[str]) -> "Dataset":
        """Returns the dataset of the images of these names, in that order. Raises UserError for an unknown one."""
        places = {item.name: index for index, item in enumerate(self.items)}
        for name in names:
            if name not in places:
                raise UserError(f"{self.root}: split '{self.split}' has no image '{name}'{did_you_mean(name, places)}")
        return self.subset([places[name] for name in names])

    def mapped(self, class_map: str | Path | ClassMap) -> "Dataset":
        """Returns the same images with their labels in another class list.

        Raises UserError if the map does not start from this dataset's classes.
        """
        onward = ClassMap.load(class_map)
        if onward.source.names != self.classes.names:
            raise UserError(
                f"{class_map}: maps from {onward.source!r}, but {self.name} has {self.classes!r}; name another map"
            )
        if self.class_map is not None:
            raise UserError(f"{self.name}: its labels are mapped already; open it anew and map it once")
        return Dataset(self.name, self.split, self.root, self.items, self._file_classes, class_map=onward)


def open_dataset(
    name: str,
    root: str | Path | None = None,
    split: str = "val",
    *,
    labels: bool = True,
    strict: bool = True,
) -> Dataset:
    """Returns a dataset as a sequence of examples, sorted by name.

    Args:
        name: a known dataset (`known_datasets`), "folder" for one's own images and labels, "world" for a rendered one.
        root: the dataset's folder, or the folder above it; default: `data_root()`.
        split: which part.
        labels: False opens the images alone, also where there are no labels.
        strict: False leaves images without labels in, for `check` to report; True makes them an error.

    Raises UserError, in one line, for an unknown name or split, a missing or wrong folder (with the layout that is
    expected), an empty set, and images without labels.
    """
    name, entry = _entry(name)
    if root is None and not entry.places:
        raise UserError(f"'{name}' has no usual place; name its folder with root= (data.root= for a run)")
    if not entry.free and split not in entry.splits:
        raise UserError(f"{name} has no split '{split}'; it has: {', '.join(entry.splits)}")
    part = Split((split,)) if entry.free else entry.splits[split]
    if labels and strict and not part.labelled:
        raise UserError(f"split '{split}' of {name} has no labels; open it with labels=False or take another split")
    labels = labels and part.labelled
    top = data_root() if root is None else Path(root).expanduser()
    folder, layout, files = locate(name, entry, top, split, part, labels=labels, needs_labels=labels and strict)
    items = []
    place = 0
    for key, (path, fields) in zip(unique_names(files), files, strict=True):
        label: str | None = None
        if labels:
            label, place = label_file(folder, layout, fields, place)
        items.append(Item(key, str(path), label, layout.labels[place] if label else None))
    missing = [item for item in items if item.label is None]
    classes = _classes(entry, folder, split, needed=labels and (strict or len(missing) < len(items)))
    pattern = None
    if labels and layout.labels:
        pattern = layout.labels[0].pattern.replace("{split}", part.folders[0]).replace("{name}", split)
    if labels and strict and missing:
        raise UserError(
            f"{missing[0].image}: image without label ({len(missing)} of {len(items)}); looked for {pattern} "
            f"in {folder}; add it, or open with labels=False"
        )
    orphans: list[str] = []
    # part of a folder: the other labels belong to other splits
    if labels and not strict and not (part.listed or part.starts or part.part):
        forms = {item.form for item in items if item.form} or set(layout.labels[:1])
        taken = {item.label for item in items}
        orphans = sorted({f for form in forms for f in label_files(folder, form.pattern, split, part)} - taken)
    return Dataset(name, split, folder, items, classes, orphans=orphans, label_pattern=pattern)


def dataset_classes(name: str) -> ClassList | None:
    """Returns the class list of a dataset by its name; None for folders with one of their own."""
    entry = _entry(name)[1]
    return class_list(entry.classes) if entry.classes else None


def _entry(name: str) -> tuple[str, Entry]:
    name = name.lower().replace("_", "-")
    name = ALIASES.get(name, name)
    if name not in CATALOG:
        raise UserError(f"'{name}': no such dataset{did_you_mean(name, CATALOG)}")
    return name, CATALOG[name]


def _classes(entry: Entry, folder: Path, split: str, *, needed: bool) -> ClassList:
    """Returns the set's class list; for free folders that of its classes.yaml, an empty one if not `needed`."""
    if not entry.free:
        return class_list(entry.classes)
    for place in (folder / split / "classes.yaml", folder / "classes.yaml"):
        if place.is_file():
            return ClassList.load(place)
    if entry.classes:
        return class_list(entry.classes)
    if needed:
        raise UserError(
            f"{folder / 'classes.yaml'}: no class list; write `classes:` with the names in label order, "
            "or open with labels=False"
        )
    return ClassList(())


def check_size(item: Item, labels: UInt8[np.ndarray, "H W"], size: tuple[int, ...]) -> None:
    """Raises FileFault where labels do not have the (height, width) of their image."""
    if labels.shape != size:
        label_size, image_size = (f"{width}x{height}" for height, width in (labels.shape, size))
        raise FileFault(
            str(item.label),
            "size differs",
            f"labels are {label_size} but the image {item.image} is {image_size}; give both one size",
        )
