import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fmda.errors import UserError
from fmda.models.dino import dino, vit_config
from fmda.models.module import init
from fmda.weights.check import verify
from fmda.weights.dino import DINO
from fmda.weights.load import load_clip, load_dino
from fmda.weights.registry import FAMILIES

FIXTURE = Path(__file__).parent.parent / "fixtures" / "flax-hf-clip"


def test_a_good_checkpoint(folder, params):
    report = verify(folder)
    assert report.ok and report.layout == "Hugging Face CLIP"
    assert report.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert report.dtypes == {"float32": 78} and report.tokenizer == "519 tokens"
    assert report.fingerprint == load_clip(folder).fingerprint
    assert json.loads(json.dumps(report.to_json()))["ok"] is True
    assert report.text().splitlines()[-1].split() == ["verdict", "good"]


def test_recorded_outputs_are_compared():
    report = verify(FIXTURE)
    assert report.ok and set(report.deviations) == {"image_embeds", "text_embeds"}
    assert max(report.deviations.values()) < 1e-6


def test_a_record_notices_changed_weights(folder):
    clip, rng = load_clip(folder), np.random.default_rng(0)
    inputs = {
        "pixel_values": rng.normal(size=(2, 3, 32, 32)).astype(np.float32),
        "input_ids": [[5, 7, 518], [9, 518, 0]],
    }
    inputs["input_ids"] = np.asarray(inputs["input_ids"], np.int32)
    np.savez(folder / "io.npz", **inputs, **FAMILIES["clip"].replay(clip, inputs))
    assert max(verify(folder).deviations.values()) < 1e-6
    arrays = load_file(folder / "model.safetensors")
    arrays["visual_projection.weight"][0] *= 2
    save_file(arrays, folder / "model.safetensors")
    report = verify(folder)
    assert not report.ok and report.deviations["image_embeds"] > 1e-4 > report.deviations["text_embeds"]


def test_faults_are_listed_not_raised(folder):
    arrays = load_file(folder / "model.safetensors")
    del arrays["logit_scale"]
    arrays |= {"extra": np.zeros(1, np.float32), "visual_projection.weight": np.zeros((1, 32), np.float32)}
    arrays["text_projection.weight"][0, 0] = np.nan
    save_file(arrays, folder / "model.safetensors")
    report = verify(folder)
    assert not report.ok and report.fingerprint is None
    assert (report.missing, report.surplus) == (["logit_scale"], ["extra"])
    assert report.misshapen == ["visual_projection.weight is [1, 32] but should be [16, 32]"]
    assert report.not_finite == ["text_projection.weight"]
    assert "NOT GOOD" in report.text()


def test_a_damaged_tokenizer_is_a_fault(folder):
    (folder / "tokenizer.json").write_text("{}")
    report = verify(folder)
    assert not report.ok and "cannot be read" in report.tokenizer


def test_a_damaged_record_is_a_user_error(folder):
    (folder / "io.npz").write_bytes(b"x")
    with pytest.raises(UserError, match="io.npz: not a usable record"):
        verify(folder)


def test_dino_by_its_authors_names(tmp_path):
    config = vit_config(8, 128, layers=2, image_size=32)
    params = init(lambda rngs: dino(config, rngs=rngs), jax.random.key(0))
    save_file(DINO.write(params), tmp_path / "model.safetensors")
    report = verify(tmp_path)
    assert report.ok and report.layout == "DINO"
    loaded = load_dino(tmp_path)
    assert loaded.config == replace(config, position_offset=0.1) and loaded.config.heads == 2
    pixels = np.random.default_rng(0).normal(size=(1, 40, 24, 3)).astype(np.float32)
    values = loaded.last_layer(pixels)
    assert values.shape == (1, 5, 3, 128)
    assert not np.allclose(values, loaded.last_layer(pixels, part="key"), atol=1e-3)


def test_a_clip_is_no_dino(folder, tmp_path):
    with pytest.raises(UserError, match="no vision transformer's names"):
        load_dino(folder)
