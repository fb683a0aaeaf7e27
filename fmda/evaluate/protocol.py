"""What a score depends on besides the model and the data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fmda.config import NonNegativeInt, PositiveFloat, PositiveInt, from_dict, override
from fmda.errors import UserError


@dataclass(frozen=True)
class Protocol:
    """How images are prepared and predictions compared; recorded with every score. Sides are in pixels.

    Attributes:
        resize: limits (long side, short side) of the resize that keeps the aspect ratio; None keeps the size.
        crop, stride: sliding windows; crop 0 takes the whole image as the only window.
        flip: average the scores of each window with those of its mirror image.
        class_map: names of the maps between the predicted and the labelled classes, in order.
        resolution: where predictions are compared with labels; "labels" is the size of the label map.
        size: (height, width) to which images are stretched before `resize`; None keeps their own.
        scale: factor of both sides after `resize`.
        multiple: both sides are then rounded to multiples of it, as some networks need them.
        resample: who resizes images, both bilinear on 8 bits: OpenCV, as mmcv does, or Pillow, which rounds otherwise
            and averages where it shrinks. A network may see the difference.
    """

    resize: tuple[PositiveInt, PositiveInt] | None = None
    crop: NonNegativeInt = 0
    stride: NonNegativeInt = 0
    flip: bool = False
    class_map: tuple[str, ...] = ()
    resolution: Literal["labels"] = "labels"
    size: tuple[PositiveInt, PositiveInt] | None = None
    scale: PositiveFloat = 1.0
    multiple: PositiveInt = 1
    resample: Literal["opencv", "pillow"] = "opencv"


WHOLE_IMAGE = Protocol()
"""The image as it is, in one window."""


def parse_protocol(values: Sequence[str]) -> Protocol | None:
    """Returns the protocol of `--protocol key=value ...`, None without any. Raises UserError for invalid ones."""
    if not values:
        return None
    chosen = override({}, values)
    if "class_map" in chosen:
        raise UserError("--protocol: class_map: is named by --class-map")
    return from_dict(Protocol, chosen, "--protocol")
