"""What a score depends on besides the model and the data."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Protocol:
    """How images are prepared and predictions compared; recorded with every score. Sides are in pixels.

    Attributes:
        resize: limits (long side, short side) of the resize that keeps the aspect ratio; None keeps the size.
        crop, stride: sliding windows; crop 0 takes the whole image as the only window.
        flip: average the scores of each window with those of its mirror image.
        class_map: names of the maps between the predicted and the labelled classes, in order.
        resolution: where predictions are compared with labels; "labels" is the size of the label map.
    """

    resize: tuple[int, int] | None = None
    crop: int = 0
    stride: int = 0
    flip: bool = False
    class_map: tuple[str, ...] = ()
    resolution: Literal["labels"] = "labels"


WHOLE_IMAGE = Protocol()
"""The image as it is, in one window."""
