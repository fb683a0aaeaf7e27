"""Several views of an image for self-distillation, and masks over their patches. NumPy alone, for worker processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
from jaxtyping import Bool, UInt8

from fmda.config import Bounds, NonNegativeInt, PositiveInt, Share, Side
from fmda.data.check import check_images
from fmda.data.dataset import Example
from fmda.data.files import read_image
from fmda.data.listing import folder_images
from fmda.data.transforms import ColourJitter, Compose, RandomFlip
from fmda.errors import UserError

Image = UInt8[np.ndarray, "h w 3"]


class ImageFolders(Sequence[Image]):
    """The images of several folders as a random-access source of RGB arrays; labels beside them are not read.

    A folder holds images itself or in `images/`, as rendered datasets do.
    """

    def __init__(self, roots: Sequence[str | Path]) -> None:
        """Decodes each image once. Raises UserError for a folder without images and for broken ones, naming them."""
        self.paths: list[Path] = []
        for root in roots:
            images = folder_images(root)
            if not images:
                raise UserError(f"{root}: no images there; draw some with `fmda data render` or fix the path")
            self.paths += images
        if not self.paths:
            raise UserError("data: names no folder; give at least one that holds images")
        check_images(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image:  # type: ignore[override]
        return read_image(self.paths[index])


@dataclass(frozen=True)
class ViewConfig:
    """How views are cut, and what of them is masked.

    Attributes:
        size: side of the two global views, pixels.
        local_size: side of the local views.
        locals: number of local views.
        global_side, local_side: smallest and largest side of a view, as a share of the image's shorter side; drawn
            log-uniformly.
        aspect: largest ratio of height to width, and its inverse.
        jitter, grey, solarise: probabilities of changed colours, of none, and (second global view) of inverted lights.
        blur: probability that the first and second global and the local views are blurred.
        mask: smallest and largest share of a global view's patches that is masked.
        masked: probability that a global view is masked at all.
    """

    size: PositiveInt = 64
    local_size: PositiveInt = 32
    locals: NonNegativeInt = 4
    global_side: tuple[Side, Side] = (0.5, 1.0)
    local_side: tuple[Side, Side] = (0.2, 0.5)
    aspect: Annotated[float, Bounds(1)] = 4 / 3
    jitter: Share = 0.8
    grey: Share = 0.2
    solarise: Share = 0.2
    blur: tuple[Share, Share, Share] = (0.5, 0.1, 0.3)
    mask: tuple[Share, Share] = (0.1, 0.5)
    masked: Share = 0.5


@dataclass(frozen=True)
class Views:
    """The transform (image, generator) -> views.

    The result holds "globals" uint8 [2, size, size, 3], "locals" uint8 [locals, local_size, local_size, 3] and "masks"
    bool [2, grid * grid]. All views come from one square of the image, so that they show the same things.
    """

    config: ViewConfig
    grid: int

    def __call__(self, image: Image, rng: np.random.Generator) -> dict[str, np.ndarray]:
        config = self.config
        square = random_square(image, (1.0, 1.0), rng)
        lists: dict[str, list[np.ndarray]] = {"globals": [], "locals": [], "masks": []}
        for number in range(2):
            view = random_crop(square, config.size, config.global_side, config.aspect, rng)
            lists["globals"].append(self._changed(view, config.blur[number], number == 1, rng))
            share = rng.uniform(*config.mask) if rng.random() < config.masked else 0.0
            lists["masks"].append(block_mask(self.grid, share, rng).ravel())
        for _ in range(config.locals):
            view = random_crop(square, config.local_size, config.local_side, config.aspect, rng)
            lists["locals"].append(self._changed(view, config.blur[2], False, rng))
        shape = (0, config.local_size, config.local_size, 3)
        views = {name: np.stack(rows) for name, rows in lists.items() if rows}
        return {"locals": np.zeros(shape, np.uint8)} | views

    def _changed(self, view: Image, blur: float, second: bool, rng: np.random.Generator) -> Image:
        """Returns the view, perhaps mirrored, with other colours, grey, blurred or solarised."""
        config = self.config
        steps = Compose((RandomFlip(), ColourJitter(0.3, 0.3, 0.2, 0.1, config.jitter)))
        view = steps(Example(view, None, ""), rng).image
        if rng.random() < config.grey:
            view = np.repeat(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=-1)
        if rng.random() < blur:
            view = np.asarray(cv2.GaussianBlur(view, (0, 0), rng.uniform(0.1, 1.0) * len(view) / 64 + 0.1))
        if second and rng.random() < config.solarise:
            view = np.where(view >= 128, 255 - view, view)
        return view


def random_square(image: Image, side: tuple[float, float], rng: np.random.Generator) -> Image:
    """Returns a square window; its side is a share of the shorter side, drawn log-uniformly from `side`."""
    height, width = image.shape[:2]
    length = max(1, int(round(min(height, width) * np.exp(rng.uniform(*np.log(side))))))
    top, left = int(rng.integers(height - length + 1)), int(rng.integers(width - length + 1))
    return image[top : top + length, left : left + length]


def random_crop(image: Image, size: int, side: tuple[float, float], aspect: float, rng: np.random.Generator) -> Image:
    """Returns a window of about `side` (share of the shorter side) and a ratio up to `aspect`, resized to a square."""
    height, width = image.shape[:2]
    length = min(height, width) * np.exp(rng.uniform(*np.log(side)))
    stretch = np.exp(0.5 * rng.uniform(-np.log(aspect), np.log(aspect)))
    h = int(np.clip(round(length * stretch), 1, height))
    w = int(np.clip(round(length / stretch), 1, width))
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    return resized_window(image[top : top + h, left : left + w], size)


def resized_window(window: Image, size: int) -> Image:
    """Returns the window as a square of `size` pixels, averaged where it shrinks."""
    kind = cv2.INTER_AREA if min(window.shape[:2]) > size else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(np.ascontiguousarray(window), (size, size), interpolation=kind))


def block_mask(grid: int, share: float, rng: np.random.Generator) -> Bool[np.ndarray, "grid grid"]:
    """Returns a mask that hides round(share * grid^2) patches in rectangles (iBOT's block-wise masking).

    Blocks are put one over another until there are enough; of the last one only a part counts.
    """
    wanted = int(round(share * grid * grid))
    mask = np.zeros((grid, grid), bool)
    while (missing := wanted - int(mask.sum())) > 0:
        area, ratio = rng.uniform(min(2, missing), max(missing, 2)), np.exp(rng.uniform(np.log(0.4), np.log(2.5)))
        h = int(np.clip(round(np.sqrt(area * ratio)), 1, grid))
        w = int(np.clip(round(np.sqrt(area / ratio)), 1, grid))
        top, left = int(rng.integers(grid - h + 1)), int(rng.integers(grid - w + 1))
        rows, columns = np.nonzero(~mask[top : top + h, left : left + w])
        mask[top + rows[:missing], left + columns[:missing]] = True
    return mask
