"""The models of the package: small enough, whole, and their images follow the caption."""

import json

import jax
import numpy as np
import pytest

from fmda.diffusion.draw import SamplerConfig, make_draw
from fmda.diffusion.load import load_stable_diffusion
from fmda.mesh import make_mesh
from fmda.weights.source import asset_names, assets_folder


def test_assets_stay_below_60_megabytes():
    assert sum(path.stat().st_size for path in assets_folder().rglob("*") if path.is_file()) <= 60e6


def test_every_model_says_how_it_was_trained():
    for name in asset_names():
        record = json.loads((assets_folder() / name / "training.json").read_text(encoding="utf-8"))
        assert record["config"]["steps"] > 0, name


@pytest.mark.slow
def test_images_of_the_diffusion_model_follow_the_caption():
    model = load_stable_diffusion("street-diffusion")
    draw = make_draw(model, SamplerConfig("dpm++2m", 10, guidance=3.0), make_mesh(devices=jax.local_devices()[:1]))
    night, snow = (draw([f"a photo of a street {look}"] * 4, range(4)) for look in ("at night", "in the snow"))
    assert night.shape == (4, 128, 128, 3)
    # the same noise, another word
    assert np.all(night.mean((1, 2, 3)) + 40 < snow.mean((1, 2, 3)))
    # a street has its sky above and its road below: rows differ more from each other than columns
    assert snow.mean((0, 2, 3)).std() > snow.mean((0, 1, 3)).std()
