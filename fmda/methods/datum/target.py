"""The target image, and what a step sees of it: crops, drawn anew each time or encoded once into a bank."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from fmda.data.files import image_size, read_image
from fmda.data.listing import folder_images
from fmda.errors import UserError
from fmda.png import grid

Pixels = UInt8[np.ndarray, "H W 3"]

MOST_PIXELS = 2**28
"""Of a target after resizing: three quarters of a GiB."""

_REFUSED = {
    "grey": "a grey image, of which the model would learn that the target has no colours; give it in colour, or "
    "convert it to RGB if that is meant",
    "alpha": "an image with an alpha channel: transparent places have no colour to learn; lay it on a background and "
    "save it as RGB",
    "other": "an image of mode {mode}; convert it to RGB",
}


def open_target(path: str | Path, resize: int | None, crop: int) -> Pixels:
    """Returns the target image, RGB, its shorter side brought to `resize` pixels (None: as it is).

    Resized as the original does it: Pillow's bilinear filter, which averages where it shrinks, and the longer side
    rounded down. A rotation noted by the camera is applied. Raises UserError for a file that is missing, truncated,
    grey, with an alpha channel, or smaller than a crop (a small image is enlarged, but not from below one crop), and
    where `resize` would make more than `MOST_PIXELS`.
    """
    path = Path(path)
    read_image(path)  # names what is missing, cut off, or has more than 8 bits
    with Image.open(path) as file:
        mode = "alpha" if file.has_transparency_data else "grey" if file.mode in ("1", "L") else file.mode
        if mode != "RGB":
            raise UserError(f"{path}: {_REFUSED.get(mode, _REFUSED['other']).format(mode=mode)}")
        image = ImageOps.exif_transpose(file)
    width, height = image.size
    if min(width, height) < crop:
        raise UserError(
            f"{path}: {width}x{height} pixels hold no crop of {crop}; give a larger image, or a model that is "
            "trained on smaller ones with crop= to match"
        )
    if resize is not None and min(width, height) != resize:
        scale = min(width, height)
        if resize**2 * max(width, height) // scale > MOST_PIXELS:
            raise UserError(
                f"resize: {resize} makes more than {MOST_PIXELS:,} pixels of {path}, {width}x{height}; choose less"
            )
        image = image.resize((resize * width // scale, resize * height // scale), Image.Resampling.BILINEAR)
    return np.asarray(image)


def digest(path: str | Path) -> str:
    """Returns 12 hex digits of the bytes of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


class ClassImages(Sequence[Pixels]):
    """The images of a folder, RGB, read on access; each must hold a crop."""

    def __init__(self, folder: str | Path, crop: int) -> None:
        """Raises UserError for a folder without images, and for an image whose header gives a size below one crop."""
        self.paths = folder_images(folder)
        if not self.paths:
            raise UserError(f"prior.images: {folder} holds no images; fix the path, or leave it out to generate some")
        for path in self.paths:
            if min(image_size(path)) < crop:
                raise UserError(f"{path}: smaller than a crop of {crop} pixels; give larger images")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Pixels:  # type: ignore[override]
        return read_image(self.paths[index])


@dataclass(frozen=True)
class Examples(Sequence[tuple[np.ndarray, ...]]):
    """Rows of one array from each column; the shorter columns begin again."""

    columns: tuple[Sequence[np.ndarray], ...]

    def __len__(self) -> int:
        return max(len(column) for column in self.columns)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:  # type: ignore[override]
        return tuple(column[index % len(column)] for column in self.columns)


def random_crop(image: Pixels, size: int, rng: np.random.Generator) -> UInt8[np.ndarray, "S S 3"]:
    """Returns a square of the image at its own scale, every place as likely as any other."""
    height, width = image.shape[:2]
    top, left = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
    return image[top : top + size, left : left + size]


@dataclass(frozen=True)
class RandomCrops:
    """The transform (images, generator) -> {"pixels": uint8 [k, S, S, 3], "seed": uint32 [k]}: a crop of each."""

    size: int

    def __call__(self, images: tuple[Pixels, ...], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns the crops, and the seeds of their latents, noise and times."""
        crops = np.stack([random_crop(image, self.size, rng) for image in images])
        return {"pixels": crops, "seed": _seeds(len(images), rng)}


@dataclass(frozen=True)
class Encoded:
    """The transform (moments, generator) -> {"moments": float32 [k, h, w, 2c], "seed": uint32 [k]}."""

    def __call__(self, moments: tuple[Float[np.ndarray, "h w c2"], ...], rng: np.random.Generator) -> dict:
        """Returns the moments as they are, and seeds as `RandomCrops`."""
        return {"moments": np.stack(moments), "seed": _seeds(len(moments), rng)}


def _seeds(count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(2**32, size=count, dtype=np.uint32)


def contact_sheet(image: Pixels, size: int, seed: int, count: int = 8) -> Pixels:
    """Returns `count` crops in two rows: what a step sees of the target."""
    rng = np.random.default_rng((seed, 1))
    crops = [random_crop(image, size, rng) for _ in range(count)]
    return grid(crops, (count + 1) // 2)
