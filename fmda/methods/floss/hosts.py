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
from fmda.evaluate.protocol import Protocol
from fmda.methods.floss.chain import PatchGrid, patch_grid
from fmda.models.clip import ClipConfig, VitConfig

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

    @property
    def protocol(self) -> Protocol:
        """How images are resized and cut into windows."""
        return Protocol((self.long_max, self.short_max), self.crop, self.stride)

    def patch_grid(self, size: tuple[int, int], patch: int) -> PatchGrid:
        """Returns the windows of an image of `size` (height, width), with patches of `patch` pixels."""
        return patch_grid(size, self.protocol, patch, self.remainder)


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


def vision_transformer(clip: ClipConfig, where: str) -> VitConfig:
    """Returns the image tower of a checkpoint. Raises UserError for a convolutional one."""
    if not isinstance(clip.vision, VitConfig):
        raise UserError(f"{where}: FLOSS hosts read a vision transformer, not a convolutional tower; use another clip=")
    return clip.vision


def window_pixels(
    image: UInt8[np.ndarray, "H W 3"], grid: PatchGrid, host: HostConfig, config: ClipConfig
) -> Float[np.ndarray, "N h w 3"]:
    """Returns the normalised windows of the resized image, black below and on the right up to whole patches."""
    small, (height, width) = resize_image(image, grid.network), grid.window
    windows = np.stack([small[y : y + height, x : x + width] for y, x in grid.corners()])
    below, right = grid.rows.covered - height, grid.columns.covered - width
    return normalised(np.pad(windows, ((0, 0), (0, below), (0, right), (0, 0))), host, config)


def normalised(pixels: UInt8[np.ndarray, "*n 3"], host: HostConfig, config: ClipConfig) -> Float[np.ndarray, "*n 3"]:
    """Returns the pixels less the checkpoint's mean, over its deviation."""
    statistics = 255 * np.asarray([config.image_mean, config.image_std], np.float64)
    if host.round_statistics:
        statistics = np.round(statistics, 3)
    mean, std = statistics.astype(np.float32)
    return (pixels.astype(np.float32) - mean) / std
