"""A folder of generated images: how it was made, and which images were generated and refused.

    identity.json      seed, facts, prompts and filters; written first
    images/            im_<index, 6 digits>_p<prompt index>.png
    drawn-<k>.jsonl    journal of process k, a line per image and per refusal; removed when all images exist
    manifest.jsonl     one line per image, by index
    refused.jsonl      one line per refused prompt and image: filter, score, threshold, reason
    summary.json       counts by prompt and by filter
    contact-sheet.png  the first image of each prompt

An image is written before its line, and every file appears whole or not at all. So a folder can be continued after a
kill or a full disk at any moment.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import cv2
import numpy as np
from jaxtyping import UInt8

from fmda.atomic import write_json
from fmda.errors import UserError
from fmda.png import captioned, grid, is_whole, read_png, write_png
from fmda.runs.journal import Journal, read_rows, write_rows

IMAGES, MANIFEST, REFUSED, SUMMARY = "images", "manifest.jsonl", "refused.jsonl", "summary.json"
SHEET, SHEET_WIDTH, SHEET_CELLS = "contact-sheet.png", 1800, 100


@dataclass(frozen=True)
class Prompt:
    """A caption to generate images from, and the class that it names, if any."""

    text: str
    class_index: int | None = None
    class_name: str | None = None


@dataclass(frozen=True)
class GeneratedImage:
    """One line of the manifest: all that is needed to generate the image again alone.

    Attributes:
        index: position in the set, from 0.
        file: path in the folder.
        prompt_index: position among all prompts, from 0.
        seed: of its noise.
        attempt: number of images of this index that were refused before.
        scores: by name of the filter.
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
    scores: dict = field(default_factory=dict)
    facts: Any = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the line, the facts beside the rest."""
        values = asdict(self)
        return values | values.pop("facts")


class Verdict(NamedTuple):
    """A score, its threshold, and the reason of a refusal; None where the image or prompt is kept.

    A refused image may come with an `edit`: the prompt of the next try.
    """

    score: float | None = None
    threshold: float | None = None
    why: str | None = None
    edit: str | None = None


@dataclass(frozen=True)
class Refusal:
    """One line of `refused.jsonl`; `index`, `attempt` and `seed` are None where a prompt was refused.

    `edit` is the prompt of the later tries, None for the one before.
    """

    index: int | None
    attempt: int | None
    filter: str
    score: float | int | None
    threshold: float | int | None
    why: str
    prompt: str
    prompt_index: int
    class_index: int | None
    class_name: str | None
    seed: int | None
    edit: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The images of a finished folder by index, and the number of refused images by filter."""

    folder: Path
    images: tuple[GeneratedImage, ...]
    refused: Mapping[str, int]

    @classmethod
    def read(cls, folder: str | Path) -> "Manifest":
        """Returns the content of `manifest.jsonl`. Raises UserError where there is none or it is damaged."""
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise UserError(f"{folder / MANIFEST}: not found; name a folder of generated images, or finish it first")
        images = sorted(_read_manifest(folder), key=lambda image: image.index)
        _, refusals = _read(folder / REFUSED)
        return cls(folder, tuple(images), Counter(row.filter for row in refusals if row.index is not None))

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[GeneratedImage]:
        return iter(self.images)

    @property
    def paths(self) -> list[Path]:
        """The image files in order."""
        return [self.folder / image.file for image in self.images]

    def head(self, count: int) -> "Manifest":
        """Returns the first `count` images: as many of each prompt, to within one."""
        return Manifest(self.folder, self.images[:count], self.refused)


class Progress:
    """The images and refusals of an unfinished folder, in memory and on disk; each process writes one journal.

    Attributes:
        images: the current image of each index: its file is whole, and no filter has refused it.
        refused: refusals of each index, by attempt.
    """

    def __init__(self, folder: Path, process: int = 0) -> None:
        """Reads the folder, including the journals of other processes."""
        self.folder = folder
        self._journal = Journal(folder / f"drawn-{process}.jsonl")
        self.images: dict[int, GeneratedImage] = {}
        self.refused: dict[int, dict[int, Refusal]] = defaultdict(dict)
        manifest = _read_manifest(folder)
        self._finished = {image.index for image in manifest}
        contents = [(manifest, []), *map(_read, [folder / REFUSED, *self._journals()])]
        for row in (row for _, refusals in contents for row in refusals):
            if row.index is not None and row.attempt is not None:
                self.refused[row.index][row.attempt] = row
        for image in (image for images, _ in contents for image in images):
            # the file of a refused image may be missing or hold the next attempt; either way it is generated again
            if image.attempt == self.attempts(image.index) and is_whole(folder / image.file):
                self.images[image.index] = image

    def close(self) -> None:
        """Closes the journal."""
        self._journal.close()

    def attempts(self, index: int) -> int:
        """Returns the number of refused images of an index."""
        return max(self.refused[index], default=-1) + 1

    def edit(self, index: int) -> str | None:
        """Returns the prompt that the last refusal with an edit proposes for an index, None where there is none."""
        return next((row.edit for _, row in sorted(self.refused[index].items(), reverse=True) if row.edit), None)

    def keep(self, *images: GeneratedImage) -> None:
        """Records images whose files are written."""
        self._journal.append(*(image.to_json() for image in images))
        self.images.update((image.index, image) for image in images)

    def refuse(self, image: GeneratedImage, by: str, verdict: Verdict) -> None:
        """Records that the filter `by` refuses an image; its index has no current image any more."""
        refusal = Refusal(
            image.index, image.attempt, by, verdict.score, verdict.threshold, str(verdict.why), image.prompt,
            image.prompt_index, image.class_index, image.class_name, image.seed, verdict.edit,
        )  # fmt: skip
        self._journal.append(vars(refusal))
        self.refused[image.index][image.attempt] = refusal
        if self.images.pop(image.index, None):
            (self.folder / image.file).unlink(missing_ok=True)

    def finish(self, count: int, refused_prompts: Sequence[Refusal], filters: Sequence[str]) -> bool:
        """Writes the final files with the first `count` images, unless they exist; returns whether it wrote them.

        The journals are removed, except for lines of images beyond `count`, and so are half-written files of a kill.
        """
        folder, journals = self.folder, self._journals()
        final = all((folder / name).is_file() for name in (MANIFEST, REFUSED, SUMMARY)) and is_whole(folder / SHEET)
        if final and not journals:
            return False
        images = [image for j, image in sorted(self.images.items()) if j < count or j in self._finished]
        refused = [row for _, rows in sorted(self.refused.items()) for _, row in sorted(rows.items())]
        write_rows(folder / REFUSED, map(vars, [*refused_prompts, *refused]))
        write_json(folder / SUMMARY, _summary(images, refused, refused_prompts, filters))
        write_rows(folder / MANIFEST, (image.to_json() for image in images))
        write_png(folder / SHEET, contact_sheet(folder))
        for path in [*journals, *folder.glob(".*.part*"), *(folder / IMAGES).glob(".*.part*")]:
            path.unlink()
        beyond = self.images.keys() - {image.index for image in images}
        if beyond:
            write_rows(self._journal.path, [self.images[j].to_json() for j in sorted(beyond)])
        return True

    def _journals(self) -> list[Path]:
        return sorted(self.folder.glob("drawn-*.jsonl"))


def _summary(
    images: Sequence[GeneratedImage], refused: Sequence[Refusal], prompts: Sequence[Refusal], filters: Sequence[str]
) -> dict[str, Any]:
    by_filter, again = Counter(row.filter for row in refused), Counter(row.prompt_index for row in refused)
    # the first try of a prompt last, as later ones may have an edited prompt
    texts = {image.prompt_index: image.prompt for image in sorted(images, key=lambda image: -image.attempt)}
    counts = Counter(image.prompt_index for image in images)
    return {
        "images": len(images),
        "drawn": len(images) + len(refused),
        "refused": {name: by_filter[name] for name in filters},
        "refused_prompts": dict(sorted(Counter(row.filter for row in prompts).items())),
        "prompts": [
            {"prompt": texts[p], "prompt_index": p, "images": counts[p], "refused": again[p]} for p in sorted(texts)
        ],
    }  # fmt: skip


def contact_sheet(folder: str | Path, columns: int = 10) -> UInt8[np.ndarray, "H W 3"]:
    """Returns an overview of a generated folder, RGB: the first image of each prompt over its class or text.

    Of many prompts `SHEET_CELLS` are shown, spaced evenly.
    Raises UserError for a folder without a manifest or with a damaged image.
    """
    manifest = Manifest.read(folder)
    first = {image.prompt_index: image for image in reversed(manifest.images)}
    order, count = sorted(first), min(len(first), SHEET_CELLS)
    columns = min(columns, count)
    cells = []
    for number in (order[k * len(order) // count] for k in range(count)):
        image = read_png(manifest.folder / first[number].file)
        width = min(max(image.shape[1], 160), SHEET_WIDTH // columns)
        size = width, max(1, round(image.shape[0] * width / image.shape[1]))
        kind = cv2.INTER_AREA if width < image.shape[1] else cv2.INTER_LINEAR
        cell = np.asarray(cv2.resize(image, size, interpolation=kind))
        cells.append(captioned(cell, first[number].class_name or first[number].prompt))
    return grid(cells, columns)


def image_file(index: int, prompt_index: int) -> str:
    """Returns the path of an image in its folder."""
    return f"{IMAGES}/im_{index:06d}_p{prompt_index}.png"


def _read_manifest(folder: Path) -> list[GeneratedImage]:
    images, refusals = _read(folder / MANIFEST)
    if refusals or len({image.index for image in images}) < len(images):
        raise _damaged(folder / MANIFEST)
    return images


def _read(path: Path) -> tuple[list[GeneratedImage], list[Refusal]]:
    """Returns the images and the refusals in a file of lines. Raises UserError for a damaged line."""
    images, refusals = [], []
    for row in read_rows(path):
        try:
            kind = Refusal if "filter" in row else GeneratedImage
            # folders of earlier versions have no edits
            values = {name: row[name] for name in _TYPES[kind] if name != "edit" or name in row}
        except (KeyError, TypeError):
            raise _damaged(path) from None
        # not isinstance, by which true is an int
        valid = all(type(value) in _TYPES[kind][name] for name, value in values.items())
        if kind is Refusal and valid and (row["index"] is None) == (row["attempt"] is None):
            refusals.append(Refusal(**values))
        # files are read and deleted by their name in the line, which must not lead out of the folder
        elif kind is GeneratedImage and valid and row["file"] == image_file(row["index"], row["prompt_index"]):
            facts = {name: value for name, value in row.items() if name not in values}
            images.append(GeneratedImage(**values, facts=facts))
        else:
            raise _damaged(path)
    return images, refusals


_TYPES = {
    kind: {name: get_args(hint) or (hint,) for name, hint in get_type_hints(kind).items() if name != "facts"}
    for kind in (GeneratedImage, Refusal)
}
"""The types of the values of a line."""


def _damaged(path: Path) -> UserError:
    return UserError(f"{path}: damaged; delete the folder and generate it again")
