"""The zero-shot segmenters FLOSS builds on, as data: every constant in which they differ.

MaskCLIP (Zhou et al., ECCV 2022), NACLIP (Hajimiri et al., WACV 2025) and CLIP-DINOiser (Wysoczanska et al., ECCV
2024), each with the settings of the FLOSS paper.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt8

from fmda.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Share, from_dict, to_dict
from fmda.data.transforms import resize_image
from fmda.errors import UserError, did_you_mean
from fmda.methods.floss.chain import Geometry, geometry

Features = Literal["maskclip", "naclip", "clip-dinoiser"]


@dataclass(frozen=True)
class HostConfig:
    """All constants of a host. Sides are in pixels.

    Attributes:
        features: which dense features (`features.patches_of`).
        long_max, short_max: limits of the resize that keeps the ratio; the larger image inside both is taken.
        crop, stride: sliding windows; crop 0 takes the whole image as one window.
        remainder: a window that is no whole number of patches is zero-padded ("pad") or cut and stretched ("drop").
        scale: inverse temperature of the softmax over cosines.
        trained_scale: take the inverse temperature that the CLIP was trained with in place of `scale`. The published
            checkpoints have 100, so it changes nothing there; entropies of a CLIP with another one need it.
        softmax: "patch" = before any interpolation, "image" = last; fusion always takes it at the patches.
        renormalise_mean: whether a classifier averaged over templates is brought back to unit length in fusion.
        prompts: which spelling of the class names ("naclip" has no blanks, and synonyms where there are some).
        round_statistics: normalise with the checkpoint's mean and deviation times 255, rounded to three decimals.
        position_offset: added to the side when the position table is resampled (0.1 in DINO's and NACLIP's code).
        gaussian_std: NACLIP's neighbourhood, in patches.
        affinity_floor: CLIP-DINOiser ignores patch similarities below it.
        background_confidence: CLIP-DINOiser labels a patch background, where configured, if it looks like no
            object and no class is more likely than this.
        pamr_steps, pamr_dilations: refinement of the scores along image edges; 0 steps = none.
    """

    name: str
    features: Features
    long_max: PositiveInt = 2048
    short_max: PositiveInt = 448
    crop: NonNegativeInt = 448
    stride: PositiveInt = 224
    remainder: Literal["pad", "drop"] = "drop"
    scale: PositiveFloat = 100.0
    trained_scale: bool = False
    softmax: Literal["patch", "image"] = "patch"
    renormalise_mean: bool = False
    prompts: Literal["plain", "naclip"] = "plain"
    round_statistics: bool = False
    position_offset: NonNegativeFloat = 0.0
    gaussian_std: PositiveFloat = 5.0
    affinity_floor: float = 0.2
    background_confidence: Share = 0.99
    pamr_steps: NonNegativeInt = 0
    pamr_dilations: tuple[PositiveInt, ...] = (8, 16)

    def __post_init__(self) -> None:
        """Raises UserError where windows would leave gaps."""
        if self.crop and self.stride > self.crop:
            raise UserError(
                f"host: crop {self.crop} and stride {self.stride} leave gaps; take stride <= crop, or crop 0"
            )

    def geometry(self, size: tuple[int, int], patch: int) -> Geometry:
        """Returns how an image of `size` (height, width) is resized and cut, for patches of `patch` pixels."""
        return geometry(
            size,
            long_max=self.long_max,
            short_max=self.short_max,
            crop=self.crop,
            stride=self.stride,
            patch=patch,
            remainder=self.remainder,
        )


HOSTS: dict[str, HostConfig] = {
    "maskclip": HostConfig("maskclip", "maskclip"),
    "naclip": HostConfig(
        "naclip",
        "naclip",
        short_max=336,
        crop=224,
        stride=112,
        softmax="image",
        renormalise_mean=True,
        prompts="naclip",
        round_statistics=True,
        position_offset=0.1,
    ),
    "clip-dinoiser": HostConfig("clip-dinoiser", "clip-dinoiser", remainder="pad"),
}

_DRIVING = ("cityscapes", "bdd10k", "mapillary", "acdc")
_LONG_MAX = {"cityscapes": 896, "bdd10k": 1280, "mapillary": 1920, "acdc": 796}


def host_for(choice: str | Mapping[str, Any], dataset: str = "", where: str = "host") -> HostConfig:
    """Returns a known host with its settings for a dataset, overridden by `choice`.

    Args:
        choice: a known name, or a mapping with `name` and any field of `HostConfig`.
        dataset: the dataset whose published resize limits (and, for NACLIP on VOC20, whole images) apply.

    Raises UserError for an unknown host, key or value.
    """
    changes = {"name": choice} if isinstance(choice, str) else dict(choice)
    name = str(changes.pop("name", None))
    if name not in HOSTS:
        raise UserError(f"{where}: no host '{name}'{did_you_mean(name, HOSTS)}")
    host = HOSTS[name]
    dataset = dataset.lower().replace("_", "-").split("-")[0]
    if name == "naclip":
        host = dataclasses.replace(
            host,
            short_max=560 if dataset in _DRIVING else host.short_max,
            crop=0 if dataset == "voc20" else host.crop,
        )
    else:
        host = dataclasses.replace(host, long_max=_LONG_MAX.get(dataset, host.long_max))
    return from_dict(HostConfig, {**to_dict(host), **changes}, where)


def network_image(
    image: UInt8[np.ndarray, "H W 3"],
    where: Geometry,
    host: HostConfig,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Float[np.ndarray, "h w 3"]:
    """Returns the resized and normalised image. `mean` and `std` are the checkpoint's, for values in [0, 1].

    The resize is OpenCV's on uint8. Where windows are padded to whole patches, zeros are meant before normalisation,
    so they are added by `padded_window`.
    """
    small = resize_image(image, where.network)
    centre, spread = statistics(host, mean, std)
    return (small.astype(np.float32) - centre) / spread


def padded_windows(
    windows: Float[np.ndarray, "N h w 3"],
    where: Geometry,
    host: HostConfig,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Float[np.ndarray, "N h2 w2 3"]:
    """Returns the windows with black pixels added at the bottom and right up to whole patches ("pad" hosts)."""
    below = where.rows.covered - where.rows.window
    right = where.columns.covered - where.columns.window
    if host.remainder == "drop" or (below == 0 and right == 0):
        return windows
    centre, spread = statistics(host, mean, std)
    n, h, w, _ = windows.shape
    out = np.broadcast_to((-centre / spread).astype(np.float32), (n, h + below, w + right, 3)).copy()
    out[:, :h, :w] = windows
    return out


def statistics(
    host: HostConfig, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> tuple[Float[np.ndarray, " 3"], Float[np.ndarray, " 3"]]:
    """Returns (mean, deviation) for values in [0, 255]."""
    both = np.asarray([mean, std], np.float64) * 255
    if host.round_statistics:
        both = np.round(both, 3)
    return both[0].astype(np.float32), both[1].astype(np.float32)
