"""A folder of images drawn from prompts: seeds by index, resumable, filtered, by one process or several."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

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
    FIELDS,
    SETTINGS,
    Ledger,
    Manifest,
    Picture,
    Prompt,
    Row,
    check_lines,
    claim,
    image_file,
    load_image,
    save_image,
    whole_image,
)
from fmda.errors import UserError
from fmda.progress import Line, track

Draw = Callable[[Sequence[str], Sequence[int]], UInt8[np.ndarray, "n H W 3"]]
"""(prompts, seeds) -> images. The seed alone decides the noise: not the batch, the place in it, or the device."""

SHEET = "contact-sheet.png"
SHEET_WIDTH = 1800
SHEET_CELLS = 100
_CAPTION_HEIGHT = 18


def generate(
    draw: Draw,
    prompts: Sequence[Prompt],
    folder: str | Path,
    *,
    count: int,
    batch: int,
    seed: int,
    facts: Mapping[str, Any],
    filters: Sequence[ImageFilter | ComparingFilter] = (),
    prompt_filters: Sequence[PromptFilter] = (),
    tries: int = 4,
    process_index: int = 0,
    process_count: int = 1,
    wait: Callable[[str], object] | None = None,
) -> Manifest:
    """Fills a folder with `count` images and returns its manifest.

    Image j shows prompt j modulo the prompts that the prompt filters keep, in their order: every beginning of the set
    has as many images of each prompt, to within one. Its noise is `image_seed(seed, j, attempt)`, where `attempt` is
    how many images of index j were refused before. So the image of a manifest line can be drawn again alone by
    `draw([line.prompt], [line.seed])`; and neither `batch`, nor the number of processes, nor a kill at any moment
    changes the folder, as far as `draw` and the filters give each image of a batch what they give it alone.

    A second call with the same arguments continues what was broken off, and brings back files that were deleted and
    images that were cut off. A larger `count` adds images, a smaller one leaves those beyond it where they are. Black
    and near-constant images are always made again (`ConstantImage`). What is refused is logged in `refused.jsonl` with
    filter, score, threshold and why, and counted in `summary.json`; `contact-sheet.png` shows the first image of each
    prompt.

    When `tries` images of one index are refused, the others are drawn all the same, and an error names it at the end;
    at once where more are lost than kept, or where a filter compares images, which has to wait for it. The next call
    goes on from there, with more tries.

    With several processes, each draws the indices that are `process_index` modulo `process_count`, on its own devices,
    into the same folder on a shared disk; the first one then compares and merges. The number of processes may differ
    from call to call.

    Args:
        draw: makes the images; always called with `batch` prompts and seeds, the last ones repeated where fewer are
            wanted, so that it is compiled once.
        prompts: what to draw; see `fmda.diffusion.manifest.Prompt`.
        folder: new, empty, or filled by an earlier call.
        count: images in the end.
        batch: images per call of `draw`, per process.
        seed: of the run, any integer.
        facts: what else determines the images, plain values: sampler, steps, guidance, size, hash of the checkpoint.
            They are written to every line, and a folder with others is refused.
        filters: asked in this order, those that compare images last.
        prompt_filters: asked before anything is drawn, in this order.
        tries: images drawn of one index at most.
        process_index, process_count: which of how many processes this is.
        wait: with several processes, returns when all of them have called it with the same word.

    Raises:
        UserError: count, batch or tries below 1; two filters of one name; the folder holds images or lines of other
            facts, prompts, seed or filters, or other things; it cannot be written; no prompt is left; all tries of an
            image were refused.
        ValueError: a fact has the name of a manifest's own field; `draw` returns something else than its images; there
            are several processes and no `wait`.
    """
    prompts, folder = tuple(prompts), Path(folder)
    filters = _with_constant(filters)
    _check(count, batch, tries, facts, [*filters, *prompt_filters], (process_index, process_count, wait))
    cycle, refused_prompts = choose_prompts(prompts, prompt_filters)
    settings = {
        "seed": seed,
        "facts": dict(facts),
        "prompts": [[prompt.text, prompt.class_index, prompt.class_name] for prompt in prompts],
        "prompt_filters": [{"name": one.name, **one.settings} for one in prompt_filters],
        "filters": [{"name": one.name, **one.settings} for one in filters],
    }
    wait = wait or (lambda what: None)
    try:
        if process_index == 0 or (folder / SETTINGS).is_file():
            # a folder of other settings ends all processes, so that none waits for another
            claim(folder, settings)
        wait("claim")
        # as they are read back from lines
        plain = json.loads(json.dumps(dict(facts)))
        run = _Run(draw, cycle, Ledger(folder, process_index), filters, batch, seed, plain, tries)
        # before another process can have merged: all find the same
        check_lines(folder, run.picture)
        run.fill(range(process_index, count, process_count), compare=process_count == 1)
        wait("drawn")
        if process_index == 0:
            if process_count > 1:
                run = replace(run, ledger=Ledger(folder))
                run.fill(range(count), compare=True)
            run.finish(count, refused_prompts)
        wait("merged")
        return Manifest.read(folder).head(count)
    except OSError as fault:
        # a full disk does not say for which file it was asked
        raise UserError(
            f"{fault.filename or folder}: cannot write ({fault.strerror or fault}); make room or mend the path, and "
            "generate again to go on"
        ) from fault


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

    Of many prompts `SHEET_CELLS` are shown, taken evenly.
    Raises UserError for a folder without a manifest or with a damaged image.
    """
    if columns < 1:
        raise UserError(f"columns: {columns}; give at least 1")
    manifest = Manifest.read(folder)
    first: dict[int, Picture] = {}
    for picture in manifest:
        first.setdefault(picture.prompt_index, picture)
    order, count = sorted(first), min(len(first), SHEET_CELLS)
    shown = [first[order[k * len(order) // count]] for k in range(count)]
    columns = min(columns, len(shown))
    cells = [_cell(load_image(manifest.folder / p.file), p, SHEET_WIDTH // columns) for p in shown]
    height, width = (max(cell.shape[axis] for cell in cells) for axis in (0, 1))
    sheet = np.full((-(-len(cells) // columns) * height, columns * width, 3), 255, np.uint8)
    for k, cell in enumerate(cells):
        y, x = k // columns * height, k % columns * width
        sheet[y : y + cell.shape[0], x : x + cell.shape[1]] = cell
    return sheet


def _cell(image: UInt8[np.ndarray, "H W 3"], picture: Picture, widest: int) -> UInt8[np.ndarray, "h w 3"]:
    """Returns an image, at most `widest` pixels wide, over its caption."""
    width = min(max(image.shape[1], 160), widest)
    height = max(1, round(image.shape[0] * width / image.shape[1]))
    kind = cv2.INTER_AREA if width < image.shape[1] else cv2.INTER_LINEAR
    below = np.full((_CAPTION_HEIGHT, width, 3), 255, np.uint8)
    # the font has no other letters
    text = (picture.class_name or picture.prompt).encode("ascii", "replace").decode()
    while text and cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.4, 1)[0][0] > width - 4:
        text = text[:-1]
    cv2.putText(below, text, (2, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([np.asarray(cv2.resize(image, (width, height), interpolation=kind)), below])


@dataclass
class _Run:
    """The drawing of one process. `lost` are the indices whose tries are used up."""

    draw: Draw
    cycle: list[tuple[int, Prompt]]
    ledger: Ledger
    filters: tuple[ImageFilter | ComparingFilter, ...]
    batch: int
    seed: int
    facts: dict[str, Any]
    tries: int
    lost: set[int] = field(default_factory=set)

    def fill(self, indices: range, *, compare: bool) -> None:
        """Draws the missing images of the indices; with `compare`, which needs all of them, also compares them.

        Raises UserError when all tries of an index are refused.
        """
        walk = None
        if compare and self.comparing:
            walk = Walk(self.ledger, self.comparing, len(indices), self.batch, self.refusal)
        total = sum(j not in self.ledger.pictures or walk is not None and not self.ledger.passed(j) for j in indices)
        if total:
            for _ in track(self._finished(indices, walk), "generate", total):
                pass
        if self.lost:
            raise self._error()

    @property
    def comparing(self) -> list[ComparingFilter]:
        """The filters that compare images."""
        return [one for one in self.filters if isinstance(one, ComparingFilter)]

    def prompt(self, index: int) -> tuple[int, Prompt]:
        """Returns (prompt index, prompt) of an image."""
        return self.cycle[index % len(self.cycle)]

    def _finished(self, indices: range, walk: Walk | None) -> Iterator[int]:
        """Yields each index once its image needs nothing more from this process."""
        pending = [j for j in indices if j not in self.ledger.pictures]
        while True:
            if walk is not None:
                yield from walk.advance()
                if walk.refused is not None:
                    # lower than all that is pending, since the walk goes in order
                    pending.insert(0, walk.refused)
            pending = self._with_tries_left(pending)
            if not pending:
                return
            group, pending = pending[: self.batch], pending[self.batch :]
            kept = self._draw_group(group)
            if walk is None:
                yield from kept
            pending = [j for j in group if j not in kept] + pending

    def _with_tries_left(self, pending: list[int]) -> list[int]:
        """Returns the indices that may be drawn once more; raises UserError when it is no use to go on with them."""
        lost = {j for j in pending if self.ledger.attempt(j) >= self.tries}
        self.lost |= lost
        if self.lost and (self.comparing or len(self.lost) > len(self.ledger.pictures)):
            raise self._error()
        for j in sorted(lost):
            _say(f"generate: image {j} ('{self.prompt(j)[1].text}'): all {self.tries} tries refused; going on")
        return [j for j in pending if j not in lost]

    def _draw_group(self, group: list[int]) -> list[int]:
        """Draws one batch, writes what the filters keep and logs the rest; returns the indices kept."""
        pictures = [self.picture(j, self.ledger.attempt(j)) for j in group]
        filled = pictures + pictures[-1:] * (self.batch - len(group))
        images = np.asarray(self.draw([p.prompt for p in filled], [p.seed for p in filled]))
        if images.dtype != np.uint8 or images.ndim != 4 or (len(images), images.shape[-1]) != (self.batch, 3):
            raise ValueError(f"draw returned {images.dtype} {images.shape}, expected uint8 ({self.batch}, H, W, 3)")
        scores: list[dict[str, float | None]] = [{} for _ in group]
        refused: dict[int, Row] = {}
        for one in self.filters:
            if len(refused) == len(group) or not isinstance(one, ImageFilter):
                continue
            verdicts = one.judge(images, [self.prompt(p.index)[1] for p in filled])
            for j, given, verdict in zip(group, scores, verdicts, strict=False):
                given[one.name] = verdict.score
                if verdict.why is not None and j not in refused:
                    refused[j] = self.refusal(j, one, verdict)
        kept = [(replace(p, scores=s), image) for p, s, image in zip(pictures, scores, images, strict=False)]
        kept = [(picture, image) for picture, image in kept if picture.index not in refused]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda item: save_image(self.ledger.folder / item[0].file, item[1]), kept))
        self.ledger.keep([picture for picture, _ in kept])
        self.ledger.refuse(list(refused.values()))
        return [picture.index for picture, _ in kept]

    def picture(self, index: int, attempt: int) -> Picture:
        """Returns the manifest line of an attempt at an image, without scores."""
        number, prompt = self.prompt(index)
        return Picture(
            index, image_file(index, number), prompt.text, number, prompt.class_index, prompt.class_name,
            image_seed(self.seed, index, attempt), attempt, facts=self.facts,
        )  # fmt: skip

    def refusal(self, index: int, by: Filter, verdict: Verdict) -> Row:
        """Returns the log line of a refusal of the attempt at hand."""
        picture = self.picture(index, self.ledger.attempt(index))
        number, prompt = self.prompt(index)
        return refusal_row(number, prompt, by, verdict, index=index, attempt=picture.attempt, seed=picture.seed)

    def _error(self) -> UserError:
        first = min(self.lost)
        rows = [row for _, row in sorted(self.ledger.refused[first].items())]
        counts = ", ".join(f"{name} {n}" for name, n in Counter(row["filter"] for row in rows).items())
        more = f", and so of {len(self.lost) - 1} more" if len(self.lost) > 1 else ""
        return UserError(
            f"{self.ledger.folder}: image {first} ('{rows[-1]['prompt']}'): all {len(rows)} tries refused ({counts}; "
            f"last: {rows[-1]['why']}){more}; what is drawn stays: generate again with more tries to go on, or with "
            "other prompts or looser filters into another folder"
        )

    def finish(self, count: int, refused_prompts: Sequence[Row]) -> None:
        """Writes what the folder has when it is complete."""
        ledger = self.ledger
        if ledger.complete(count) and whole_image(ledger.folder / SHEET):
            return
        ledger.merge(count, refused_prompts, [one.name for one in self.filters])
        save_image(ledger.folder / SHEET, contact_sheet(ledger.folder))
        refused = Counter(row["filter"] for rows in ledger.refused.values() for row in rows.values())
        if refused or refused_prompts:
            by = ", ".join(f"{name} {n}" for name, n in sorted(refused.items())) or "none"
            _say(
                f"generate: images refused and made again: {by}; prompts refused: {len(refused_prompts)}; "
                f"see {ledger.folder / 'refused.jsonl'}"
            )
        ledger.clear()


def _with_constant(filters: Sequence[ImageFilter | ComparingFilter]) -> tuple[ImageFilter | ComparingFilter, ...]:
    if any(isinstance(one, ConstantImage) for one in filters):
        return tuple(filters)
    return (ConstantImage(), *filters)


def _check(
    count: int,
    batch: int,
    tries: int,
    facts: Mapping[str, Any],
    filters: Sequence[Filter],
    process: tuple[int, int, Any],
) -> None:
    check_numbers(count=count, batch=batch, tries=tries)
    names = [one.name for one in filters]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"filters: two are called '{name}'; name them apart")
    for name in facts:
        if name in (*FIELDS, "scores"):
            raise ValueError(f"facts: '{name}' is a key that manifest lines have already")
    index, number, wait = process
    if not 0 <= index < number:
        raise ValueError(f"process_index {index} of process_count {number}")
    if number > 1 and wait is None:
        raise ValueError("several processes need `wait`, by which the first one knows that the others have drawn")


def _say(text: str) -> None:
    """Prints a line that stays, above the progress."""
    with Line() as line:
        line.note(text)
