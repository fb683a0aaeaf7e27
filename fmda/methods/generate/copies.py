"""The stage that asks whether generated images repeat the one image that the model was personalised on."""

from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
from jaxtyping import UInt8

from fmda.atomic import write_json
from fmda.data.files import read_image
from fmda.data.listing import folder_images
from fmda.data.transforms import resize_image_pillow
from fmda.diffusion.manifest import Manifest
from fmda.errors import UserError
from fmda.evaluate.copies import copy_scores
from fmda.evaluate.sections import Section, Table, write_sections
from fmda.methods.dense import Encoder
from fmda.methods.generate.settings import CopyConfig
from fmda.places import below_data
from fmda.png import grid, write_png

FEATURES = 16
"""Images that the encoder reads at once."""
SHOWN = 8
OTHERS_LIMIT = 95
"""Percentile of the scores of other images above which a generated image counts as a copy."""

Pixels = UInt8[np.ndarray, "n H W 3"]


def write_copies(config: CopyConfig, images: Path, folder: Path) -> dict[str, Any]:
    """Writes `copies.json`, `copies.png` and the report's section about a set of images; returns the figures.

    Scores are those of `copy_scores`: generated images, and crops of other images of the target domain where there are
    any, against crops of the training image of the size of a generated one. Raises UserError for a training image
    that is smaller.
    """
    manifest = Manifest.read(images)
    drawn = np.stack([read_image(path) for path in manifest.head(config.count).paths])
    size = (drawn.shape[1], drawn.shape[2])
    target, rng = read_image(config.image), np.random.default_rng((config.seed, 8))
    crops = random_crops(config.image, target, size, config.crops, rng)
    encoder = Encoder(str(config.encoder))
    features = jax.jit(lambda pixels: encoder.features(encoder.params, pixels))

    def embedded(pixels: Pixels) -> np.ndarray:
        parts = [np.asarray(features(pixels[i : i + FEATURES])) for i in range(0, len(pixels), FEATURES)]
        rows = np.concatenate(parts)
        return rows.reshape(len(rows), -1, rows.shape[-1])

    crop_features = embedded(crops)
    scores, nearest = copy_scores(embedded(drawn), crop_features)
    rows: dict[str, np.ndarray] = {"generated": scores}
    record: dict[str, Any] = {"image": str(config.image), "encoder": encoder.fingerprint, "median": _half(scores)}
    text = (
        f"Mean over the patches of an image of the best similarity to a patch of the crop, of {len(crops)} "
        "crops of the training image, that it resembles most; 1 means that every patch occurs there."
    )
    if config.others is not None:
        others = _other_crops(config, target, size, rng)
        rows["crops of other images of the target"] = copy_scores(embedded(others), crop_features)[0]
        limit = float(np.percentile(rows["crops of other images of the target"], OTHERS_LIMIT))
        record |= {"others": _half(rows["crops of other images of the target"]), "limit": limit}
        record["copies"] = float((scores > limit).mean())
        text += (
            f" {record['copies']:.0%} of the generated images come nearer to it than {OTHERS_LIMIT} % of the crops of "
            "other images do."
        )
    first = np.argsort(-scores, kind="stable")[:SHOWN]
    write_png(folder / "copies.png", grid([*drawn[first], *crops[nearest[first]]], len(first)))
    columns = ("images", "number", "lowest", "median", "highest")
    table = Table(columns, tuple((name, len(one), *_spread(one)) for name, one in rows.items()))
    text += "\n\nAbove the generated images with the highest scores, below the crops that they resemble."
    write_sections(folder, [Section("Near the training image", text, table, "copies.png")])
    write_json(folder / "copies.json", record | {"scores": [round(float(score), 5) for score in scores]})
    return record


def random_crops(
    path: Path, image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int], count: int, rng: np.random.Generator
) -> Pixels:
    """Returns windows of (height, width) at uniform places. Raises UserError, naming `path`, for a smaller image."""
    rest = [side - part for side, part in zip(image.shape, size, strict=False)]
    if min(rest) < 0:
        raise UserError(
            f"copies.image: {path} has {image.shape[1]}x{image.shape[0]} pixels, a generated one {size[1]}x{size[0]}; "
            "give the image at the scale of its training, as `prepare/target.png` of a personalisation has it"
        )
    corners = [[int(rng.integers(one + 1)) for one in rest] for _ in range(count)]
    return np.stack([image[top : top + size[0], left : left + size[1]] for top, left in corners])


def _other_crops(
    config: CopyConfig, target: UInt8[np.ndarray, "H W 3"], size: tuple[int, int], rng: np.random.Generator
) -> Pixels:
    """Returns a crop of each of the first other images, at the scale of the target; the target itself is left out."""
    paths = folder_images(below_data(config.others or ""))
    short, crops = min(target.shape[:2]), []
    for path in paths:
        image = read_image(path)
        scale = short / min(image.shape[:2])
        image = resize_image_pillow(image, (round(image.shape[0] * scale), round(image.shape[1] * scale)))
        if image.shape == target.shape and cv2.absdiff(image, target).mean() < 1:
            continue
        crops.append(random_crops(path, image, size, 1, rng))
        if len(crops) == config.count:
            break
    if not crops:
        raise UserError(f"copies.others: {config.others} holds no other image; fix the path, or leave it out")
    return np.concatenate(crops)


def _spread(scores: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(value), 4) for value in (scores.min(), np.median(scores), scores.max()))


def _half(scores: np.ndarray) -> float:
    return float(np.median(scores))
