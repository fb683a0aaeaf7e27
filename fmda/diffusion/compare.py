"""The comparison of generated images in order of their index, each with the kept ones before it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from fmda.diffusion.filters import ComparingFilter, Verdict
from fmda.diffusion.manifest import Ledger, Row
from fmda.png import read_png

Features = Float[np.ndarray, " d"]


class Walk:
    """A pass over the images by index, as far as they exist; it continues when there are more.

    It stops at an image that does not exist yet and at one that it refuses, whose index is then `refused` (else None).
    Decisions depend on the images of lower index alone, so a second pass after a kill decides the same.
    """

    def __init__(
        self,
        ledger: Ledger,
        filters: Sequence[ComparingFilter],
        count: int,
        batch: int,
        row: Callable[[int, ComparingFilter, Verdict], Row],
    ) -> None:
        """Starts at image 0 of `count`. `row` makes the log line of a refusal."""
        self._ledger, self._filters, self._count, self._batch, self._row = ledger, filters, count, batch, row
        self._position = 0
        self._kept: list[Float[np.ndarray, "count d"]] = []
        self._ahead: dict[int, list[Features]] = {}
        self.refused: int | None = None

    def advance(self) -> Iterator[int]:
        """Continues as far as it can; yields the indices of images that passed, but for those of an earlier call."""
        pictures, self.refused = self._ledger.pictures, None
        while self._position < self._count and self._position in pictures:
            index = self._position
            if index not in self._ahead:
                self._look_ahead()
            features = self._ahead.pop(index)
            known = self._ledger.passed(index)
            if not known and not self._passes(index, features):
                self.refused = index
                return
            self._kept = self._kept or [np.empty((self._count, len(row)), row.dtype) for row in features]
            for kept, row in zip(self._kept, features, strict=True):
                kept[index] = row
            self._position += 1
            if not known:
                yield index

    def _passes(self, index: int, features: list[Features]) -> bool:
        """Compares an image; the file of a refused one is deleted once that is logged."""
        picture = self._ledger.pictures[index]
        scores = dict(picture.scores)
        for k, (one, row) in enumerate(zip(self._filters, features, strict=True)):
            verdict = one.compare(row, self._kept[k][:index] if index else np.empty((0, len(row)), row.dtype))
            if verdict.why is not None:
                self._ledger.refuse([self._row(index, one, verdict)])
                (self._ledger.folder / picture.file).unlink(missing_ok=True)
                return False
            scores[one.name] = verdict.score
        self._ledger.pictures[index] = replace(picture, scores=scores)
        return True

    def _look_ahead(self) -> None:
        """Reads the next images, a batch at most, and keeps their features."""
        last = min(self._position + self._batch, self._count)
        ahead = [j for j in range(self._position, last) if j in self._ledger.pictures and j not in self._ahead]
        images = [read_png(self._ledger.folder / self._ledger.pictures[j].file) for j in ahead]
        # filled up, so that networks are compiled once
        stack = np.stack(images + images[-1:] * (self._batch - len(images)))
        columns = [one.features(stack) for one in self._filters]
        self._ahead.update({j: [column[k] for column in columns] for k, j in enumerate(ahead)})
