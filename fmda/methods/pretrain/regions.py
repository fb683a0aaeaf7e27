"""Regions of rendered street scenes and the first prompts for them. NumPy alone, for worker processes."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Int, UInt8, UInt16

from fmda.config import NonNegativeFloat, PositiveInt, Share
from fmda.errors import UserError
from fmda.sam.prompts import components
from fmda.sam.stage import CORNERS, NONE, OBJECT
from fmda.world.names import VOID


@dataclass(frozen=True)
class PromptConfig:
    """Which regions are prompted, and how.

    Attributes:
        count: prompts of an image.
        least: pixels of a region at least.
        by_area: share of the prompts whose region is that of a random pixel; the others take each region alike.
        boxes: share of the prompts that begin with a box; the others begin with a point.
        noise: deviation of a box's sides, as a share of its width and height.
        most_noise: pixels that a side is moved at most.
        rounds: how often the decoder answers; each time but the first it sees one more point, where it was wrong, and
            from the third time on its last mask too.
    """

    count: PositiveInt = 8
    least: PositiveInt = 24
    by_area: Share = 0.5
    boxes: Share = 0.3
    noise: NonNegativeFloat = 0.1
    most_noise: NonNegativeFloat = 20.0
    rounds: PositiveInt = 2


def region_map(
    labels: UInt8[np.ndarray, "h w"], instances: UInt16[np.ndarray, "h w"], least: int
) -> Int[np.ndarray, "h w"]:
    """Returns the number of each pixel's region, from 1; 0 for pixels without a class and for smaller regions.

    A region is a thing, or a 4-connected part of a class outside of all things.
    """
    numbers, found = np.zeros(labels.shape, np.int32), 0
    for thing in np.unique(instances[instances > 0]):
        mask = instances == thing
        if mask.sum() >= least:
            found += 1
            numbers[mask] = found
    rest = np.where(instances > 0, VOID, labels).astype(np.uint8)
    for number, part in enumerate(components(rest, least - 1, most=rest.size), found + 1):
        numbers[part.mask] = number
    return numbers


@dataclass(frozen=True)
class Prompts:
    """The transform (scene, generator) -> an image, regions of it and their first prompts.

    The result holds "image" uint8 [h, image_size, 3], half of them mirrored; "masks" bool [count, h/stride,
    image_size/stride], where a region fills half of a cell or more; "points" float32 [count, 2, 2] and "labels" int32
    [count, 2], as `Sam.decode_labelled` reads them: a point and no second one, or the corners of a box.
    """

    config: PromptConfig
    image_size: int
    stride: int

    def __call__(self, scene: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns the prompted image. Raises UserError for images of which no whole number fills a square."""
        image, (height, width) = scene["image"], scene["labels"].shape
        if width % height or width % self.image_size or (height * self.image_size // width) % self.stride:
            raise UserError(
                f"data: an image is {width}x{height}; give images as wide as {self.image_size} (model.image_size), or "
                f"a multiple of it, that fill a square when they are stacked"
            )
        factor = width // self.image_size
        numbers = region_map(scene["labels"], scene["instances"], self.config.least)
        if rng.random() < 0.5:
            image, numbers = image[:, ::-1], numbers[:, ::-1]
        rows = [self._prompt(numbers, factor * self.stride, rng) for _ in range(self.config.count)]
        masks, points, labels = zip(*rows, strict=True)
        size = (self.image_size, height // factor)
        return {
            "image": cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_AREA),
            "masks": np.stack(masks),
            "points": (np.stack(points) / factor).astype(np.float32),
            "labels": np.stack(labels).astype(np.int32),
        }

    def _prompt(
        self, numbers: Int[np.ndarray, "h w"], cell: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns mask, points in pixels of the scene, and their labels."""
        config, (height, width) = self.config, numbers.shape
        pixels = numbers[numbers > 0]
        chosen = rng.choice(pixels) if rng.random() < config.by_area else rng.integers(1, numbers.max() + 1)
        mask = numbers == chosen
        cells = mask.reshape(height // cell, cell, width // cell, cell).mean((1, 3)) >= 0.5
        if rng.random() < config.boxes:
            return cells, noisy_box(mask, config, rng), np.array(CORNERS)
        rows, columns = np.nonzero(mask)
        place = rng.integers(len(rows))
        return cells, np.array([[columns[place], rows[place]], [0, 0]]), np.array([OBJECT, NONE])


def noisy_box(mask: Bool[np.ndarray, "h w"], config: PromptConfig, rng: np.random.Generator) -> np.ndarray:
    """Returns corners [[left, top], [right, bottom]] of a mask's box, each side moved by chance, inside the image."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    corners = np.array([[columns[0], rows[0]], [columns[-1], rows[-1]]], float)
    spread = np.minimum(config.noise * (corners[1] - corners[0] + 1), config.most_noise)
    moved = corners + np.clip(rng.normal(size=(2, 2)) * spread, -config.most_noise, config.most_noise)
    return np.clip(moved, 0, np.array([mask.shape[1], mask.shape[0]]) - 1)
