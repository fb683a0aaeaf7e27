"""A folder of images generated from prompts: seeds by index, resumable, filtered, by one process or several."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from fmda.config import to_dict
from fmda.diffusion.filters import CONSTANT, Filter, NearDuplicate, PromptFilter, choose_prompts
from fmda.diffusion.manifest import IMAGES, REFUSED, GeneratedImage, Manifest, Progress, Prompt, Verdict, image_file
from fmda.errors import UserError, disk_errors
from fmda.png import read_png, write_png
from fmda.progress import note, track
from fmda.runs.identity import RECORD, claim

Draw = Callable[[Sequence[str], Sequence[int]], UInt8[np.ndarray, "n H W 3"]]
"""(prompts, seeds) -> images. The seed alone decides the noise: not the batch, the place in it, or the device."""


def generate(
    draw: Draw,
    prompts: Sequence[Prompt],
    folder: str | Path,
    *,
    count: int,
    batch: int,
    seed: int,
    facts: Any,
    filters: Sequence[Filter] = (),
    duplicates: NearDuplicate | None = None,
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
    adds images; a smaller one leaves those beyond it. Near-constant images are always generated again. A filter may
    give the next tries of an index another prompt.

    When `tries` images of one index are refused, the others are still generated, and an error names it at the end. The
    error comes at once where more indices are lost than kept, or with `duplicates`. The next call continues from there,
    with more tries.

    With several processes, each generates the indices that are `process_index` modulo `process_count`, on its own
    devices, into the same folder on a shared disk; the first one then compares and merges. Their number may change
    from call to call.

    Args:
        draw: makes the images; always called with `batch` prompts and seeds, the last ones repeated where fewer are
            needed, so that it is compiled once.
        prompts: at least one.
        folder: new, empty, or filled by an earlier call.
        count: images in the end.
        batch: images per call of `draw`, per process.
        seed: of the set, any integer.
        facts: what else determines the images, as dataclass or plain values by name: sampler, steps, guidance, size,
            fingerprint of the checkpoint. They are written to every line, and a folder with others is refused.
        filters: applied to each image, in this order.
        duplicates: applied last, in the order of the indices.
        prompt_filters: applied in this order before anything is generated.
        tries: images of one index at most.
        process_index, process_count: which of how many processes this is.
        wait: with several processes, returns when all of them have called it with the same word.
        task: name of the work in the progress line.

    Raises:
        UserError: the folder holds images of other facts, prompts, seed or filters, or other files; no prompt is left;
            all tries of an image were refused; the folder cannot be written.
        ValueError: `draw` returns something else than its images.
    """
    folder = Path(folder)
    cycle, refused_prompts = choose_prompts(prompts, prompt_filters)
    filters = (CONSTANT, *filters)
    settings = {one.name: one.settings for one in (*filters, duplicates) if one is not None}
    identity = {
        "seed": seed,
        "facts": facts,
        "prompts": {str(k): [prompt.text, prompt.class_index, prompt.class_name] for k, prompt in enumerate(prompts)},
        "prompt_filters": {one.name: one.settings for one in prompt_filters},
        "filters": settings,
    }
    plain = {name: value for name, value in to_dict(facts).items() if value is not None}

    def fill(progress: Progress, indices: range, compare: NearDuplicate | None) -> None:
        at_once = duplicates is not None
        _Work(draw, cycle, progress, indices, filters, compare, batch, seed, plain, tries, at_once).fill(task)

    with disk_errors(folder):
        if process_index == 0 or (folder / RECORD).is_file():
            # a folder of other facts ends all processes, so that none waits for another
            claim(folder, identity, remedy="choose another folder", exclusive=True)
            (folder / IMAGES).mkdir(exist_ok=True)
        wait("claim")
        with closing(Progress(folder, process_index)) as progress:
            fill(progress, range(process_index, count, process_count), duplicates if process_count == 1 else None)
        wait("drawn")
        if process_index == 0:
            with closing(Progress(folder)) as progress:
                fill(progress, range(count), duplicates)
                if progress.finish(count, refused_prompts, list(settings)):
                    _report(progress, len(refused_prompts))
        wait("merged")
        return Manifest.read(folder).head(count)


def image_seed(seed: int, index: int, attempt: int) -> int:
    """Returns the seed of one image, 0..2**32-1: the first four bytes of SHA-256 of "seed/index/attempt"."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}/{attempt}".encode()).digest()[:4], "big")


@dataclass
class _Work:
    """The generation of some indices by one process.

    Attributes:
        pending: indices without an image, a heap.
        lost: indices whose tries are used up.
        position: the first index that is not compared yet.
        embeddings: of the images by index; valid at the indices in `embedded`.
    """

    draw: Draw
    cycle: Sequence[tuple[int, Prompt]]
    progress: Progress
    indices: range
    filters: Sequence[Filter]
    duplicates: NearDuplicate | None
    batch: int
    seed: int
    facts: dict[str, Any]
    tries: int
    end_at_once: bool
    pending: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    position: int = 0
    embeddings: Float[np.ndarray, "n d"] = field(default_factory=lambda: np.empty((0, 0)))
    embedded: set[int] = field(default_factory=set)

    def fill(self, task: str) -> None:
        """Generates the missing images; with `duplicates`, which needs all indices, compares each with those before it.

        Raises UserError when all tries of an index are refused.
        """
        self.pending = [j for j in self.indices if j not in self.progress.images]
        unfinished = len(self.pending)
        if self.duplicates is not None:
            images = (self.progress.images.get(j) for j in self.indices)
            unfinished += sum(image is not None and self.duplicates.name not in image.scores for image in images)
        if unfinished:
            for _ in track(self._finished(), task, unfinished, more=self._refusals):
                pass
        if self.lost:
            raise self._error()

    def _refusals(self) -> str:
        number = sum(map(len, self.progress.refused.values()))
        return f"{number} refused" if number else ""

    def _finished(self) -> Iterator[int]:
        """Yields each index once its image is final for this process."""
        while True:
            if self.duplicates is not None:
                yield from self._compare(self.duplicates)
            group: list[int] = []
            while self.pending and len(group) < self.batch:
                index = heappop(self.pending)
                if self.progress.attempts(index) < self.tries:
                    group.append(index)
                else:
                    self._lose(index)
            if not group:
                return
            kept = self._draw_group(group)
            if self.duplicates is None:
                yield from kept

    def _draw_group(self, group: list[int]) -> list[int]:
        """Generates one batch, writes the images that the filters keep and logs the rest; returns the kept indices."""
        rows = [self._image(j) for j in group]
        filled = rows + rows[-1:] * (self.batch - len(group))
        images = np.asarray(self.draw([row.prompt for row in filled], [row.seed for row in filled]))
        if images.dtype != np.uint8 or images.ndim != 4 or (len(images), images.shape[-1]) != (self.batch, 3):
            raise ValueError(f"draw returned {images.dtype} {images.shape}, expected uint8 ({self.batch}, H, W, 3)")
        prompts = [Prompt(row.prompt, row.class_index, row.class_name) for row in filled]
        refused: dict[int, tuple[str, Verdict]] = {}
        for one in self.filters:
            left = [k for k, row in enumerate(rows) if k not in refused and row.scores.get(one.unless) is None]
            for k, verdict in zip(left, one.judge(images, prompts, left) if left else (), strict=True):
                rows[k].scores[one.name] = verdict.score
                if verdict.why is not None:
                    refused[k] = one.name, verdict
        kept = [k for k in range(len(group)) if k not in refused]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda k: write_png(self.progress.folder / rows[k].file, images[k]), kept))
        self.progress.keep(*(rows[k] for k in kept))
        for k, reason in refused.items():
            self._refuse(rows[k], *reason)
        return [group[k] for k in kept]

    def _compare(self, duplicates: NearDuplicate) -> Iterator[int]:
        """Compares the images in order up to the first that is missing; yields the indices that pass.

        Decisions depend on the images of lower index alone, so a second pass after a kill decides the same.
        """
        images = self.progress.images
        while self.position < len(self.indices) and self.position in images:
            index = self.position
            if index not in self.embedded:
                self._embed(duplicates)
            if duplicates.name not in images[index].scores:
                verdict = duplicates.compare(self.embeddings[index], self.embeddings[:index])
                if verdict.why is not None:
                    self.embedded.remove(index)
                    self._refuse(images[index], duplicates.name, verdict)
                    return
                scores = {**images[index].scores, duplicates.name: verdict.score}
                self.progress.keep(replace(images[index], scores=scores))
                yield index
            self.position += 1

    def _embed(self, duplicates: NearDuplicate) -> None:
        """Reads the next images, a batch at most, and embeds them."""
        images = self.progress.images
        last = min(self.position + self.batch, len(self.indices))
        ahead = [j for j in range(self.position, last) if j in images and j not in self.embedded]
        pixels = [read_png(self.progress.folder / images[j].file) for j in ahead]
        # filled up, so that networks are compiled once
        rows = duplicates.embeddings(np.stack(pixels + pixels[-1:] * (self.batch - len(pixels))))[: len(ahead)]
        if not len(self.embeddings):
            self.embeddings = np.empty((len(self.indices), rows.shape[1]), rows.dtype)
        self.embeddings[ahead] = rows
        self.embedded.update(ahead)

    def _refuse(self, image: GeneratedImage, by: str, verdict: Verdict) -> None:
        self.progress.refuse(image, by, verdict)
        heappush(self.pending, image.index)

    def _image(self, index: int) -> GeneratedImage:
        """Returns the manifest line of the next attempt at an image, without scores."""
        number, prompt = self.cycle[index % len(self.cycle)]
        attempt = self.progress.attempts(index)
        text = self.progress.edit(index) or prompt.text
        return GeneratedImage(
            index, image_file(index, number), text, number, prompt.class_index, prompt.class_name,
            image_seed(self.seed, index, attempt), attempt, facts=self.facts,
        )  # fmt: skip

    def _lose(self, index: int) -> None:
        self.lost.append(index)
        if self.end_at_once or len(self.lost) > len(self.progress.images):
            raise self._error()
        prompt = self.cycle[index % len(self.cycle)][1]
        note(f"generate: image {index} ('{prompt.text}'): all {self.tries} tries refused; continuing")

    def _error(self) -> UserError:
        first = min(self.lost)
        rows = [row for _, row in sorted(self.progress.refused[first].items())]
        counts = ", ".join(f"{name} {n}" for name, n in Counter(row.filter for row in rows).items())
        more = f", and so of {len(self.lost) - 1} more" if len(self.lost) > 1 else ""
        return UserError(
            f"{self.progress.folder}: image {first} ('{rows[-1].prompt}'): all {len(rows)} tries refused ({counts}; "
            f"last: {rows[-1].why}){more}; generate again with more tries to continue from what is there, or with "
            "other prompts or looser filters into another folder"
        )


def _report(progress: Progress, refused_prompts: int) -> None:
    refused = Counter(row.filter for rows in progress.refused.values() for row in rows.values())
    if refused or refused_prompts:
        by = ", ".join(f"{name} {n}" for name, n in sorted(refused.items())) or "none"
        note(
            f"generate: images refused and generated again: {by}; prompts refused: {refused_prompts}; "
            f"see {progress.folder / REFUSED}"
        )
