"""Sliding-window inference around any forward function, and the resizes that go with it.

All resizing is bilinear with half-pixel centres, clamped at the edge and without antialiasing, as
`torch.nn.functional.interpolate(mode="bilinear", align_corners=False)` does it.
"""

from collections.abc import Callable

import cv2
import numpy as np
from jaxtyping import Array, Float, UInt8

from fmda.errors import UserError


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Returns the first pixel of each window along one side, in pixels.

    The number is max(length - crop + stride - 1, 0) // stride + 1. The last window is pulled back so that it ends at
    the image's edge; a side shorter than the crop has the one window 0.
    """
    if length < 1 or crop < 1 or stride < 1:
        raise UserError(f"window: length {length}, crop {crop} and stride {stride} must all be at least 1")
    count = max(length - crop + stride - 1, 0) // stride + 1
    return [max(min(i * stride + crop, length) - crop, 0) for i in range(count)]


def sliding_window(
    forward: Callable[[Float[np.ndarray, "N h w C"]], Float[Array, "N hs ws K"]],
    image: Float[np.ndarray, "H W C"],
    crop: int | tuple[int, int],
    stride: int | tuple[int, int],
    *,
    batch_size: int = 4,
    size: tuple[int, int] | None = None,
) -> Float[np.ndarray, "Ho Wo K"]:
    """Returns the scores of a whole image: window scores summed, divided by coverage, resized to `size`.

    Windows go through `forward` in batches of exactly `batch_size` (the last one is filled up with its last window),
    so a jitted forward compiles once for all images at least as large as the crop.

    Args:
        forward: batch of windows -> scores; the score maps may be coarser than the windows and are resized to them.
        image: prepared for `forward`, any channel count.
        crop: window side, or (height, width), in pixels.
        stride: step, one for both sides or (vertical, horizontal).
        batch_size: windows a call.
        size: (height, width) of the result; default the image's own.
    """
    crop_h, crop_w = _pair(crop)
    stride_h, stride_w = _pair(stride)
    height, width = image.shape[:2]
    crop_h, crop_w = min(crop_h, height), min(crop_w, width)
    corners = [(y, x) for y in window_starts(height, crop_h, stride_h) for x in window_starts(width, crop_w, stride_w)]
    total: np.ndarray | None = None
    coverage = np.zeros((height, width, 1), np.float32)
    for first in range(0, len(corners), batch_size):
        group = corners[first : first + batch_size]
        filled = group + [group[-1]] * (batch_size - len(group))
        windows = np.stack([image[y : y + crop_h, x : x + crop_w] for y, x in filled])
        scores = np.asarray(forward(windows), np.float32)
        if total is None:
            total = np.zeros((height, width, scores.shape[-1]), np.float32)
        for (y, x), window in zip(group, scores, strict=False):
            total[y : y + crop_h, x : x + crop_w] += resize_scores(window, (crop_h, crop_w))
            coverage[y : y + crop_h, x : x + crop_w] += 1
    assert total is not None  # every image has at least one window
    total /= coverage
    return total if size is None else resize_scores(total, size)


def resize_scores(scores: Float[np.ndarray, "h w K"], size: tuple[int, int]) -> Float[np.ndarray, "H W K"]:
    """Returns score maps resized bilinearly to (H, W) in float32."""
    if scores.shape[:2] == tuple(size):
        return np.asarray(scores, np.float32)
    return _Bilinear(scores, size).rows(0, size[0])


def labels_at(scores: Float[np.ndarray, "h w K"], size: tuple[int, int], *, rows: int = 64) -> UInt8[np.ndarray, "H W"]:
    """Returns the arg-max label map at (H, W), lowest class first on ties, without holding [H, W, K] scores.

    Equal to `resize_scores(scores, size).argmax(-1)`; only `rows` rows of full-size scores exist at a time, which
    matters for many classes (171 classes at 1024x2048 are 1.4 GB).
    """
    bands = _Bilinear(scores, size)
    labels = np.empty(size, np.uint8)
    for top in range(0, size[0], rows):
        bottom = min(top + rows, size[0])
        labels[top:bottom] = bands.rows(top, bottom).argmax(-1)
    return labels


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class _Bilinear:
    """Bilinear resize that can be asked for any band of output rows."""

    def __init__(self, scores: np.ndarray, size: tuple[int, int]) -> None:
        self.scores = np.ascontiguousarray(scores, np.float32)
        self.width = size[1]
        n_in, n_out = self.scores.shape[0], size[0]
        centre = np.clip((np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5, 0, n_in - 1)
        self.upper = np.floor(centre).astype(np.intp)
        self.lower = np.minimum(self.upper + 1, n_in - 1)
        self.weight = (centre - self.upper).astype(np.float32)[:, None, None]

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """Returns output rows top..bottom-1, [bottom - top, W, K]."""
        weight = self.weight[top:bottom]
        band = self.scores[self.upper[top:bottom]] * (1 - weight) + self.scores[self.lower[top:bottom]] * weight
        if band.shape[1] == self.width:
            return band
        # The height is already right, so OpenCV only interpolates along the rows. OpenCV 5 takes 128 channels at most.
        size = (self.width, bottom - top)
        parts = [
            cv2.resize(band[..., k : k + 128], size, interpolation=cv2.INTER_LINEAR)
            for k in range(0, band.shape[-1], 128)
        ]
        return np.concatenate([p if p.ndim == 3 else p[..., None] for p in parts], axis=-1)
