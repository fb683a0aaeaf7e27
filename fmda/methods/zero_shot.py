"""A CLIP's own classification of each pixel by the classes' names, and its ensemble with a network's class scores."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fmda.config import PositiveFloat, PositiveInt, Share
from fmda.errors import UserError
from fmda.evaluate.windows import joined_windows, window_starts
from fmda.methods.dense import Encoder
from fmda.models.mask2former.text import cosines
from fmda.nn.resize import interpolation_matrix, resize


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig:
    """How a CLIP classifies beside a network that stands on it.

    Attributes:
        share: its weight in the ensemble; 0 leaves it out.
        enlarge: factor by which it sees images enlarged.
        window: side of the windows that it sees, pixels of the enlarged image; None is the whole image.
        stride: step between windows.
    """

    share: Share = 0.6
    enlarge: PositiveFloat = 1.0
    window: PositiveInt | None = None
    stride: PositiveInt = 224

    def __post_init__(self) -> None:
        """Raises UserError where windows would leave gaps."""
        if self.window and self.stride > self.window:
            raise UserError(f"zero_shot: window {self.window}, stride {self.stride} leave gaps; take stride <= window")


def zero_shot_probabilities(
    config: ZeroShotConfig,
    encoder: Encoder,
    params: Any,
    pixels: Float[Array, "b H W 3"],
    names: Float[Array, "k s e"],
    scale: float,
) -> Float[Array, "b H W k"]:
    """Returns the probability of each class at each pixel of RGB in 0..255, averaged where windows overlap.

    `names` and `scale` are those of `Encoder.class_names`. Source: Zhou et al. 2022 (MaskCLIP).
    """
    sides = pixels.shape[1:3]
    large = [round(side * config.enlarge) for side in sides]
    window = [min(config.window or side, side) for side in large]
    tops, lefts = starts = [window_starts(*each, config.stride) for each in zip(large, window, strict=True)]
    x = resize(pixels.astype(jnp.float32), (large[0], large[1]))
    cut = jnp.stack([x[:, top : top + window[0], left : left + window[1]] for top in tops for left in lefts], 1)
    joint = encoder.projected(params, cut.reshape(-1, *window, 3))
    n, h, w, width = joint.shape
    p = jax.nn.softmax(scale * cosines(joint.reshape(n, h * w, width), names))
    p = p.reshape(len(pixels), len(tops), len(lefts), h, w, -1).swapaxes(2, 3)
    p = p.reshape(len(pixels), len(tops) * h, len(lefts) * w, -1)
    # from the places of all windows to the enlarged image, and from there to the image
    rows, columns = (
        interpolation_matrix(big, side) @ joined_windows(interpolation_matrix(places, inside), first, big)
        for side, big, inside, places, first in zip(sides, large, window, (h, w), starts, strict=True)
    )
    return jnp.einsum("Yi,Xj,bijk->bYXk", rows, columns, p, precision=lax.Precision.HIGHEST)


def geometric_mean(
    scores: Float[Array, "b H W k"], probabilities: Float[Array, "b H W k"], share: float
) -> Float[Array, "b H W k"]:
    """Returns logarithms, up to a constant, of the geometric mean of softmax(scores) and of probabilities.

    `share` is the weight of the latter. Yu et al. 2023 (FC-CLIP), 3.3, have it for masks.
    """
    return (1 - share) * jax.nn.log_softmax(scores) + share * jnp.log(jnp.maximum(probabilities, 1e-8))
