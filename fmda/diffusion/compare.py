"""The comparison of generated images in order of their index, each with the kept ones before it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from fmda.diffusion.filters import ComparingFilter, Verdict
from fmda.diffusion.manifest import Ledger, Row, load_image

Features = Float[np.ndarray, " d"]


class Walk:
    """A walk over the images by index, as far as they are drawn; it goes on when more are.

    It stops at an image that is not drawn yet, and at one that it refuses: that index is then `refused`, else None.
    What it decides depends on the images of lower index alone, so a second walk after a kill decides the same.
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
        self._kept = [_Table() for _ in filters]
        self._seen: dict[int, list[Features]] = {}
        self.refused: int | None = None

    def advance(self) -> Iterator[int]:
        """Goes on as far as it can; yields the indices of images that passed, but for those of an earlier call."""
        pictures, self.refused = self._ledger.pictures, None
        while self._position < self._count and self._position in pictures:
            index = self._position
            if index not in self._seen:
                self._look_ahead()
            features = self._seen.pop(index)
            known = self._ledger.passed(index)
            if not known and not self._passes(index, features):
                self.refused = index
                return
            for table, one in zip(self._kept, features, strict=True):
                table.add(one)
            self._position += 1
            if not known:
                yield index

    def _passes(self, index: int, features: list[Features]) -> bool:
        """Compares an image; the file of a refused one goes once that is logged."""
        picture = self._ledger.pictures[index]
        scores = dict(picture.scores)
        for one, table, feature in zip(self._filters, self._kept, features, strict=True):
            verdict = one.compare(feature, table.rows)
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
        ahead = [j for j in range(self._position, last) if j in self._ledger.pictures and j not in self._seen]
        images = [load_image(self._ledger.folder / self._ledger.pictures[j].file) for j in ahead]
        # filled up, so that networks are compiled once
        stack = np.stack(images + images[-1:] * (self._batch - len(images)))
        columns = [one.features(stack) for one in self._filters]
        self._seen.update({j: [column[k] for column in columns] for k, j in enumerate(ahead)})


class _Table:
    """Rows of features that grow by one at a time."""

    def __init__(self) -> None:
        self._space, self._length = np.zeros((0, 0)), 0

    @property
    def rows(self) -> Float[np.ndarray, "m d"]:
        """The rows added so far."""
        return self._space[: self._length]

    def add(self, row: Features) -> None:
        """Adds a row; the space for them doubles when it is full."""
        if self._length == len(self._space):
            space = np.zeros((max(64, 2 * self._length), len(row)), row.dtype)
            if self._length:
                space[: self._length] = self.rows
            self._space = space
        self._space[self._length] = row
        self._length += 1
