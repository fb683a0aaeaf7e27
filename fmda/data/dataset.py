"""`open_dataset`: any known data set, or a folder of one's own, as a sequence of examples."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from jaxtyping import UInt8

from fmda.data.catalog import ALIASES, CATALOG, Entry, Labels, Layout, Split, describe
from fmda.data.classes import ClassList, ClassMap, class_list
from fmda.data.digest import digest, file_evidence
from fmda.data.files import FileFault, read_image, read_labels
from fmda.errors import UserError, did_you_mean

UNDIVIDED = ("val", "all")

_EXTENSIONS = ("png", "jpg", "jpeg", "PNG", "JPG", "JPEG")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, eq=False)
class Example:
    """A picture and its label map.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        labels: uint8 [H, W] in the data set's class list, 255 where there is no class; None without labels.
        name: the image's name, unique in its data set.
    """

    image: UInt8[np.ndarray, "H W 3"]
    labels: UInt8[np.ndarray, "H W"] | None
    name: str


@dataclass(frozen=True)
class Item:
    """One image of a data set: its name, its file, its label file if there is one, and how to read that."""

    name: str
    image: str
    label: str | None
    form: Labels | None


class Dataset(Sequence[Example]):
    """A sequence of examples that are read when asked for. Made by `open_dataset`; light, and picklable.

    Attributes:
        name, split, root: what was opened.
        classes: the class list of the labels.
        items: the files.
        class_map: a further map that the labels go through (`mapped`).
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
    ) -> None:
        self.name, self.split, self.root = name, split, Path(root)
        self.items = tuple(items)
        self.classes = classes if class_map is None else class_map.target
        self.class_map = class_map
        self.orphans = tuple(orphans)
        self._file_classes = classes

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Dataset": ...
    def __getitem__(self, index: "int | slice") -> "Example | Dataset":
        """Returns one example, or a data set of some of them. Raises FileFault naming the file and the fault."""
        if isinstance(index, slice):
            return self.subset(range(len(self))[index])
        item = self.items[index]
        image = read_image(item.image)
        labels = self.labels(index)
        if labels is not None and labels.shape != image.shape[:2]:
            raise FileFault(
                item.label or "",
                "size differs",
                f"labels are {_size(labels)} but the image {item.image} is {_size(image)}; give both one size",
            )
        return Example(image, labels, item.name)

    def __iter__(self) -> Iterator[Example]:
        for index in range(len(self)):
            yield self[index]

    def __repr__(self) -> str:
        return f"Dataset({self.name} {self.split}: {len(self)} images, {len(self.classes)} classes)"

    @property
    def image_paths(self) -> tuple[Path, ...]:
        """The image files, in order."""
        return tuple(Path(item.image) for item in self.items)

    @property
    def label_paths(self) -> tuple[Path | None, ...]:
        """The label files, in order; None where there is none."""
        return tuple(None if item.label is None else Path(item.label) for item in self.items)

    def labels(self, index: int) -> UInt8[np.ndarray, "H W"] | None:
        """Returns one label map, uint8 [H, W] in `classes`, without reading its image; None without labels.

        Raises FileFault for a faulty file or a value outside the class list.
        """
        item = self.items[index]
        if item.label is None or item.form is None:
            return None
        raw = read_labels(item.label, red16=item.form.red16)
        to_list = ClassMap.load(item.form.class_map) if item.form.class_map else None
        in_file = to_list.source if to_list else self._file_classes
        allowed = in_file.allowed()
        if not allowed[raw].all():
            stray = int(raw[~allowed[raw]][0])
            raise FileFault(
                item.label,
                "value outside",
                f"label value {stray} is outside the class list (0-{len(in_file) - 1}, "
                f"{in_file.ignore} for none); mend the file or the list",
            )
        if to_list is not None:
            labels = to_list.apply(raw)
        else:
            labels = np.where(raw < len(in_file), raw, np.uint8(in_file.ignore))
        return labels if self.class_map is None else self.class_map.apply(labels)

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
        """Returns the data set of the examples at `indices`, in that order."""
        items = [self.items[i] for i in indices]
        return Dataset(self.name, self.split, self.root, items, self._file_classes, class_map=self.class_map)

    def mapped(self, class_map: str | Path | ClassMap) -> "Dataset":
        """Returns the same images with their labels in another class list.

        Raises UserError if the map does not start from this data set's classes.
        """
        onward = ClassMap.load(class_map)
        if onward.source.names != self.classes.names:
            raise UserError(
                f"{class_map}: maps from {onward.source!r}, but {self.name} has {self.classes!r}; name another map"
            )
        if self.class_map is not None:
            raise UserError(f"{self.name}: its labels are mapped already; open it anew and map it once")
        return Dataset(self.name, self.split, self.root, self.items, self._file_classes, class_map=onward)


def data_root() -> Path:
    """Returns the folder that holds the data sets: the environment's FMDA_DATA, else `shared/data` beside the
    checkout. It need not exist."""
    named = os.environ.get("FMDA_DATA")
    return Path(named) if named else Path(__file__).resolve().parents[3] / "shared" / "data"


def open_dataset(
    name: str,
    root: str | Path | None = None,
    split: str = "val",
    *,
    labels: bool = True,
    strict: bool = True,
) -> Dataset:
    """Returns a data set as a sequence of examples, sorted by name.

    Args:
        name: a known data set (`known_datasets`), "folder" for one's own images and labels, "world" for a rendered one.
        root: the data set's folder, or the folder above it; default: `data_root()`.
        split: which part.
        labels: False opens the images alone, also where there are no labels.
        strict: False leaves images without labels in, for `check` to report; True makes them an error.

    Raises UserError, in one line, for an unknown name or split, a missing or wrong folder (with the layout that is
    expected), an empty set, and images without labels.
    """
    name = _known_name(name)
    entry = CATALOG[name]
    if root is None and not entry.places:
        raise UserError(f"'{name}' has no usual place; name its folder with root= (data.root= for a run)")
    part = _split(name, entry, split)
    if labels and not part.labelled:
        raise UserError(f"split '{split}' of {name} has no labels; open it with labels=False or take another split")
    folder, layout, found = _locate(name, entry, Path(root or data_root()), split, part, labels)
    classes = _classes(entry, folder, split, labels)
    keys = _unique_names(found)
    items = []
    last = 0
    for key, (path, fields) in zip(keys, found, strict=True):
        label: str | None = None
        if labels:
            label, last = _label_file(folder, layout, fields, last)
        items.append(Item(key, str(path), label, layout.labels[last] if label else None))
    missing = [item for item in items if item.label is None]
    if labels and strict and missing:
        looked = layout.labels[0].pattern if layout.labels else "labels/{key}.png"
        raise UserError(
            f"{missing[0].image}: image without label ({len(missing)} of {len(items)}); looked for {looked} "
            f"in {folder}; add it, or open with labels=False"
        )
    orphans = () if strict or not labels else _orphans(folder, layout, split, part, items)
    return Dataset(name, split, folder, items, classes, orphans=orphans)


def _known_name(name: str) -> str:
    plain = name.lower().replace("_", "-")
    plain = ALIASES.get(plain, plain)
    if plain not in CATALOG:
        raise UserError(f"'{name}': no such data set{did_you_mean(plain, CATALOG)}")
    return plain


def _split(name: str, entry: Entry, split: str) -> Split:
    if entry.free:
        return Split((split,))
    if split not in entry.splits:
        raise UserError(f"{name} has no split '{split}'; it has: {', '.join(entry.splits)}")
    return entry.splits[split]


Found = list[tuple[Path, dict[str, str]]]


def _locate(name: str, entry: Entry, root: Path, split: str, part: Split, labels: bool) -> tuple[Path, Layout, Found]:
    """Returns the first folder and layout that hold images, and these with their pattern fields."""
    folders = [root, *(root / place for place in entry.places)]
    for folder in folders:
        if not folder.is_dir():
            continue
        for layout in entry.layouts:
            undivided = entry.free and "{split}" not in layout.images
            if (undivided and split not in UNDIVIDED) or (labels and not layout.labels):
                continue
            found = _images(folder, layout, split, part)
            if found:
                return folder, layout, found
    layout_text = f"expected layout: {describe(entry)}" + (f"; get it from {entry.home}" if entry.home else "")
    if not root.is_dir():
        raise UserError(
            f"{root}: no such folder (for data set '{name}'); name it with root=, data.root= or FMDA_DATA; "
            f"{layout_text}"
        )
    looked = part.listed or entry.layouts[0].images.replace("{split}", part.folders[0]).replace("{name}", split)
    below = ", ".join(str(folder.relative_to(root)) for folder in folders[1:])
    where = f"{root}" + (f" (and {below} below it)" if below else "")
    raise UserError(
        f"{where}: no images of '{name}', split '{split}'; looked for {looked}; {layout_text}"
        + (f" ({entry.note})" if entry.free else "")
    )


def _images(folder: Path, layout: Layout, split: str, part: Split) -> Found:
    """Returns the images of a split with the fields of their pattern, sorted by their fields."""
    found: Found = []
    if part.listed is not None:
        listing = folder / part.listed
        if not listing.is_file():
            return []
        for key in listing.read_text(encoding="utf-8").split():
            fields = {"split": part.folders[0], "name": split, "key": key}
            found.append((_with_extension(folder, layout.images, fields), fields))
        return found
    for place in part.folders:
        for path, more in _scan(folder, layout.images, {"split": place, "name": split}):
            found.append((path, {"split": place, "name": split, **more}))
    if part.starts:
        found = [row for row in found if Path(row[1]["key"]).name.startswith(part.starts)]
    found.sort(key=lambda row: (row[1]["key"], row[1]["split"], str(row[0])))
    return found[slice(*part.part)] if part.part else found


def _scan(folder: Path, pattern: str, given: dict[str, str]) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yields the files below `folder` that match a pattern, with what its placeholders stand for."""
    for word, value in given.items():
        pattern = pattern.replace("{" + word + "}", value)
    fixed, _, _ = pattern.partition("{")
    start = folder / fixed.rpartition("/")[0]
    if not start.is_dir():
        return
    expression = ""
    for i, piece in enumerate(_PLACEHOLDER.split(pattern)):
        if i % 2 == 0:
            expression += re.escape(piece)
        else:
            inner = {"key": ".+", "ext": "(?i:png|jpe?g)"}.get(piece, "[^/]+")
            expression += f"(?P<{piece}>{inner})"
    match = re.compile(expression).fullmatch
    for place, _, files in os.walk(start, followlinks=True):
        below = Path(place).relative_to(folder).as_posix()
        for file in files:
            hit = match(file if below == "." else f"{below}/{file}")
            if hit and not file.startswith("."):
                yield Path(place, file), hit.groupdict()


def _with_extension(folder: Path, pattern: str, fields: dict[str, str]) -> Path:
    """Returns the path of a listed image, with the first extension that exists."""
    paths = [folder / pattern.format(ext=ext, **fields) for ext in _EXTENSIONS]
    return next((path for path in paths if path.is_file()), paths[1])


def _label_file(folder: Path, layout: Layout, fields: dict[str, str], last: int) -> tuple[str | None, int]:
    """Returns the label file of an image and the place in `layout.labels`; the last place is tried first."""
    order = [last, *(i for i in range(len(layout.labels)) if i != last)] if layout.labels else []
    for i in order:
        path = folder / layout.labels[i].pattern.format(**fields)
        if path.is_file():
            return str(path), i
    return None, last


def _unique_names(found: Found) -> list[str]:
    """Returns the images' base names where these differ, else their names with folders."""
    short = [Path(fields["key"]).name for _, fields in found]
    if len(set(short)) == len(short):
        return short
    keys = [fields["key"] for _, fields in found]
    if len(set(keys)) == len(keys):
        return keys
    return ["/".join(v for k, v in sorted(fields.items()) if k not in ("ext", "name")) for _, fields in found]


def _classes(entry: Entry, folder: Path, split: str, labels: bool) -> ClassList:
    """Returns the set's class list; for free folders that of its classes.yaml."""
    if not entry.free:
        return class_list(entry.classes)
    for place in (folder / split / "classes.yaml", folder / "classes.yaml"):
        if place.is_file():
            return ClassList.load(place)
    if entry.classes:
        return class_list(entry.classes)
    if labels:
        raise UserError(
            f"{folder / 'classes.yaml'}: no class list; write `classes:` with the names in label order, "
            "or open with labels=False"
        )
    return ClassList(())


def _orphans(folder: Path, layout: Layout, split: str, part: Split, items: Sequence[Item]) -> list[str]:
    """Returns the label files without an image, where the split is whole folders."""
    if part.listed or part.starts or part.part:
        return []
    used = {item.form for item in items if item.form} or set(layout.labels[:1])
    taken = {item.label for item in items}
    return sorted(
        str(path)
        for form in used
        for place in part.folders
        for path, _ in _scan(folder, form.pattern, {"split": place, "name": split})
        if str(path) not in taken
    )


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"
