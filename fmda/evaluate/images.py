"""Input images: arrays in several forms, files and folders."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from fmda.data.listing import IMAGE_SUFFIXES, images_in
from fmda.errors import UserError


def as_rgb(image: UInt8[np.ndarray, "..."]) -> UInt8[np.ndarray, "H W 3"]:
    """Returns an array as uint8[H, W, 3]: [H, W] and [H, W, 1] are grey, an opaque fourth channel is dropped.

    Raises:
        UserError: another type or shape, no pixel, or transparent pixels.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8:
        raise UserError(f"image: pixels have type {image.dtype}; give uint8 RGB, 0..255")
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4) or 0 in image.shape:
        raise UserError(f"image: shape {image.shape} is no image; give uint8 [height, width, 3]")
    if image.shape[-1] == 4:
        if (image[..., 3] != 255).any():
            raise UserError("image: has transparent pixels; flatten it onto a background first")
        image = image[..., :3]
    if image.shape[-1] == 1:
        image = np.repeat(image, 3, axis=-1)
    return np.ascontiguousarray(image)


def image_files(paths: Sequence[str | Path]) -> list[Path]:
    """Returns image files in order, each folder replaced by the images directly in it, sorted by name.

    Hidden files of a folder are left out; a warning names its other files that are not images.

    Raises:
        UserError: a path is missing or a folder holds no image.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; check the path")
        images, others = images_in(path) if path.is_dir() else ([path], [])
        if not images:
            raise UserError(f"{path}: holds no image ({', '.join(IMAGE_SUFFIXES)}); give a folder of images")
        if others:
            names = ", ".join(p.name for p in others[:5]) + (", ..." if len(others) > 5 else "")
            warnings.warn(f"{path}: {len(others)} files are skipped, not images by their suffix: {names}", stacklevel=2)
        files += images
    return files
