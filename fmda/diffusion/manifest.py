"""What a folder of generated images says of itself: with what it was made, a line per image, a line per refusal.

    settings.json      seed, facts, prompts and filters; written first, and never changed
    images/            im_<index, 6 digits>_p<prompt index>.png
    drawn-<k>.jsonl    lines of process k while it draws; they go into manifest.jsonl in the end
    refused-<k>.jsonl  likewise, into refused.jsonl
    manifest.jsonl     one line per image, by index
    refused.jsonl      one line per refused prompt and per refused image: by which filter, score, threshold, why
    summary.json       counts by prompt and by filter

An image is written before its line, each file whole or not at all, and a line or an image that was cut off counts as
missing. So the folder can be left at any moment, by a kill or a full disk, and continued.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from fmda.atomic import occupied, write_atomic
from fmda.errors import UserError

SETTINGS, IMAGES, MANIFEST, REFUSED, SUMMARY = (
    "settings.json",
    "images",
    "manifest.jsonl",
    "refused.jsonl",
    "summary.json",
)
_PNG_END = b"IEND\xaeB`\x82"

Row = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A text to draw, and the class it asks for where it asks for one."""

    text: str
    class_index: int | None = None
    class_name: str | None = None


@dataclass(frozen=True)
class Picture:
    """One line of the manifest: all that is needed to draw the image again alone.

    Attributes:
        index: which image of the set, from 0.
        file: path in the folder.
        prompt, class_index, class_name: what was asked for.
        prompt_index: which of the prompts given, from 0.
        seed: follows from the run's seed, `index` and `attempt`.
        attempt: how many images of this index were refused before.
        scores: what each filter measured, by filter name.
        facts: sampler, steps, guidance, checkpoint and what else determines the image; the same in all lines.
    """

    index: int
    file: str
    prompt: str
    prompt_index: int
    class_index: int | None
    class_name: str | None
    seed: int
    attempt: int
    scores: Mapping[str, float | None] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> Row:
        """Returns the line as plain values, the facts beside the rest."""
        own = {name: getattr(self, name) for name in FIELDS}
        return {**own, "scores": dict(self.scores), **self.facts}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Picture":
        """Returns the picture of a line. Raises KeyError for a line that lacks a key."""
        rest = {name: value for name, value in row.items() if name not in (*FIELDS, "scores")}
        return cls(**{name: row[name] for name in FIELDS}, scores=row["scores"], facts=rest)


FIELDS: Mapping[str, tuple[type, ...]] = {
    "index": (int,), "file": (str,), "prompt": (str,), "prompt_index": (int,), "class_index": (int, NoneType),
    "class_name": (str, NoneType), "seed": (int,), "attempt": (int,),
}  # fmt: skip
"""Keys of a manifest line that facts may not use, beside "scores", and the types of their values."""

_REFUSAL: Mapping[str, tuple[type, ...]] = {
    "index": (int, NoneType), "attempt": (int, NoneType), "filter": (str,), "why": (str,), "prompt": (str,),
    "prompt_index": (int,),
}  # fmt: skip


@dataclass(frozen=True)
class Manifest:
    """The finished images of a folder, by index, and how many were refused by which filter."""

    folder: Path
    pictures: tuple[Picture, ...]
    refused: Mapping[str, int] = field(default_factory=dict)
    refused_prompts: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path) -> "Manifest":
        """Returns what `manifest.jsonl` of a folder lists. Raises UserError where there is none or it is damaged."""
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise UserError(
                f"{folder / MANIFEST}: not found; name a folder of generated images, or finish generating it"
            )
        rows = _refusals(folder / REFUSED)
        return cls(
            folder,
            tuple(picture for _, picture in sorted(_merged(folder).items())),
            Counter(row["filter"] for row in rows if row["index"] is not None),
            Counter(row["filter"] for row in rows if row["index"] is None),
        )

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[Picture]:
        return iter(self.pictures)

    @property
    def paths(self) -> list[Path]:
        """The image files in order."""
        return [self.folder / picture.file for picture in self.pictures]

    def head(self, count: int) -> "Manifest":
        """Returns the first `count` images: as many of each prompt, to within one."""
        return Manifest(self.folder, self.pictures[:count], self.refused, self.refused_prompts)


class Ledger:
    """What is drawn and refused so far, in memory and on disk; one process writes its own two files of lines.

    Attributes:
        pictures: the image that stands for each index: its file is there and whole, and no filter refused it.
        merged: pictures of `manifest.jsonl`, which passed every filter.
        refused: refusals of each index, by attempt.
    """

    def __init__(self, folder: Path, process: int = 0) -> None:
        """Reads the folder, the lines of other processes included, and cuts torn lines off this process's files."""
        self.folder = folder
        self._drawn, self._refused = folder / f"drawn-{process}.jsonl", folder / f"refused-{process}.jsonl"
        for path in (self._drawn, self._refused):
            _cut(path)
        self.refused: dict[int, dict[int, Row]] = {}
        for path in (folder / REFUSED, *folder.glob("refused-*.jsonl")):
            self._note([row for row in _refusals(path) if row["index"] is not None])
        self.merged = _merged(folder)
        self.pictures: dict[int, Picture] = {}
        drawn = [picture for path in folder.glob("drawn-*.jsonl") for picture in _pictures(path)]
        for picture in (*drawn, *self.merged.values()):
            # the file of a refused image may be gone or hold the next attempt; then it has to be drawn in any case
            if picture.attempt == self.attempt(picture.index) and whole_image(folder / picture.file):
                self.pictures[picture.index] = picture

    def attempt(self, index: int) -> int:
        """Returns the number of the next attempt at an image."""
        return max(self.refused.get(index, {-1: {}})) + 1

    def passed(self, index: int) -> bool:
        """Returns whether the picture that stands for an index had passed every filter in an earlier call."""
        return index in self.merged and self.merged[index].attempt == self.pictures[index].attempt

    def keep(self, pictures: Sequence[Picture]) -> None:
        """Records pictures whose files are written."""
        _append(self._drawn, [picture.to_json() for picture in pictures])
        for picture in pictures:
            known = self.merged.get(picture.index)
            # a file that was lost came back as it was: with it the scores of filters that are not asked again
            self.pictures[picture.index] = known if known and known.attempt == picture.attempt else picture

    def refuse(self, rows: Sequence[Row]) -> None:
        """Records refusals; a picture that stood for one of their indices does so no more."""
        _append(self._refused, rows)
        self._note(rows)
        for row in rows:
            self.pictures.pop(row["index"], None)

    def _note(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.refused.setdefault(row["index"], {})[row["attempt"]] = row

    def complete(self, count: int) -> bool:
        """Returns whether `manifest.jsonl` has the first `count` images, none is left to merge and no file is gone."""
        there = all((self.folder / name).is_file() for name in (REFUSED, SUMMARY))
        return there and not self._parts() and all(j in self.pictures and self.passed(j) for j in range(count))

    def merge(self, count: int, refused_prompts: Sequence[Row], filters: Sequence[str]) -> None:
        """Writes the first `count` pictures, all that were merged before and all refusals into their final files.

        The files of the processes stay until `clear`, which is called when everything else is written.
        """
        final = [self.pictures[j] for j in sorted(self.pictures) if j < count or j in self.merged]
        images = [self.refused[j][a] for j in sorted(self.refused) for a in sorted(self.refused[j])]
        _write(self.folder / REFUSED, _lines([*refused_prompts, *images]))
        summary = _summary(final, images, refused_prompts, filters)
        _write(self.folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
        _write(self.folder / MANIFEST, _lines(picture.to_json() for picture in final))
        self.merged = {picture.index: picture for picture in final}

    def clear(self) -> None:
        """Removes the files of the processes, but for lines beyond the images that were asked for.

        Also what a kill left half written, which readers of the folder could take for images.
        """
        for path in [*self.folder.glob(".*.part*"), *(self.folder / IMAGES).glob(".*.part*")]:
            path.unlink()
        beyond = [picture.to_json() for j, picture in sorted(self.pictures.items()) if j not in self.merged]
        if beyond:
            _write(self._drawn, _lines(beyond))
        kept = {self._drawn} if beyond else set()
        for path in self._parts() - kept:
            path.unlink()

    def _parts(self) -> set[Path]:
        return {*self.folder.glob("drawn-*.jsonl"), *self.folder.glob("refused-*.jsonl")}


def claim(folder: Path, settings: Row) -> None:
    """Writes `settings.json` into a new folder, or checks that the folder was made with the same settings.

    Raises UserError, and leaves everything as it is, for images of other settings and for a folder of other things.
    """
    path = folder / SETTINGS
    settings = json.loads(json.dumps(settings, default=str))
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            changed = _changes(found, settings)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: is not what a generation wrote; choose another folder") from None
        if changed:
            raise UserError(
                f"{folder}: holds images of another generation ({'; '.join(changed)}); choose another folder"
            )
    elif occupied(folder):
        # a hidden file is what a kill left of settings.json
        raise UserError(f"{folder}: not empty and no folder of generated images; choose another folder")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        # first of all files: a folder without it is none of ours
        write_atomic(path, json.dumps(settings, indent=1) + "\n")
    (folder / IMAGES).mkdir(exist_ok=True)


def check_lines(folder: Path, own: Callable[[int, int], Picture]) -> None:
    """Raises UserError for a line of an image that differs, but for its scores, from `own` of its index and attempt."""
    for path in (folder / MANIFEST, *folder.glob("drawn-*.jsonl")):
        for found in _pictures(path):
            changed = _changes(vars(found), vars(replace(own(found.index, found.attempt), scores=found.scores)))
            if changed:
                what = f"image {found.index}: {'; '.join(changed)}"
                raise UserError(f"{path}: lines of another generation ({what}); choose another folder")


def _changes(old: Row, new: Row) -> list[str]:
    """Returns what differs between two settings or pictures: facts and seed with their values, the rest by name."""
    facts = dict.fromkeys([*old["facts"], *new["facts"]])
    changed = [
        f"{name}: {old['facts'].get(name, '(none)')!r} -> {new['facts'].get(name, '(none)')!r}"
        for name in facts
        if old["facts"].get(name) != new["facts"].get(name)
    ]
    if old["seed"] != new["seed"]:
        changed.append(f"seed: {old['seed']!r} -> {new['seed']!r}")
    return changed + [
        f"other {name.replace('_', ' ')}" for name in new if name not in ("facts", "seed") and old[name] != new[name]
    ]


def _summary(pictures: Sequence[Picture], images: Sequence[Row], prompts: Sequence[Row], filters: Sequence[str]) -> Row:
    by_filter, again = Counter(row["filter"] for row in images), Counter(row["prompt_index"] for row in images)
    first = {picture.prompt_index: picture for picture in reversed(pictures)}
    share = Counter(picture.prompt_index for picture in pictures)
    return {
        "images": len(pictures),
        "drawn": len(pictures) + len(images),
        "refused": {name: by_filter[name] for name in filters},
        "refused_prompts": dict(sorted(Counter(row["filter"] for row in prompts).items())),
        "prompts": [
            {"prompt": first[p].prompt, "prompt_index": p, "images": share[p], "refused": again[p]}
            for p in sorted(first)
        ],
    }  # fmt: skip


def read_lines(path: Path, kinds: Mapping[str, tuple[type, ...]]) -> list[Row]:
    """Returns the rows of a file of JSON lines, none where it is missing; a torn last line is left out.

    Raises UserError for a row without one of the keys of `kinds`, or with a value of another type there.
    """
    if not path.is_file():
        return []
    try:
        rows = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
        # not isinstance, by which true is an int
        if all(type(row[name]) in kinds[name] for row in rows for name in kinds):
            return rows
    except (ValueError, KeyError, TypeError):
        pass
    raise _damaged(path)


def _damaged(path: Path) -> UserError:
    return UserError(f"{path}: damaged; delete the folder and generate it again")


def _refusals(path: Path) -> list[Row]:
    rows = read_lines(path, _REFUSAL)
    if any((row["index"] is None) != (row["attempt"] is None) for row in rows):
        raise _damaged(path)
    return rows


def _pictures(path: Path) -> list[Picture]:
    pictures = [Picture.from_json(row) for row in read_lines(path, {**FIELDS, "scores": (dict,)})]
    # no line leads out of the folder: files are read, deleted and named in advice by it
    if any(picture.file != image_file(picture.index, picture.prompt_index) for picture in pictures):
        raise _damaged(path)
    return pictures


def _merged(folder: Path) -> dict[int, Picture]:
    pictures = _pictures(folder / MANIFEST)
    merged = {picture.index: picture for picture in pictures}
    if len(merged) < len(pictures):
        raise _damaged(folder / MANIFEST)
    return merged


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _append(path: Path, rows: Sequence[Row]) -> None:
    if rows:
        with open(path, "a", encoding="utf-8") as file:
            file.write(_lines(rows))


def _cut(path: Path) -> None:
    """Cuts off a torn last line, so that the next one starts a line."""
    if path.is_file():
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            write_atomic(path, whole)


def _write(path: Path, text: str) -> None:
    if not path.is_file() or path.read_bytes() != text.encode():
        write_atomic(path, text)


def image_file(index: int, prompt_index: int) -> str:
    """Returns the path of an image in its folder."""
    return f"{IMAGES}/im_{index:06d}_p{prompt_index}.png"


def whole_image(path: Path) -> bool:
    """Returns whether a file is there and ends as a PNG does; no more of it is read."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - len(_PNG_END)))
        return file.read() == _PNG_END


def load_image(path: str | Path) -> UInt8[np.ndarray, "H W 3"]:
    """Returns a generated image, RGB. Raises UserError for a missing or damaged file."""
    path = Path(path)
    raw = path.read_bytes() if path.is_file() else b""
    # the decoder fills up what is cut off
    pixels = cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR) if raw.endswith(_PNG_END) else None
    if pixels is None:
        raise UserError(f"{path}: missing, truncated or no PNG; delete it and generate again, which draws it as it was")
    return np.ascontiguousarray(pixels[..., ::-1])


def save_image(path: Path, image: UInt8[np.ndarray, "H W 3"]) -> None:
    """Writes an RGB image as PNG, whole or not at all."""
    done, data = cv2.imencode(".png", np.ascontiguousarray(image[..., ::-1]))
    if not done:
        raise RuntimeError(f"PNG encoder refused an array of {image.dtype} {image.shape}")
    write_atomic(path, data.tobytes())
