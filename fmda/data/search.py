"""Where the images and label files of a split lie: catalogue patterns matched against a folder."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from fmda.data.catalog import Entry, Layout, Split, describe
from fmda.data.listing import IMAGE_SUFFIXES, hidden, walk
from fmda.errors import UserError
from fmda.text import read_lines

UNDIVIDED = ("val", "all")
"""The splits that a folder without splits is opened as; without labels also "train"."""

_SPLIT_WORDS = ("train", "training", "val", "validation", "test", "testing")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_EXTENSION = "(?i:" + "|".join(suffix[1:] for suffix in IMAGE_SUFFIXES) + ")"

Fields = dict[str, str]


def locate(
    name: str, entry: Entry, root: Path | None, split: str, part: Split, *, labels: bool, needs_labels: bool
) -> tuple[Path, Layout, list[tuple[Path, Fields]]]:
    """Returns the first folder and layout with images of a split, and these with the values of the placeholders.

    Args:
        name, entry: the dataset.
        root: its folder, or the folder above it; None where neither was named.
        split, part: the split.
        labels: whether labels are to be opened, with which an undivided folder is no training split.
        needs_labels: layouts without labels are left out.

    Raises UserError, naming the expected layout, where there is no image.
    """
    layout_text = f"expected layout: {describe(entry)}" + (f"; get it from {entry.home}" if entry.home else "")
    if root is None or not root.is_dir():
        fault = f"{root}: no such folder" if root else "its folder is not named"
        raise UserError(f"dataset '{name}': {fault}; name it with root=, data.root= or FMDA_DATA; {layout_text}")
    folders = [root, *(root / place for place in entry.places)]
    parts: list[str] = []
    for folder in folders:
        if not folder.is_dir():
            continue
        parts = _divisions(folder) if entry.free else []
        for layout in entry.layouts:
            undivided = entry.free and "{split}" not in layout.images
            allowed = UNDIVIDED if labels and layout.labels else (*UNDIVIDED, "train")
            if (undivided and (parts or split not in allowed)) or (needs_labels and not layout.labels):
                continue
            files = _images(folder, layout, split, part)
            if files:
                return folder, layout, files
    pattern = part.listed or entry.layouts[0].images.replace("{split}", part.folders[0]).replace("{name}", split)
    below = ", ".join(str(folder.relative_to(root)) for folder in folders[1:])
    where = f"{root}" + (f" (and {below} below it)" if below else "")
    raise UserError(
        f"{where}: no images of '{name}', split '{split}'; looked for {pattern}"
        + (f"; its splits are: {', '.join(parts)}" if parts else "")
        + f"; {layout_text}"
        + (f" ({entry.note})" if entry.free else "")
    )


def label_file(folder: Path, layout: Layout, fields: Fields, last: int) -> tuple[str | None, int]:
    """Returns the label file of an image and its place in `layout.labels`; place `last` is tried first."""
    order = [last, *(i for i in range(len(layout.labels)) if i != last)] if layout.labels else []
    for i in order:
        path = _existing(folder, layout.labels[i].pattern.format(**fields))
        if path is not None:
            return str(path), i
    return None, last


def label_files(folder: Path, pattern: str, split: str, part: Split) -> Iterator[str]:
    """Yields the label files of a split, whether they belong to an image or not."""
    for place in part.folders:
        for path, _ in _scan(folder, pattern, {"split": place, "name": split}):
            yield str(path)


def unique_names(files: Sequence[tuple[Path, Fields]]) -> list[str]:
    """Returns the images' base names where these differ, else longer names that do."""
    keys = [fields["key"] for _, fields in files]
    joined = ["/".join(v for k, v in sorted(fields.items()) if k not in ("ext", "name")) for _, fields in files]
    for names in ([Path(key).name for key in keys], keys, joined):
        if len(set(names)) == len(names):
            return names
    return [f"{name}.{fields.get('ext', '')}" for name, (_, fields) in zip(joined, files, strict=True)]


def _divisions(folder: Path) -> list[str]:
    """Returns the splits that lie in a generic folder, as <split>/images or images/<split>."""
    names = {path.parent.name for path in folder.glob("*/images") if path.is_dir()}
    names |= {word for word in _SPLIT_WORDS if (folder / "images" / word).is_dir()}
    return sorted(name for name in names if not hidden(name))


def _images(folder: Path, layout: Layout, split: str, part: Split) -> list[tuple[Path, Fields]]:
    """Returns the images of a split with the fields of their pattern, sorted by their fields."""
    if part.listed is not None:
        listing = folder / part.listed
        if not listing.is_file():
            return []
        return [_listed(folder, layout, split, part, line) for line in read_lines(listing)]
    files: list[tuple[Path, Fields]] = []
    for place in part.folders:
        for path, more in _scan(folder, layout.images, {"split": place, "name": split}):
            files.append((path, {"split": place, "name": split, **more}))
    if part.starts:
        files = [row for row in files if Path(row[1]["key"]).name.startswith(part.starts)]
    files.sort(key=lambda row: (row[1]["key"], row[1]["split"], str(row[0])))
    return files[slice(*part.part)] if part.part else files


def _listed(folder: Path, layout: Layout, split: str, part: Split, line: str) -> tuple[Path, Fields]:
    """Returns the image that a line of a list names; a number after the name (its label) is left out."""
    name, *number = line.rsplit(maxsplit=1)
    keys = [line, name] if number and number[0].lstrip("-").isdigit() else [line]
    fields = {"split": part.folders[0], "name": split}
    for key in keys:
        for suffix in (*IMAGE_SUFFIXES, *map(str.upper, IMAGE_SUFFIXES)):
            path = _existing(folder, layout.images.format(ext=suffix[1:], key=key, **fields))
            if path is not None:
                return path, {**fields, "key": key}
    return folder / layout.images.format(ext="jpg", key=keys[-1], **fields), {**fields, "key": keys[-1]}


def _existing(folder: Path, name: str) -> Path | None:
    """Returns the file `name` below a folder, also in another Unicode form or with an upper-case .PNG, else None."""
    forms = [name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)]
    spellings = [*forms, *(re.sub(r"\.png$", ".PNG", form) for form in forms)]
    return next((path for path in (folder / s for s in dict.fromkeys(spellings)) if path.is_file()), None)


def _scan(folder: Path, pattern: str, fixed: Fields) -> Iterator[tuple[Path, Fields]]:
    """Yields the files below `folder` that match a pattern, with what its placeholders stand for."""
    for word, value in fixed.items():
        pattern = pattern.replace("{" + word + "}", value)
    start = folder / pattern.partition("{")[0].rpartition("/")[0]
    if not start.is_dir():
        return
    expression = ""
    for i, piece in enumerate(_PLACEHOLDER.split(pattern)):
        if i % 2 == 0:
            expression += re.escape(piece).replace(r"\.png", r"\.(?i:png)")
        else:
            inner = {"key": ".+", "ext": _EXTENSION}.get(piece, "[^/]+")
            expression += f"(?P<{piece}>{inner})"
    match = re.compile(expression).fullmatch
    for place, files in walk(start):
        below = Path(place).relative_to(folder).as_posix()
        for file in files:
            hit = match(file if below == "." else f"{below}/{file}")
            if hit:
                yield Path(place, file), hit.groupdict()
