"""A DINO written in Hugging Face's layout comes back as it was."""

import json

import jax
import numpy as np
import pytest

from fmda import trees
from fmda.errors import UserError
from fmda.models.clip import VitConfig
from fmda.models.dino import dino, vit_config
from fmda.models.module import init
from fmda.weights.check import verify
from fmda.weights.load import load_dino
from fmda.weights.network import save

CONFIG = vit_config(8, 24, layers=2, heads=3, mlp_width=40, image_size=32)


@pytest.fixture(scope="module")
def params():
    return init(lambda rngs: dino(CONFIG, rngs=rngs), jax.random.key(0))


def test_configuration_and_arrays_come_back(params, tmp_path):
    loaded = load_dino(save("dino", tmp_path / "dino", CONFIG, params))
    assert loaded.config == CONFIG and CONFIG.position_offset == 0.0
    before, after = trees.flatten(params), trees.flatten(loaded.params)
    assert set(before) == set(after)
    for path, leaf in before.items():
        np.testing.assert_array_equal(leaf, after[path])
    assert verify(tmp_path / "dino").ok


def test_half_precision_is_stored_and_read(params, tmp_path):
    folder = save("dino", tmp_path / "dino", CONFIG, params, dtype=np.float16)
    full = save("dino", tmp_path / "full", CONFIG, params)
    ratio = (full / "model.safetensors").stat().st_size / (folder / "model.safetensors").stat().st_size
    assert 1.7 < ratio <= 2.0
    kernel = load_dino(folder).params["blocks"][1]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(kernel, np.float32(np.float16(params["blocks"][1]["mlp"]["up"]["kernel"])))


def test_the_preprocessor_says_how_pixels_are_normalised(params, tmp_path):
    folder = save("dino", tmp_path / "dino", CONFIG, params)
    said = json.loads((folder / "preprocessor_config.json").read_text())
    assert said["image_mean"] == [0.485, 0.456, 0.406] and said["size"] == {"height": 32, "width": 32}


def test_what_does_not_fit_is_not_written(params, tmp_path):
    other = vit_config(8, 24, layers=3, heads=3, mlp_width=40, image_size=32)
    with pytest.raises(UserError, match="do not fit the configuration at blocks/2/"):
        save("dino", tmp_path / "dino", other, params)
    with pytest.raises(UserError, match="no norm before its blocks"):
        save("dino", tmp_path / "dino", VitConfig(32, 8, 24, 2, 3, 40), params)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/dino: Not a directory"):
        save("dino", tmp_path / "file/dino", CONFIG, params)
    assert not (tmp_path / "dino").exists()
