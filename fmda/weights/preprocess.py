"""The images that a CLIP was trained on: resized, cropped and normalised by its checkpoint's image processor."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from fmda.weights.network import Loaded
from fmda.weights.reader import Fields, is_size

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
        pixels = np.stack([np.asarray(self._prepared(Image.fromarray(image))) for image in images])
        return (pixels.astype(np.float32) / 255 - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)

    def _prepared(self, image: Image.Image) -> Image.Image:
        if isinstance(self.resize, int):
            # the longer side is rounded down
            height, width = (self.resize * side // min(image.size) for side in (image.height, image.width))
        else:
            height, width = self.resize
        image = image.resize((width, height), Image.Resampling(self.resample))
        if self.crop is None:
            return image
        top, left = (image.height - self.crop[0]) // 2, (image.width - self.crop[1]) // 2
        # black beyond the image
        return image.crop((left, top, left + self.crop[1], top + self.crop[0]))


def preprocess_of(clip: Loaded) -> Preprocess:
    """Returns the preprocessing that a checkpoint names: `preprocessor_config.json`, else `open_clip_config.json`.

    What is not named: shorter side to the size that the tower reads, bicubic, centre crop.
    Raises UserError for values that are no size or filter.
    """
    side, folder = clip.config.vision.image_size, clip.folder or Path(os.devnull)
    resize: int | tuple[int, int] = side
    crop: tuple[int, int] | None = (side, side)
    resample = int(Image.Resampling.BICUBIC)
    processor, open_clip = folder / "preprocessor_config.json", folder / "open_clip_config.json"
    if processor.is_file():
        fields = Fields.read(processor, "correct the file")
        resize, size = (_size(fields, key, side) for key in ("size", "crop_size"))
        resample = fields.index("resample", resample, len(Image.Resampling))
        crop = size if isinstance(size, tuple) else (size, size)
        if not fields.flag("do_center_crop", True):
            crop = None
    elif open_clip.is_file():
        fields = Fields.read(open_clip, "correct the file").section("preprocess_cfg")
        if fields.word("resize_mode", "shortest", ("shortest", "squash")) == "squash":
            resize = (side, side)
        resample = int(_OPEN_CLIP_FILTERS[fields.word("interpolation", "bicubic", _OPEN_CLIP_FILTERS)])
    return Preprocess(resize, crop, resample, clip.config.image_mean, clip.config.image_std)


def _size(fields: Fields, key: str, default: int) -> int | tuple[int, int]:
    """Returns a side, or (height, width), from the forms in which processors write sizes."""
    value = fields.values.get(key, default)
    sides = value if isinstance(value, dict) else {"shortest_edge": value}
    numbers = [sides[name] for name in ("shortest_edge", "height", "width") if name in sides]
    if len(numbers) not in (1, 2) or not all(map(is_size, numbers)):
        raise fields.fault(key, "shortest_edge, or height and width, as whole numbers")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])
