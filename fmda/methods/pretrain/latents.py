"""Captioned windows of rendered images as latents on disk: encoded once, read by every epoch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import numpy as np

from fmda.atomic import replacing
from fmda.config import PositiveInt, Share
from fmda.data import templates
from fmda.errors import UserError
from fmda.methods.pretrain.crops import CropConfig, Crops, Drawn, Scenes
from fmda.models.sd_vae import signed
from fmda.progress import track
from fmda.runs.identity import RECORD, claim
from fmda.weights.network import Loaded

PART = 100
"""Images between two files: what an interruption costs."""


@dataclass(frozen=True)
class WindowConfig:
    """How windows are cut and described.

    Attributes:
        size: side of a window, pixels of the image; a multiple of the autoencoder's factor.
        count: windows of an image, and as many of its mirror image.
        prompted: probability of a caption made from a prompt template; else a free sentence.
        least: share of the window below which a class is not part of it.
    """

    size: PositiveInt = 128
    count: PositiveInt = 4
    prompted: Share = 0.4
    least: Share = 0.01


def write_latents(
    config: WindowConfig,
    vae: Loaded,
    captions: Crops,
    roots: Sequence[Path | Drawn],
    folder: Path,
    seed: int,
    digest: str,
) -> int:
    """Returns the number of windows in the folder: files of moments float16 [n, h, w, 2c] and ids int32 [n, T].

    An image is encoded whole, and windows are cut from its latents, at whole latents. Existing files
    stay, so that an interrupted call resumes. Raises UserError where `digest`, of the networks, is another.
    """
    scenes = Scenes(roots)
    if (folder / RECORD).is_file():
        check_networks(folder, digest)
    parts = range(0, len(scenes), PART)
    for first in track(parts, "latents", unit="parts"):
        path = folder / f"{first:06d}.npz"
        if path.is_file():
            continue
        rows: list[tuple[np.ndarray, np.ndarray]] = []
        for index in range(first, min(first + PART, len(scenes))):
            rng = np.random.default_rng((seed, 4, index))
            rows += _windows(config, vae, captions, scenes[index], rng)
        moments, ids = (np.stack(column) for column in zip(*rows, strict=True))
        # with the first part: windows that do not fit leave an empty folder, free for the corrected run
        check_networks(folder, digest)
        with replacing(path) as part, part.open("wb") as stream:
            np.savez(stream, moments=moments, ids=ids)
    return 2 * config.count * len(scenes)


def check_networks(folder: Path, digest: str) -> None:
    """Records the networks of the latents in a folder. Raises UserError where they come from others."""
    claim(folder, {"networks": digest}, remedy="its latents come from other networks; delete it to encode them again")


def _windows(
    config: WindowConfig, vae: Loaded, captions: Crops, scene: dict[str, Any], rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    factor = vae.config.factor
    height, width = scene["labels"].shape
    if config.size > min(height, width) or config.size % factor or height % factor or width % factor:
        raise UserError(
            f"windows.size: {config.size} of a {height}x{width} image is no window of whole latents; choose a "
            f"multiple of {factor} that fits, and images whose sides are multiples too"
        )
    mirrored = {name: np.ascontiguousarray(scene[name][:, ::-1]) for name in ("image", "labels", "instances")}
    pair = scene, scene | mirrored
    mean, logvar = vae.encode(signed(np.stack([one["image"] for one in pair])))
    moments = np.concatenate(jax.device_get((mean, logvar)), axis=-1).astype(np.float16)
    side, rows = config.size // factor, []
    for latents, one in zip(moments, pair, strict=True):
        for _ in range(config.count):
            top = int(rng.integers(height // factor - side + 1))
            left = int(rng.integers(width // factor - side + 1))
            box = (top * factor, left * factor, top * factor + config.size, left * factor + config.size)
            text = captions.of_window(one, box, rng)[0]
            rows.append((latents[top : top + side, left : left + side], captions.tokenize([text])[0]))
    return rows


def caption_maker(config: WindowConfig, tokenize: Any) -> Crops:
    """Returns what captions windows: no degradations, and only templates that are true."""
    crop = CropConfig(size=config.size, spoiled=0.0, prompted=config.prompted, noise=0.0, least=config.least)
    return Crops(crop, templates("imagenet80"), tokenize, 1, 1)


class Latents(Sequence[dict[str, np.ndarray]]):
    """The windows of a folder as a random-access source of {"moments", "ids"}; all in memory."""

    def __init__(self, folder: Path) -> None:
        moments, ids = [], []
        for path in sorted(folder.glob("*.npz")):
            try:
                with path.open("rb") as stream, np.load(stream) as file:
                    moments.append(file["moments"])
                    ids.append(file["ids"])
            except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
                raise UserError(
                    f"{path}: cannot be read ({error}); delete it and {folder / 'stage.json'}, then run again"
                ) from None
        self.moments, self.ids = np.concatenate(moments), np.concatenate(ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Any:
        return {"moments": self.moments[index], "ids": self.ids[index]}
