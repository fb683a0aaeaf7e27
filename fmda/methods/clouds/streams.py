"""Source and generated images in one stream, and the views of generated images whose labels come later."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from fmda.data import IGNORE
from fmda.data.dataset import Example
from fmda.data.streams import Repeated, Stream
from fmda.data.transforms import Compose, RandomCrop, RandomFlip

SOURCE = -1


class Place(NamedTuple):
    """A view of a generated image.

    Attributes:
        number: of the image; `SOURCE` for a source image.
        mirrored: whether it is mirrored.
        top, left: corner of the crop of the image, mirrored or not.
    """

    number: int
    mirrored: bool
    top: int
    left: int


@dataclass(frozen=True, eq=False)
class Both(Sequence[tuple[int, Example]]):
    """All source images, then all generated ones: pairs of the number of a generated image, or `SOURCE`, and it."""

    source: Sequence[Example]
    generated: Sequence[Example]

    def __len__(self) -> int:
        return len(self.source) + len(self.generated)

    def __getitem__(self, index: int) -> tuple[int, Example]:  # type: ignore[override]
        place = index - len(self.source)
        return (SOURCE, self.source[index]) if place < 0 else (place, self.generated[place])


@dataclass(frozen=True)
class View:
    """(number, example) -> {"image", "labels", "generated", "place"}, generated images cropped and perhaps mirrored.

    Their labels are 255 everywhere.

    Attributes:
        source: makes a view of a source image.
        crop, flip: make one of a generated image.
    """

    source: Compose
    crop: RandomCrop
    flip: RandomFlip = RandomFlip()

    def __call__(self, pair: tuple[int, Example], rng: np.random.Generator) -> dict[str, Any]:
        """Returns the arrays of a row."""
        number, example = pair
        if number == SOURCE:
            example = self.source(example, rng)
            assert example.labels is not None  # of a labelled dataset
            return _row(example.image, example.labels, Place(SOURCE, False, 0, 0))
        image = example.image
        top, left = self.crop.corner((image.shape[0], image.shape[1]), None, rng)
        place = Place(number, self.flip.drawn(rng), top, left)
        blank = np.full(self.crop.size, IGNORE, np.uint8)
        return _row(cut(image, place, self.crop.size), blank, place)


def cut(array: UInt8[np.ndarray, "H W *c"], place: Place, size: tuple[int, int]) -> UInt8[np.ndarray, "h w *c"]:
    """Returns a view of (height, width) `size` of a generated image or its labels."""
    whole = array[:, ::-1] if place.mirrored else array
    return np.ascontiguousarray(whole[place.top : place.top + size[0], place.left : place.left + size[1]])


def place_of(row: Int32[np.ndarray, "4"]) -> Place:
    """Returns the place in a row of a batch."""
    number, mirrored, top, left = row.tolist()
    return Place(number, bool(mirrored), top, left)


def _row(image: UInt8[np.ndarray, "h w 3"], labels: UInt8[np.ndarray, "h w"], place: Place) -> dict[str, Any]:
    generated = np.bool_(place.number != SOURCE)
    return {"image": image, "labels": labels, "generated": generated, "place": np.array(place, np.int32)}


def joint_stream(
    source: Sequence[Example], generated: Sequence[Example], transform: Compose, crop: int, batch: int, factor: float
) -> Stream:
    """Returns the stream in which a generated image occurs `factor` times as often as a source image.

    How many of a batch are generated is left to chance; a batch may hold none.
    """
    view = View(transform, RandomCrop((crop, crop)))
    order = Repeated((1.0,) * len(source) + (factor,) * len(generated))
    return Stream(Both(source, generated), view, batch, order)
