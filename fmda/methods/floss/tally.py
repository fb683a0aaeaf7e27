"""What one pass over unlabelled images leaves behind: sums per (template, class), and the file they survive in.

Sums are over the pixels that a template's classifier gives to a class. They are kept on the host in float64 and int64
(a dataset has about 10^10 pixels), and saved as a whole after every few images, so that a pass killed at any moment
continues to the same last bit.
"""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass
class Tally:
    """Sums over the images processed so far.

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
        return cls(
            0,
            0,
            {m: np.zeros((templates, classes)) for m in (*MEASURES, *SCORING)},
            np.zeros(classes, np.int64),
            np.zeros((templates, classes), np.int64),
            np.zeros(classes, np.int64),
        )

    def mean(self, measure: str) -> Float[np.ndarray, "M K"]:
        """Returns the mean of a measure over the pixels of each (template, class); 0 where there are none."""
        count = self.sums["count"]
        return np.divide(self.sums[measure], count, out=np.zeros_like(count), where=count > 0)

    @property
    def share(self) -> Float[np.ndarray, "M K"]:
        """Per cent of all pixels that each template gives to each class; each row sums to 100."""
        return 100 * self.sums["count"] / max(self.pixels, 1)

    def add(self, other: "Tally") -> None:
        """Adds the sums of other images."""
        self.images += other.images
        self.pixels += other.pixels
        for measure, sums in other.sums.items():
            self.sums[measure] += sums
        self.ordinary += other.ordinary
        self.mirrored += other.mirrored
        self.truth += other.truth

    def over_processes(self) -> "Tally":
        """Returns the sum of the tallies of all processes, in their order; every process gets the same."""
        if jax.process_count() == 1:
            return self
        arrays = [np.asarray([self.images, self.pixels]), *self.sums.values(), self.ordinary, self.mirrored, self.truth]
        local = np.concatenate([np.ascontiguousarray(a).view(np.uint8).ravel() for a in arrays])
        # as bytes: jax would round float64
        everyone = np.asarray(multihost_utils.process_allgather(local))
        total = Tally.empty(*self.mirrored.shape)
        for row in everyone:
            parts = np.split(row, np.cumsum([a.nbytes for a in arrays])[:-1])
            head, *rest = (
                np.frombuffer(part.tobytes(), a.dtype).reshape(a.shape) for part, a in zip(parts, arrays, strict=True)
            )
            sums = dict(zip(self.sums, rest, strict=False))
            total.add(Tally(int(head[0]), int(head[1]), sums, *rest[len(sums) :]))
        return total

    def save(self, path: Path) -> None:
        """Writes the tally so that a reader finds the old or the new one, also after a system crash."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {f"sum_{m}": a for m, a in self.sums.items()}
        arrays |= {"ordinary": self.ordinary, "mirrored": self.mirrored, "truth": self.truth}
        np.savez(buffer, head=np.asarray([self.images, self.pixels], np.int64), **arrays)
        with replacing(path) as part, open(part, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def load(cls, path: Path) -> "Tally":
        """Returns a saved tally. Raises UserError for a damaged file."""
        try:
            with np.load(path) as file:
                images, pixels = (int(n) for n in file["head"])
                sums = {m: file[f"sum_{m}"] for m in (*MEASURES, *SCORING)}
                rest = [file[name] for name in ("ordinary", "mirrored", "truth")]
        except (OSError, ValueError, KeyError) as fault:
            raise UserError(f"{path}: damaged ({fault}); delete it to rank the templates again") from None
        return cls(images, pixels, sums, *rest)
