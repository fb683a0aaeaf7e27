"""A folder of generated images: what it was made with, and what is generated and refused so far.

    identity.json      seed, facts, prompts and filters; written first
    images/            im_<index, 6 digits>_p<prompt index>.png
    drawn-<k>.jsonl    journal of process k: a line per image and per refusal, until all images exist
    manifest.jsonl     one line per image, by index
    refused.jsonl      one line per refused prompt and image: filter, score, threshold, reason
    summary.json       counts by prompt and by filter

An image is written before its line, and every file appears whole or not at all. So a folder can be continued after a
kill or a full disk at any moment.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from fmda.atomic import write_json
from fmda.errors import UserError
from fmda.png import is_whole
from fmda.runs.journal import Journal, read_rows, write_rows

IMAGES, MANIFEST, REFUSED, SUMMARY = "images", "manifest.jsonl", "refused.jsonl", "summary.json"
_TEXT, _NUMBER = (str, NoneType), (int, NoneType)

Row = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A text to generate an image from, and the class that it asks for, if any."""

    text: str
    class_index: int | None = None
    class_name: str | None = None


@dataclass(frozen=True)
class Picture:
    """One line of the manifest: all that is needed to generate the image again alone.

    Attributes:
        index: position in the set, from 0.
        file: path in the folder.
        prompt, class_index, class_name: the request.
        prompt_index: position among all prompts, from 0.
        seed: a function of the seed of the set, `index` and `attempt`.
        attempt: number of images of this index that were refused before.
        scores: the score of each filter, by filter name.
        facts: sampler, steps, guidance, checkpoint and whatever else determines the image; the same in all lines.
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
        return {name: value for name, value in vars(self).items() if name != "facts"} | dict(self.facts)


_PICTURE: Mapping[str, tuple[type, ...]] = {
    "index": (int,), "file": (str,), "prompt": (str,), "prompt_index": (int,), "class_index": _NUMBER,
    "class_name": _TEXT, "seed": (int,), "attempt": (int,), "scores": (dict,),
}  # fmt: skip
_REFUSAL: Mapping[str, tuple[type, ...]] = {
    "index": _NUMBER, "attempt": _NUMBER, "filter": (str,), "why": (str,), "prompt": (str,), "prompt_index": (int,),
}  # fmt: skip


@dataclass(frozen=True)
class Manifest:
    """The finished images of a folder, by index, and the number of refusals by filter."""

    folder: Path
    pictures: tuple[Picture, ...]
    refused: Mapping[str, int] = field(default_factory=dict)
    refused_prompts: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path) -> "Manifest":
        """Returns the content of `manifest.jsonl`. Raises UserError where there is none or it is damaged."""
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise UserError(
                f"{folder / MANIFEST}: not found; name a folder of generated images, or finish generating it"
            )
        rows = _read(folder / REFUSED)[1]
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
    """The images and refusals of a folder so far, in memory and on disk; each process writes one journal.

    Attributes:
        images: the current image of each index: its file is whole, and no filter refused it.
        merged: images of `manifest.jsonl`, which passed every filter.
        refused: refusals of each index, by attempt.
    """

    def __init__(self, folder: Path, process: int = 0) -> None:
        """Reads the folder, including the journals of other processes."""
        self.folder = folder
        self._journal = Journal(folder / f"drawn-{process}.jsonl")
        self.merged = _merged(folder)
        self.refused: dict[int, dict[int, Row]] = {}
        self.pictures: dict[int, Picture] = {}
        contents = [_read(path) for path in (*self._journals(), folder / REFUSED)]
        for _, refusals in contents:
            self._note(row for row in refusals if row["index"] is not None)
        drawn = [picture for pictures, _ in contents for picture in pictures]
        for picture in (*drawn, *self.merged.values()):
            # the file of a refused image may be gone or hold the next attempt; either way it is generated again
            if picture.attempt == self.attempt(picture.index) and is_whole(folder / picture.file):
                self.pictures[picture.index] = picture

    def close(self) -> None:
        """Closes the journal."""
        self._journal.close()

    def attempt(self, index: int) -> int:
        """Returns the number of the next attempt at an image."""
        return max(self.refused.get(index, {-1: {}})) + 1

    def passed(self, index: int) -> bool:
        """Returns whether the current image of an index passed every filter in an earlier call."""
        return index in self.merged and self.merged[index].attempt == self.pictures[index].attempt

    def keep(self, pictures: Sequence[Picture]) -> None:
        """Records images whose files are written."""
        self._journal.append(*(picture.to_json() for picture in pictures))
        for picture in pictures:
            known = self.merged.get(picture.index)
            # a lost file that is generated again is the same image; it keeps the scores of filters that compare
            self.pictures[picture.index] = known if known and known.attempt == picture.attempt else picture

    def refuse(self, rows: Sequence[Row]) -> None:
        """Records refusals; their indices have no current image any more."""
        self._journal.append(*rows)
        self._note(rows)
        for row in rows:
            self.pictures.pop(row["index"], None)

    def _note(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.refused.setdefault(row["index"], {})[row["attempt"]] = row

    def complete(self, count: int) -> bool:
        """Returns whether the final files hold the first `count` images, and no journal is left to merge."""
        final = all((self.folder / name).is_file() for name in (REFUSED, SUMMARY))
        return final and not self._journals() and all(j in self.pictures and self.passed(j) for j in range(count))

    def merge(self, count: int, refused_prompts: Sequence[Row], filters: Sequence[str]) -> None:
        """Writes the first `count` images, those merged before and all refusals into the final files."""
        final = [self.pictures[j] for j in sorted(self.pictures) if j < count or j in self.merged]
        images = [self.refused[j][a] for j in sorted(self.refused) for a in sorted(self.refused[j])]
        write_rows(self.folder / REFUSED, [*refused_prompts, *images])
        summary = _summary(final, images, refused_prompts, filters)
        write_json(self.folder / SUMMARY, summary)
        write_rows(self.folder / MANIFEST, (picture.to_json() for picture in final))
        self.merged = {picture.index: picture for picture in final}

    def clear(self) -> None:
        """Removes the journals, except for images beyond the requested count, and half-written files of a kill."""
        for path in [*self.folder.glob(".*.part*"), *(self.folder / IMAGES).glob(".*.part*")]:
            path.unlink()
        beyond = [picture.to_json() for j, picture in sorted(self.pictures.items()) if j not in self.merged]
        for path in self._journals():
            if path != self._journal.path or not beyond:
                path.unlink()
        if beyond:
            write_rows(self._journal.path, beyond)

    def _journals(self) -> list[Path]:
        return sorted(self.folder.glob("drawn-*.jsonl"))


def _summary(pictures: Sequence[Picture], images: Sequence[Row], prompts: Sequence[Row], filters: Sequence[str]) -> Row:
    by_filter, again = Counter(row["filter"] for row in images), Counter(row["prompt_index"] for row in images)
    texts, share = {p.prompt_index: p.prompt for p in pictures}, Counter(p.prompt_index for p in pictures)
    return {
        "images": len(pictures),
        "drawn": len(pictures) + len(images),
        "refused": {name: by_filter[name] for name in filters},
        "refused_prompts": dict(sorted(Counter(row["filter"] for row in prompts).items())),
        "prompts": [
            {"prompt": texts[p], "prompt_index": p, "images": share[p], "refused": again[p]} for p in sorted(texts)
        ],
    }  # fmt: skip


def _read(path: Path) -> tuple[list[Picture], list[Row]]:
    """Returns the images and the refusals in a file of lines. Raises UserError for a damaged line."""
    pictures, refusals = [], []
    try:
        for row in read_rows(path):
            kinds = _REFUSAL if "filter" in row else _PICTURE
            # not isinstance, by which true is an int
            valid = all(type(row[name]) in kinds[name] for name in kinds)
            if kinds is _REFUSAL:
                valid = valid and (row["index"] is None) == (row["attempt"] is None)
                refusals.append(row)
            else:
                # files are read and deleted by their name in the line, which must not lead out of the folder
                valid = valid and row["file"] == image_file(row["index"], row["prompt_index"])
                facts = {name: value for name, value in row.items() if name not in _PICTURE}
                pictures.append(Picture(**{name: row[name] for name in _PICTURE}, facts=facts))
            if not valid:
                raise _damaged(path)
    except (KeyError, TypeError):
        raise _damaged(path) from None
    return pictures, refusals


def _damaged(path: Path) -> UserError:
    return UserError(f"{path}: damaged; delete the folder and generate it again")


def _merged(folder: Path) -> dict[int, Picture]:
    pictures, refusals = _read(folder / MANIFEST)
    merged = {picture.index: picture for picture in pictures}
    if len(merged) < len(pictures) or refusals:
        raise _damaged(folder / MANIFEST)
    return merged


def image_file(index: int, prompt_index: int) -> str:
    """Returns the path of an image in its folder."""
    return f"{IMAGES}/im_{index:06d}_p{prompt_index}.png"
