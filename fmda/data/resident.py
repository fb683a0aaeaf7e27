"""Small datasets decoded once: their batches hold places in memory instead of pixels."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from fmda.data.loader import Batch, stack
from fmda.data.streams import Stream
from fmda.data.transforms import Compose, RandomCrop, RandomFlip, ResizeKeepRatio, Wanted, pad
from fmda.progress import track


class Resident(NamedTuple):
    """A stream whose examples are in memory.

    Attributes:
        arrays: all examples, resized and not cropped: {"image": uint8 [n, H, W, 3], "labels": uint8 [n, H, W]}; without
            labels no "labels". Smaller images are padded on the right and below.
        crop: (height, width) of a window.
        stream: batches {"row", "top", "left", "flip"}, each [b]: which window of which row, and whether it is mirrored;
            "margins" [b, 4] too where the stream's own batches have them.
    """

    arrays: Batch
    crop: tuple[int, int]
    stream: Stream


def resident(stream: Stream, budget: float) -> Resident | None:
    """Returns the stream held in memory; its windows are those that the stream itself cuts at each position.

    None where its transform does more than resize to a fixed size, crop and flip, or where as many examples of the
    first one's size take more than `budget` bytes. Raises FileFault for a file that cannot be read.
    """
    steps = stream.transform.steps if isinstance(stream.transform, Compose) else ()
    match steps:
        case [*fixed, RandomCrop() as crop, RandomFlip() as flip] if all(map(_fixed, fixed)):
            prepare = Compose(tuple(fixed))
        case _:
            return None
    rng = np.random.default_rng(0)  # a fixed size draws nothing

    def example(index: int) -> Any:
        return pad(prepare(stream.source[index], rng), crop.size)

    first = stack([example(0)])
    if len(stream.source) * sum(array.nbytes for array in first.values()) > budget:
        return None
    examples = [example(index) for index in track(range(len(stream.source)), "decode the examples")]
    sizes = [one.image.shape[:2] for one in examples]
    labels = [one.labels for one in examples]
    largest = (max(height for height, _ in sizes), max(width for _, width in sizes))
    rows = list(zip(range(len(examples)), sizes, labels, strict=True))
    arrays = stack([pad(one, largest) for one in examples])
    return Resident(arrays, crop.size, replace(stream, source=rows, transform=_Places(crop, flip)))


def _fixed(step: Any) -> bool:
    return isinstance(step, ResizeKeepRatio) and step.scale[0] == step.scale[1]


@dataclass(frozen=True)
class _Places:
    """(row, size, labels) -> the window that `crop` and `flip` would cut."""

    crop: RandomCrop
    flip: RandomFlip

    def __call__(
        self,
        example: tuple[int, tuple[int, int], UInt8[np.ndarray, "H W"] | None],
        rng: np.random.Generator,
        wanted: Wanted | None = None,
    ) -> dict[str, Any]:
        row, size, labels = example
        top, left = self.crop.corner(size, labels, rng, wanted)
        flip = self.flip.drawn(rng)
        place = {"row": np.int32(row), "top": np.int32(top), "left": np.int32(left), "flip": np.bool_(flip)}
        if not self.crop.margins:
            return place
        margins = self.crop.around(size, top, left)
        return place | {"margins": self.flip.mirrored(margins) if flip else margins}
