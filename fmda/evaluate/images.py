"""Images as users give them: arrays of several forms, files and folders, with one-line errors."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from fmda.data.files import IMAGE_SUFFIXES
from fmda.errors import UserError


def as_rgb(image: UInt8[np.ndarray, "..."], where: str = "image") -> UInt8[np.ndarray, "H W 3"]:
    """Returns an array as uint8[H, W, 3]: [H, W] and [H, W, 1] are grey, an opaque fourth channel is dropped.

    Raises:
        UserError: another type or shape, no pixel, or transparent pixels.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8:
        raise UserError(f"{where}: pixels have type {image.dtype}; give uint8 RGB, 0..255")
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4) or 0 in image.shape:
        raise UserError(f"{where}: shape {image.shape} is no image; give uint8 [height, width, 3]")
    if image.shape[-1] == 4:
        if (image[..., 3] != 255).any():
            raise UserError(f"{where}: has transparent pixels; flatten it onto a background first")
        image = image[..., :3]
    if image.shape[-1] == 1:
        image = np.repeat(image, 3, axis=-1)
    return np.ascontiguousarray(image)


def image_files(paths: Sequence[str | Path]) -> list[Path]:
    """Returns image files in order, each folder replaced by the images directly in it, sorted by name.

    Raises:
        UserError: a path is missing or a folder holds no image.
    """
    return [file for path in paths for file in _files(Path(path))]


def _files(path: Path) -> Iterator[Path]:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check the path")
    if not path.is_dir():
        yield path
        return
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise UserError(f"{path}: holds no image ({', '.join(IMAGE_SUFFIXES)}); give a folder of images")
    yield from found
