"""Changes to a training example, in NumPy: each is a small picklable object called with (example, generator).

Images stay uint8; they are normalised on the device with the constants below. Labels are never interpolated.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from fmda.data.classes import IGNORE
from fmda.data.dataset import Example
from fmda.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Step = Callable[[Example, np.random.Generator], Example]


class Wanted(NamedTuple):
    """A class that a crop should show on more than `least` pixels."""

    label: int
    least: int


@dataclass(frozen=True)
class Compose:
    """Several steps, one after the other, drawing from one generator."""

    steps: tuple[Step, ...]

    def __call__(self, example: Example, rng: np.random.Generator, wanted: Wanted | None = None) -> Example:
        """Returns the example after all steps; a crop shows what is wanted, if that is found."""
        for step in self.steps:
            example = step(example, rng, wanted) if isinstance(step, RandomCrop) else step(example, rng)
        return example


def fit_size(height: int, width: int, long_max: int, short_max: int) -> tuple[int, int]:
    """Returns (height, width) scaled, ratio kept, to the largest size with long side <= long_max and short side
    <= short_max; rounded by floor(x + 0.5), as mmcv and the FLOSS hosts do."""
    scale = min(long_max / max(height, width), short_max / min(height, width))
    return max(1, math.floor(height * scale + 0.5)), max(1, math.floor(width * scale + 0.5))


def resize_image(image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the image at (height, width) by OpenCV's fixed-point bilinear on uint8, without antialiasing."""
    if image.shape[:2] == tuple(size):
        return image
    return np.asarray(cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR))


def resize_image_pillow(image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the image at (height, width) by Pillow's bilinear filter: rounded, antialiased where it shrinks."""
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def resize_labels(labels: UInt8[np.ndarray, "H W"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w"]:
    """Returns the label map at (height, width), each pixel that of the nearest original pixel centre."""
    height, width = labels.shape
    rows = ((np.arange(size[0]) + 0.5) * height / size[0]).astype(np.int64)
    columns = ((np.arange(size[1]) + 0.5) * width / size[1]).astype(np.int64)
    return labels[rows[:, None], columns[None]]


def on_both(example: Example, image: Callable, labels: Callable | None = None) -> Example:
    """Returns the example with `image` applied to its image, and `labels`, by default the same, to its labels."""
    changed = None if example.labels is None else (labels or image)(example.labels)
    return replace(example, image=image(example.image), labels=changed)


@dataclass(frozen=True)
class ResizeKeepRatio:
    """Resizes to fit (long_max, short_max), times a factor drawn uniformly from `scale`."""

    long_max: int
    short_max: int
    scale: tuple[float, float] = (1.0, 1.0)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the resized example."""
        low, high = self.scale
        factor = low if low == high else rng.uniform(low, high)
        height, width = example.image.shape[:2]
        size = fit_size(height, width, round(self.long_max * factor), round(self.short_max * factor))
        return on_both(example, lambda image: resize_image(image, size), lambda labels: resize_labels(labels, size))


@dataclass(frozen=True)
class RandomCrop:
    """Cuts a window of (height, width) at a uniform place; smaller images are padded first (0, labels 255).

    With `max_class_ratio` below 1 the place is drawn again, up to `tries` times, until at least two classes occur and
    none covers more than that share of the labelled pixels (0.75 in DACS and DAFormer); the last draw is kept. All of
    this is done again, up to `tries` times, until the window shows what is wanted.

    With `margins` the example records where the window lies. With `diagonal` one number decides for both axes, as in
    detectron2's `FixedSizeCrop`, so that corners lie on a diagonal.
    """

    size: tuple[int, int]
    max_class_ratio: float = 1.0
    tries: int = 10
    margins: bool = False
    diagonal: bool = False

    def __call__(self, example: Example, rng: np.random.Generator, wanted: Wanted | None = None) -> Example:
        """Returns the crop."""
        example = pad(example, self.size)
        height, width = example.image.shape[:2]
        top, left = self.corner((height, width), example.labels, rng, wanted)
        if self.margins:
            example = replace(example, margins=self.around((height, width), top, left))
        return on_both(example, lambda array: array[top : top + self.size[0], left : left + self.size[1]])

    def around(self, size: tuple[int, int], top: int, left: int) -> Int32[np.ndarray, "4"]:
        """Returns the margins (`Example`) of a window in an image of that size."""
        return np.array([top, size[0] - top - self.size[0], left, size[1] - left - self.size[1]], np.int32)

    def corner(
        self,
        size: tuple[int, int],
        labels: UInt8[np.ndarray, "H W"] | None,
        rng: np.random.Generator,
        wanted: Wanted | None = None,
    ) -> tuple[int, int]:
        """Returns the (top, left) of the window in an image of at least its (height, width)."""
        for _ in range(self.tries):
            top, left = self._varied_corner(size, labels, rng)
            if labels is None or wanted is None:
                break
            window = labels[top : top + self.size[0], left : left + self.size[1]]
            if np.count_nonzero(window == wanted.label) > wanted.least:
                break
        return top, left

    def _varied_corner(
        self, size: tuple[int, int], labels: UInt8[np.ndarray, "H W"] | None, rng: np.random.Generator
    ) -> tuple[int, int]:
        for _ in range(self.tries):
            top, left = self._drawn_corner(size, rng)
            if labels is None or self.max_class_ratio >= 1:
                break
            if self._varied(labels[top : top + self.size[0], left : left + self.size[1]]):
                break
        return top, left

    def _drawn_corner(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
        free = [whole - part for whole, part in zip(size, self.size, strict=True)]
        if self.diagonal:
            share = rng.random()
            return round(share * free[0]), round(share * free[1])
        return int(rng.integers(free[0] + 1)), int(rng.integers(free[1] + 1))

    def _varied(self, labels: UInt8[np.ndarray, "h w"]) -> bool:
        counts = np.bincount(labels.ravel(), minlength=256)[:IGNORE]
        counts = counts[counts > 0]
        return len(counts) > 1 and bool(counts.max() <= self.max_class_ratio * counts.sum())


def pad(example: Example, size: tuple[int, int]) -> Example:
    """Returns the example padded on the right and below to at least (height, width): 0 in images, 255 in labels."""
    height, width = example.image.shape[:2]
    below, right = max(0, size[0] - height), max(0, size[1] - width)
    if not below and not right:
        return example
    margin = ((0, below), (0, right))
    return on_both(
        example,
        lambda image: np.pad(image, (*margin, (0, 0))),
        lambda labels: np.pad(labels, margin, constant_values=IGNORE),
    )


@dataclass(frozen=True)
class RandomFlip:
    """Mirrors left and right with probability `p`."""

    p: float = 0.5

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the example, perhaps mirrored."""
        if not self.drawn(rng):
            return example
        if example.margins is not None:
            example = replace(example, margins=self.mirrored(example.margins))
        return on_both(example, lambda array: np.ascontiguousarray(array[:, ::-1]))

    def drawn(self, rng: np.random.Generator) -> bool:
        """Returns whether to mirror."""
        return bool(rng.random() < self.p)

    @staticmethod
    def mirrored(margins: Int32[np.ndarray, "4"]) -> Int32[np.ndarray, "4"]:
        """Returns the margins (`Example`) of the mirrored window."""
        return margins[[0, 1, 3, 2]]


@dataclass(frozen=True)
class ColourJitter:
    """With probability `p` changes brightness, contrast, saturation and hue, in random order.

    On RGB in [0, 1]: brightness adds U(-b, b), contrast multiplies by U(1-c, 1+c) (not about the mean), saturation
    scales S of HSV by U(1-s, 1+s), hue turns by U(-h, h) of a full turn (the jitter of DACS and DAFormer). Each of
    the first three is clipped to [0, 1]. The defaults are DAFormer's.
    """

    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.2
    p: float = 0.8

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the example with changed colours; labels are untouched."""
        if rng.random() >= self.p:
            return example
        values = example.image.astype(np.float32) / 255
        for step in rng.permutation(4):
            if step == 0:
                values = np.clip(values + np.float32(rng.uniform(-self.brightness, self.brightness)), 0, 1)
            elif step == 1:
                values = np.clip(values * np.float32(rng.uniform(1 - self.contrast, 1 + self.contrast)), 0, 1)
            else:
                hsv = cv2.cvtColor(values, cv2.COLOR_RGB2HSV)
                if step == 2:
                    factor = rng.uniform(1 - self.saturation, 1 + self.saturation)
                    hsv[..., 1] = np.clip(hsv[..., 1] * factor, 0, 1)
                else:
                    hsv[..., 0] = (hsv[..., 0] + 360 * rng.uniform(-self.hue, self.hue)) % 360
                values = np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))
        return replace(example, image=np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8))


def training_transform(
    crop: tuple[int, int],
    *,
    resize: tuple[int, int] | None = None,
    scale: tuple[float, float] = (1.0, 1.0),
    max_class_ratio: float = 0.75,
    flip: float = 0.5,
    jitter: float = 0.0,
    margins: bool = False,
    diagonal: bool = False,
) -> Compose:
    """Returns the usual chain: resize to fit (long, short) times a random scale, crop, flip, jitter with probability
    `jitter`. With `margins` examples record where in the resized, perhaps mirrored image they lie (`Example`); for
    `diagonal` see `RandomCrop`. Raises UserError for a crop without area."""
    if min(crop) < 1:
        raise UserError(f"crop {list(crop)}: needs a height and a width of at least 1")
    steps: list[Step] = [] if resize is None else [ResizeKeepRatio(max(resize), min(resize), scale)]
    steps += [RandomCrop(crop, max_class_ratio, margins=margins, diagonal=diagonal), RandomFlip(flip)]
    return Compose((*steps, *([ColourJitter(p=jitter)] if jitter else [])))
