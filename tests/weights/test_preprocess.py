"""What a CLIP sees of an image: the checkpoint's resize, crop and normalisation."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor

from fmda.errors import UserError
from fmda.models.clip import ClipConfig, VitConfig
from fmda.weights.preprocess import Preprocess, preprocess_of

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def named(folder: Path, values: dict | None, file: str = "preprocessor_config.json") -> Preprocess:
    """Returns the preprocessing of a checkpoint whose tower reads 32 pixels."""
    if values is not None:
        (folder / file).write_text(json.dumps(values))
    config = ClipConfig(vision=VitConfig(image_size=32), image_mean=MEAN, image_std=STD)
    return preprocess_of(SimpleNamespace(config=config, folder=folder))


@pytest.mark.parametrize(
    ("values", "resize", "crop"),
    [
        (None, 32, (32, 32)),
        ({}, 32, (32, 32)),
        ({"size": 40, "crop_size": 36}, 40, (36, 36)),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 36, "width": 30}}, 40, (36, 30)),
        ({"size": {"height": 24, "width": 28}, "do_center_crop": False}, (24, 28), None),
    ],
)
def test_sizes_in_every_form(tmp_path, values, resize, crop) -> None:
    assert named(tmp_path, values) == Preprocess(resize, crop, 3, MEAN, STD)


def test_open_clip_names_squash_and_filter(tmp_path) -> None:
    values = {"preprocess_cfg": {"resize_mode": "squash", "interpolation": "bilinear"}}
    assert named(tmp_path, values, "open_clip_config.json") == Preprocess((32, 32), (32, 32), 2, MEAN, STD)
    with pytest.raises(UserError, match="open_clip_config.json: preprocess_cfg.resize_mode is 'longest', not"):
        named(tmp_path, {"preprocess_cfg": {"resize_mode": "longest"}}, "open_clip_config.json")


@pytest.mark.parametrize(
    "values", [{"size": "big"}, {"size": {"longest_edge": 3}}, {"crop_size": 0}, {"size": 2.5}, {"resample": 9}]
)
def test_what_is_no_size_is_refused(tmp_path, values: dict) -> None:
    with pytest.raises(UserError, match="preprocessor_config.json: "):
        named(tmp_path, values)


def test_shrinking_averages() -> None:
    board = (np.indices((256, 512)).sum(0) % 2 * 255).astype(np.uint8)[None, ..., None].repeat(3, -1)
    pixels = Preprocess(32, (32, 32), 3, (0.0,) * 3, (1.0,) * 3)(board)
    assert pixels.shape == (1, 32, 32, 3) and np.abs(pixels - 0.5).max() < 0.02


def test_the_centre_is_kept() -> None:
    image = np.zeros((1, 32, 96, 3), np.uint8)
    image[:, :, 32:64] = 255
    assert Preprocess(32, (32, 32), 3, (0.0,) * 3, (1.0,) * 3)(image).min() == 1


@pytest.mark.parity
@pytest.mark.parametrize("shape", [(375, 1242), (97, 64), (64, 64), (33, 500), (20, 30)])
@pytest.mark.parametrize(
    "values",
    [
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
        {"size": {"shortest_edge": 30}, "crop_size": {"height": 37, "width": 41}},
        {"size": {"height": 24, "width": 28}, "do_center_crop": False, "resample": 2},
    ],
)
def test_equals_clip_image_processor(tmp_path, shape, values: dict) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    processor = CLIPImageProcessor(**values, image_mean=MEAN, image_std=STD)
    expected = np.asarray(processor(Image.fromarray(image))["pixel_values"][0]).transpose(1, 2, 0)
    np.testing.assert_allclose(named(tmp_path, values)(image[None])[0], expected, atol=1e-6)
