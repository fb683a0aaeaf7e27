"""Sliding windows in plain NumPy, the reference for `fmda.evaluate.windows`."""

import numpy as np

from fmda.data.transforms import fit_size, resize_image
from fmda.evaluate.windows import window_starts


def resize_scores(scores, size):
    """Returns [h, w, K] resized bilinearly to [H, W, K], half-pixel centres, no antialiasing."""

    def matrix(n_in, n_out):
        centre = np.clip((np.arange(n_out) + 0.5) * n_in / n_out - 0.5, 0, n_in - 1)
        return np.maximum(0, 1 - np.abs(centre[:, None] - np.arange(n_in)))

    return np.einsum("ai,ijk,bj->abk", matrix(scores.shape[0], size[0]), scores, matrix(scores.shape[1], size[1]))


def sliding_window(forward, image, protocol):
    """Returns the averaged scores [H, W, K] at the size of the image."""
    size = image.shape[:2]
    if protocol.resize:
        image = resize_image(image, fit_size(*size, *protocol.resize))
    height, width = image.shape[:2]
    crop_h, crop_w = (min(protocol.crop or side, side) for side in (height, width))
    stride = protocol.stride or max(size)
    total, coverage = 0.0, np.zeros((height, width, 1))
    for y in window_starts(height, crop_h, stride):
        for x in window_starts(width, crop_w, stride):
            window = image[None, y : y + crop_h, x : x + crop_w].astype(np.float32)
            scores = np.asarray(forward(window))[0]
            if protocol.flip:
                scores = (scores + np.asarray(forward(window[:, :, ::-1]))[0, :, ::-1]) / 2
            if np.ndim(total) == 0:
                total = np.zeros((height, width, scores.shape[-1]))
            total[y : y + crop_h, x : x + crop_w] += resize_scores(scores, (crop_h, crop_w))
            coverage[y : y + crop_h, x : x + crop_w] += 1
    return resize_scores(total / coverage, size)
