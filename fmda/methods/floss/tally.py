"""What one pass over unlabelled images leaves behind: sums per (template, class), and the file they survive in.

Sums are over the pixels that a template's classifier gives to a class. They are kept on the host in float64 and int64
(a dataset has about 10^10 pixels), and saved as a whole after every few images, so that a pass killed at any moment
continues to the same last bit.
"""

import functools
import io
import operator
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int

from fmda.atomic import replacing
from fmda.errors import UserError

MEASURES = ("count", "entropy", "confidence", "margin", "smooth", "consensus", "flip")
"""Per pixel: 1; entropy in nats; largest probability; its lead over the second; whether the right-hand neighbour has
the same label; whether the ordinary classifier gives the same label; whether the mirrored image does."""

SCORING = ("hits", "labelled")
"""Per pixel with a true label: whether that is the class; 1. Read by `criteria.true_iou` alone, never by a ranking."""


class Tally(NamedTuple):
    """Sums over the images processed so far; every field is added over images.

    Attributes:
        images, pixels: how many.
        sums: measure -> float64 [M, K]; "count", "hits" and "labelled" hold whole numbers.
        ordinary: pixels that the ordinary classifier gives to each class, int64 [K].
        mirrored: pixels that each template gives to each class in the mirrored images, int64 [M, K].
        truth: labelled pixels of each class, int64 [K].
    """

    images: int
    pixels: int
    sums: dict[str, Float[np.ndarray, "M K"]]
    ordinary: Int[np.ndarray, " K"]
    mirrored: Int[np.ndarray, "M K"]
    truth: Int[np.ndarray, " K"]

    @classmethod
    def empty(cls, templates: int, classes: int) -> "Tally":
        """Returns a tally of no images."""
        sums = {m: np.zeros((templates, classes)) for m in (*MEASURES, *SCORING)}
        none = np.zeros(classes, np.int64)
        return cls(0, 0, sums, none, np.zeros((templates, classes), np.int64), none)

    def mean(self, measure: str) -> Float[np.ndarray, "M K"]:
        """Returns the mean of a measure over the pixels of each (template, class); 0 where there are none."""
        count = self.sums["count"]
        return np.divide(self.sums[measure], count, out=np.zeros_like(count), where=count > 0)

    @property
    def share(self) -> Float[np.ndarray, "M K"]:
        """Per cent of all pixels that each template gives to each class; each row sums to 100."""
        return 100 * self.sums["count"] / max(self.pixels, 1)

    def plus(self, other: "Tally") -> "Tally":
        """Returns the tally of the images of both."""
        return jax.tree.map(operator.add, self, other)

    def over_processes(self) -> "Tally":
        """Returns the sum of the tallies of all processes, in their order; every process gets the same."""
        # as bytes, since jax would round float64; equal shapes make files of equal length
        local = np.frombuffer(self._archive(), np.uint8)
        rows = np.asarray(multihost_utils.process_allgather(local)).reshape(jax.process_count(), -1)
        return functools.reduce(Tally.plus, (self._read(io.BytesIO(row.tobytes())) for row in rows))

    def save(self, path: Path) -> None:
        """Writes the tally so that a reader finds the old or the new one, also after a system crash."""
        with replacing(path) as part, open(part, "wb") as file:
            file.write(self._archive())
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def load(cls, path: Path) -> "Tally":
        """Returns a saved tally. Raises UserError for a damaged file."""
        try:
            return cls._read(path)
        except (OSError, ValueError, KeyError) as fault:
            raise UserError(f"{path}: damaged ({fault}); delete it to rank the templates again") from None

    def _archive(self) -> bytes:
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {f"sum_{m}": a for m, a in self.sums.items()}
        arrays |= {"ordinary": self.ordinary, "mirrored": self.mirrored, "truth": self.truth}
        np.savez(buffer, head=np.asarray([self.images, self.pixels], np.int64), **arrays)
        return buffer.getvalue()

    @classmethod
    def _read(cls, source: Path | io.BytesIO) -> "Tally":
        with np.load(source) as file:
            images, pixels = (int(n) for n in file["head"])
            sums = {m: file[f"sum_{m}"] for m in (*MEASURES, *SCORING)}
            return cls(images, pixels, sums, file["ordinary"], file["mirrored"], file["truth"])
