"""The images that a CLIP was trained on: resized, cropped and normalised by its checkpoint's image processor."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from fmda.errors import UserError
from fmda.weights.files import read_json
from fmda.weights.network import Loaded

_OPEN_CLIP_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Preprocess:
    """uint8 images -> normalised pixels, by Pillow's antialiased filters, as transformers' CLIPImageProcessor does it.

    Attributes:
        resize: side that the shorter one is brought to, ratio kept, or (height, width) whatever the ratio.
        crop: (height, width) cut from the centre, black where the image is smaller; None for the whole image.
        resample: Pillow's number of the filter; 3 is bicubic.
        mean, std: of RGB in [0, 1].
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int] | None
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, "n h w 3"]:
        """Returns float32 pixels of the size that the tower reads."""
        pixels = np.stack([self._cropped(self._resized(image)) for image in images]).astype(np.float32) / 255
        return (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)

    def _resized(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        if isinstance(self.resize, int):
            # the longer side is rounded down
            short = min(height, width)
            size = (self.resize * height // short, self.resize * width // short)
        else:
            size = self.resize
        resized = Image.fromarray(image).resize(size[::-1], Image.Resampling(self.resample))
        return np.asarray(resized)

    def _cropped(self, image: np.ndarray) -> np.ndarray:
        if self.crop is None:
            return image
        missing = [max(0, want - have) for want, have in zip(self.crop, image.shape[:2], strict=True)]
        if any(missing):
            image = np.pad(image, [*(((n + 1) // 2, n // 2) for n in missing), (0, 0)])
        top, left = ((have - want) // 2 for want, have in zip(self.crop, image.shape[:2], strict=True))
        return image[top : top + self.crop[0], left : left + self.crop[1]]


def preprocess_of(clip: Loaded) -> Preprocess:
    """Returns the preprocessing that a checkpoint names: `preprocessor_config.json`, else `open_clip_config.json`.

    What is not named: shorter side to the size that the tower reads, bicubic, centre crop.
    Raises UserError for values that are no size or filter.
    """
    side = clip.config.vision.image_size
    mean, std = clip.config.image_mean, clip.config.image_std
    folder = clip.folder or Path()
    hugging_face, open_clip = folder / "preprocessor_config.json", folder / "open_clip_config.json"
    if clip.folder is None or not (hugging_face.is_file() or open_clip.is_file()):
        return Preprocess(side, (side, side), int(Image.Resampling.BICUBIC), mean, std)
    if not hugging_face.is_file():
        named = read_json(open_clip).get("preprocess_cfg") or {}
        squash = named.get("resize_mode", "shortest") == "squash"
        resample = _OPEN_CLIP_FILTERS.get(named.get("interpolation", "bicubic"))
        if named.get("resize_mode", "shortest") not in ("shortest", "squash") or resample is None:
            raise UserError(f"{open_clip}: preprocess_cfg {named} is not supported; use resize_mode shortest or squash")
        return Preprocess((side, side) if squash else side, (side, side), int(resample), mean, std)
    named = read_json(hugging_face)
    resize = _size(named.get("size", side), hugging_face, "size")
    crop = _size(named.get("crop_size", side), hugging_face, "crop_size")
    resample = named.get("resample", int(Image.Resampling.BICUBIC))
    if resample not in list(Image.Resampling):
        raise UserError(f"{hugging_face}: resample is {resample!r}, not one of Pillow's filters 0-5; correct the file")
    square = (crop, crop) if isinstance(crop, int) else crop
    return Preprocess(resize, square if named.get("do_center_crop", True) else None, resample, mean, std)


def _size(value: Any, where: Path, key: str) -> int | tuple[int, int]:
    """Returns a side, or (height, width), from the forms in which processors write sizes."""
    sides = value if isinstance(value, Mapping) else {"shortest_edge": value}
    numbers = [sides[name] for name in ("shortest_edge", "height", "width") if name in sides]
    if len(numbers) not in (1, 2) or not all(type(number) is int and number > 0 for number in numbers):
        raise UserError(f"{where}: {key} is {value!r}; give shortest_edge, or height and width, as whole numbers")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])
