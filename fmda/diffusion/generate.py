"""A folder of images generated from prompts: seeds by index, resumable, filtered, by one process or several."""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from fmda.config import to_dict
from fmda.diffusion.compare import Walk
from fmda.diffusion.filters import (
    ComparingFilter,
    ConstantImage,
    Filter,
    ImageFilter,
    PromptFilter,
    Verdict,
    choose_prompts,
    refusal_row,
)
from fmda.diffusion.manifest import (
    IMAGES,
    Ledger,
    Manifest,
    Picture,
    Prompt,
    Row,
    image_file,
)
from fmda.errors import UserError, disk_errors
from fmda.png import captioned, grid, is_whole, read_png, write_png
from fmda.progress import Line, track
from fmda.runs.identity import RECORD, claim

Draw = Callable[[Sequence[str], Sequence[int]], UInt8[np.ndarray, "n H W 3"]]
"""(prompts, seeds) -> images. The seed alone decides the noise: not the batch, the place in it, or the device."""

SHEET = "contact-sheet.png"
SHEET_WIDTH = 1800
SHEET_CELLS = 100


def generate(
    draw: Draw,
    prompts: Sequence[Prompt],
    folder: str | Path,
    *,
    count: int,
    batch: int,
    seed: int,
    facts: Any,
    filters: Sequence[ImageFilter | ComparingFilter] = (),
    prompt_filters: Sequence[PromptFilter] = (),
    tries: int = 4,
    process_index: int = 0,
    process_count: int = 1,
    wait: Callable[[str], object] = lambda what: None,
    task: str = "generate",
) -> Manifest:
    """Fills a folder with `count` images and returns its manifest.

    Image j shows prompt j modulo the prompts that the prompt filters keep, in their order: the first images of a set
    hold as many of each prompt, to within one. Its noise is `image_seed(seed, j, attempt)`, where `attempt` is the
    number of images of index j that were refused before. So the image of a manifest line can be generated again alone
    by `draw([line.prompt], [line.seed])`. The folder does not depend on batch size, process count or interruptions,
    provided that `draw` and the filters treat each image of a batch as they would alone.

    A second call with the same arguments resumes, and restores files that were deleted or cut off. A larger `count`
    adds images; a smaller one leaves those beyond it. Near-constant images are always generated again
    (`ConstantImage`). Refusals are logged in `refused.jsonl` and counted in `summary.json`; `contact-sheet.png` shows
    the first image of each prompt.

    When `tries` images of one index are refused, the others are still generated, and an error names it at the end. It
    ends at once where more indices are lost than kept, or where a filter compares images. The next call continues from
    there, with more tries.

    With several processes, each generates the indices that are `process_index` modulo `process_count`, on its own
    devices, into the same folder on a shared disk; the first one then compares and merges. Their number may change
    from call to call.

    Args:
        draw: makes the images; always called with `batch` prompts and seeds, the last ones repeated where fewer are
            needed, so that it is compiled once.
        prompts: see `fmda.diffusion.manifest.Prompt`.
        folder: new, empty, or filled by an earlier call.
        count: images in the end.
        batch: images per call of `draw`, per process.
        seed: of the set, any integer.
        facts: what else determines the images, as dataclass or plain values by name: sampler, steps, guidance, size,
            fingerprint of the checkpoint. They are written to every line, and a folder with others is refused.
        filters: applied in this order, those that compare images last.
        prompt_filters: applied in this order before anything is generated.
        tries: images of one index at most.
        process_index, process_count: which of how many processes this is.
        wait: with several processes, returns when all of them have called it with the same word.
        task: name of the work in the progress line.

    Raises:
        UserError: count, batch or tries below 1; two filters of one name; the folder holds images of other facts,
            prompts, seed or filters, or other files; it cannot be written; no prompt is left; all tries of an image
            were refused.
        ValueError: `draw` returns something else than its images.
    """
    check_numbers(count=count, batch=batch, tries=tries)
    prompts, folder = tuple(prompts), Path(folder)
    filters = filters if any(isinstance(one, ConstantImage) for one in filters) else (ConstantImage(), *filters)
    repeated = [name for name, times in Counter(one.name for one in [*filters, *prompt_filters]).items() if times > 1]
    if repeated:
        raise UserError(f"filters: two are called '{repeated[0]}'; give them different names")
    cycle, refused_prompts = choose_prompts(prompts, prompt_filters)
    identity = {
        "seed": seed,
        "facts": facts,
        "prompts": {str(k): [prompt.text, prompt.class_index, prompt.class_name] for k, prompt in enumerate(prompts)},
        "prompt_filters": {one.name: dict(one.settings) for one in prompt_filters},
        "filters": {one.name: dict(one.settings) for one in filters},
    }
    with disk_errors(folder):
        if process_index == 0 or (folder / RECORD).is_file():
            # a folder of other facts ends all processes, so that none waits for another
            claim(folder, identity, remedy="choose another folder", exclusive=True)
            (folder / IMAGES).mkdir(exist_ok=True)
        wait("claim")
        plain = {name: value for name, value in to_dict(facts).items() if value is not None}
        with contextlib.ExitStack() as journals:
            ledger = journals.enter_context(contextlib.closing(Ledger(folder, process_index)))
            run = _Drawing(draw, cycle, ledger, tuple(filters), batch, seed, plain, tries, task)
            run.fill(range(process_index, count, process_count), compare=process_count == 1)
            wait("drawn")
            if process_index == 0:
                if process_count > 1:
                    run = replace(run, ledger=journals.enter_context(contextlib.closing(Ledger(folder))))
                    run.fill(range(count), compare=True)
                run.finish(count, refused_prompts)
        wait("merged")
        return Manifest.read(folder).head(count)


def check_numbers(**numbers: int) -> None:
    """Raises UserError that names the first number below 1."""
    for name, value in numbers.items():
        if value < 1:
            raise UserError(f"{name}: {value}; give at least 1")


def image_seed(seed: int, index: int, attempt: int) -> int:
    """Returns the seed of one image, 0..2**32-1: the first four bytes of SHA-256 of "seed/index/attempt"."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}/{attempt}".encode()).digest()[:4], "big")


def contact_sheet(folder: str | Path, columns: int = 10) -> UInt8[np.ndarray, "H W 3"]:
    """Returns an overview of a generated folder, RGB: the first image of each prompt over its class or text.

    Of many prompts `SHEET_CELLS` are shown, spaced evenly.
    Raises UserError for a folder without a manifest or with a damaged image.
    """
    check_numbers(columns=columns)
    manifest = Manifest.read(folder)
    first = {picture.prompt_index: picture for picture in reversed(manifest.pictures)}
    order, count = sorted(first), min(len(first), SHEET_CELLS)
    shown = [first[order[k * len(order) // count]] for k in range(count)]
    columns = min(columns, len(shown))
    return grid([_cell(read_png(manifest.folder / p.file), p, SHEET_WIDTH // columns) for p in shown], columns)


def _cell(image: UInt8[np.ndarray, "H W 3"], picture: Picture, widest: int) -> UInt8[np.ndarray, "h w 3"]:
    """Returns an image, at most `widest` pixels wide, over its caption."""
    width = min(max(image.shape[1], 160), widest)
    height = max(1, round(image.shape[0] * width / image.shape[1]))
    kind = cv2.INTER_AREA if width < image.shape[1] else cv2.INTER_LINEAR
    resized = np.asarray(cv2.resize(image, (width, height), interpolation=kind))
    return captioned(resized, picture.class_name or picture.prompt)


@dataclass
class _Drawing:
    """The work of one process. `lost` are the indices whose tries are used up."""

    draw: Draw
    cycle: list[tuple[int, Prompt]]
    ledger: Ledger
    filters: tuple[ImageFilter | ComparingFilter, ...]
    batch: int
    seed: int
    facts: dict[str, Any]
    tries: int
    task: str
    lost: set[int] = field(default_factory=set)

    def fill(self, indices: range, *, compare: bool) -> None:
        """Generates the missing images of the indices; with `compare`, which needs all of them, also compares them.

        Raises UserError when all tries of an index are refused.
        """
        comparing = [one for one in self.filters if isinstance(one, ComparingFilter)]
        walk = None
        if compare and comparing:
            walk = Walk(self.ledger, comparing, len(indices), self.batch, self.refusal)
        total = sum(j not in self.ledger.pictures or walk is not None and not self.ledger.passed(j) for j in indices)
        if total:
            for _ in track(self._finished(indices, walk, at_once=bool(comparing)), self.task, total):
                pass
        if self.lost:
            raise self._error()

    def _finished(self, indices: range, walk: Walk | None, at_once: bool) -> Iterator[int]:
        """Yields each index once its image is final for this process."""
        pending = [j for j in indices if j not in self.ledger.pictures]
        while True:
            if walk is not None:
                yield from walk.advance()
                if walk.refused is not None:
                    # lower than all that is pending, since the pass goes in order
                    pending.insert(0, walk.refused)
            lost = {j for j in pending if self.ledger.attempt(j) >= self.tries}
            self.lost |= lost
            if self.lost and (at_once or len(self.lost) > len(self.ledger.pictures)):
                raise self._error()
            for j in sorted(lost):
                prompt = self.cycle[j % len(self.cycle)][1]
                _say(f"generate: image {j} ('{prompt.text}'): all {self.tries} tries refused; continuing")
            pending = [j for j in pending if j not in lost]
            if not pending:
                return
            group, pending = pending[: self.batch], pending[self.batch :]
            kept = self._draw_group(group)
            if walk is None:
                yield from kept
            pending = [j for j in group if j not in kept] + pending

    def _draw_group(self, group: list[int]) -> list[int]:
        """Generates one batch, writes what the filters keep and logs the rest; returns the indices kept."""
        pictures = [self.picture(j) for j in group]
        filled = pictures + pictures[-1:] * (self.batch - len(group))
        images = np.asarray(self.draw([p.prompt for p in filled], [p.seed for p in filled]))
        if images.dtype != np.uint8 or images.ndim != 4 or (len(images), images.shape[-1]) != (self.batch, 3):
            raise ValueError(f"draw returned {images.dtype} {images.shape}, expected uint8 ({self.batch}, H, W, 3)")
        prompts = [Prompt(p.prompt, p.class_index, p.class_name) for p in filled]
        scores: list[dict[str, float | None]] = [{} for _ in group]
        refused: dict[int, Row] = {}
        for one in self.filters:
            if isinstance(one, ImageFilter) and len(refused) < len(group):
                for j, row, verdict in zip(group, scores, one.judge(images, prompts), strict=False):
                    row[one.name] = verdict.score
                    if verdict.why is not None and j not in refused:
                        refused[j] = self.refusal(j, one, verdict)
        kept = [k for k, j in enumerate(group) if j not in refused]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda k: write_png(self.ledger.folder / pictures[k].file, images[k]), kept))
        self.ledger.keep([replace(pictures[k], scores=scores[k]) for k in kept])
        self.ledger.refuse(list(refused.values()))
        return [group[k] for k in kept]

    def picture(self, index: int) -> Picture:
        """Returns the manifest line of the next attempt at an image, without scores."""
        number, prompt = self.cycle[index % len(self.cycle)]
        attempt = self.ledger.attempt(index)
        return Picture(
            index, image_file(index, number), prompt.text, number, prompt.class_index, prompt.class_name,
            image_seed(self.seed, index, attempt), attempt, facts=self.facts,
        )  # fmt: skip

    def refusal(self, index: int, by: Filter, verdict: Verdict) -> Row:
        """Returns the log line of a refusal of the current attempt."""
        picture = self.picture(index)
        number, prompt = self.cycle[index % len(self.cycle)]
        return refusal_row(number, prompt, by, verdict, index=index, attempt=picture.attempt, seed=picture.seed)

    def _error(self) -> UserError:
        first = min(self.lost)
        rows = [row for _, row in sorted(self.ledger.refused[first].items())]
        counts = ", ".join(f"{name} {n}" for name, n in Counter(row["filter"] for row in rows).items())
        more = f", and so of {len(self.lost) - 1} more" if len(self.lost) > 1 else ""
        return UserError(
            f"{self.ledger.folder}: image {first} ('{rows[-1]['prompt']}'): all {len(rows)} tries refused ({counts}; "
            f"last: {rows[-1]['why']}){more}; generate again with more tries to continue from what is there, or with "
            "other prompts or looser filters into another folder"
        )

    def finish(self, count: int, refused_prompts: Sequence[Row]) -> None:
        """Writes the final files when all images exist."""
        ledger = self.ledger
        if ledger.complete(count) and is_whole(ledger.folder / SHEET):
            return
        ledger.merge(count, refused_prompts, [one.name for one in self.filters])
        write_png(ledger.folder / SHEET, contact_sheet(ledger.folder))
        refused = Counter(row["filter"] for rows in ledger.refused.values() for row in rows.values())
        if refused or refused_prompts:
            by = ", ".join(f"{name} {n}" for name, n in sorted(refused.items())) or "none"
            _say(
                f"generate: images refused and generated again: {by}; prompts refused: {len(refused_prompts)}; "
                f"see {ledger.folder / 'refused.jsonl'}"
            )
        ledger.clear()


def _say(text: str) -> None:
    """Prints a line that stays, above the progress."""
    with Line() as line:
        line.note(text)
