import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fmda
from fmda import trees
from fmda.errors import UserError
from fmda.models.clip import Clip, ClipConfig, ConvNextConfig, ResNetConfig
from fmda.models.module import init
from fmda.weights import source
from fmda.weights.checkpoint import open_checkpoint
from fmda.weights.clip import read_hf, read_open_clip, write_open_clip
from fmda.weights.load import load_clip
from fmda.weights.network import convert, save

FIXTURE = Path(__file__).parent.parent / "fixtures" / "flax-hf-clip"
TEXTS = ["a road", "photo of a car"]
PIXELS = np.random.default_rng(0).normal(size=(2, 32, 48, 3)).astype(np.float32)


def same(a, b):
    a, b = trees.flatten(a), trees.flatten(b)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_what_was_saved_is_loaded(folder, config, params):
    clip = fmda.load_clip(folder)
    assert clip.config == config
    assert same(clip.params, params)
    assert clip.encode_image(PIXELS).shape == clip.encode_text(clip.tokenize(TEXTS)).shape == (2, 16)


def test_saved_files_are_readable_by_others(folder):
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]
    assert not list(folder.glob("*.part"))


def test_the_module_and_the_methods_agree(folder):
    clip = load_clip(folder)
    np.testing.assert_allclose(clip.encode_image(PIXELS), clip.module().vision(jnp.asarray(PIXELS)), atol=2e-6)


def test_the_flax_fixture_gives_its_recorded_embeddings():
    clip = load_clip(FIXTURE)
    with np.load(FIXTURE / "io.npz") as io, jax.default_matmul_precision("highest"):
        image = np.asarray(clip.encode_image(io["pixel_values"].transpose(0, 2, 3, 1)))
        text = np.asarray(clip.encode_text(io["input_ids"]))
        np.testing.assert_allclose(image / np.linalg.norm(image, axis=1, keepdims=True), io["image_embeds"], atol=1e-6)
        np.testing.assert_allclose(text / np.linalg.norm(text, axis=1, keepdims=True), io["text_embeds"], atol=1e-6)


def test_without_tokenizer_only_tokenize_fails():
    with pytest.raises(UserError, match="flax-hf-clip: holds no tokenizer; copy tokenizer.json"):
        load_clip(FIXTURE).tokenize(["a road"])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_half_precision_storage_loads(dtype, folder, config, params):
    save("clip", folder, config, params, dtype=dtype)
    clip = load_clip(folder)
    assert clip.params["vision"]["class_token"].dtype == jnp.float32
    np.testing.assert_array_equal(
        clip.params["vision"]["class_token"],
        np.asarray(params["vision"]["class_token"]).astype(dtype).astype(np.float32),
    )
    assert float(clip.params["logit_scale"]) == float(params["logit_scale"])


def test_dtype_chooses_storage(folder):
    clip = load_clip(folder, dtype=jnp.bfloat16)
    kinds = {path: leaf.dtype for path, leaf in trees.flatten(clip.params).items()}
    assert kinds.pop("logit_scale") == jnp.float32
    assert set(kinds.values()) == {jnp.dtype(jnp.bfloat16)}
    assert clip.encode_image(PIXELS).dtype == jnp.float32


def test_sharded_safetensors(folder, params):
    arrays = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {}
    for k, names in enumerate((sorted(arrays)[::2], sorted(arrays)[1::2]), start=1):
        shard = f"model-0000{k}-of-00002.safetensors"
        save_file({name: arrays[name] for name in names}, folder / shard)
        index |= dict.fromkeys(names, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert same(load_clip(folder).params, params)
    short = {name: shard for name, shard in index.items() if name != "logit_scale"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": short}))
    with pytest.raises(UserError, match="not in the index: logit_scale"):
        load_clip(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors: shard named in"):
        load_clip(folder)


def test_fingerprint_follows_content_not_place(folder, config, params, tmp_path):
    first = load_clip(folder).fingerprint
    assert len(first) == 12
    assert load_clip(shutil.copytree(folder, tmp_path / "elsewhere")).fingerprint == first
    changed = trees.unflatten({k: v + 1 if k == "logit_scale" else v for k, v in trees.flatten(params).items()})
    assert load_clip(save("clip", tmp_path / "changed", config, changed)).fingerprint != first
    assert load_clip(folder, dtype=jnp.bfloat16).fingerprint == first


@pytest.mark.parametrize(
    "vision",
    [
        ResNetConfig(64, (1, 1, 1, 1), 8, 4),
        ConvNextConfig(64, (3, 3, 9, 3), (96, 192, 384, 768), head_width=32),
    ],
    ids=["resnet", "convnext"],
)
def test_convolutional_towers_are_saved_in_open_clips_layout(vision, config, tmp_path):
    whole = ClipConfig(16, vision, config.text)
    assert read_back(write_open_clip(whole), tmp_path).vision == vision
    if isinstance(vision, ResNetConfig):
        params = init(lambda rngs: Clip(whole, rngs=rngs), jax.random.key(1))
        folder = save("clip", tmp_path / "clip", whole, params)
        assert sorted(p.name for p in folder.iterdir()) == ["open_clip_config.json", "open_clip_model.safetensors"]
        assert same(load_clip(folder).params, params)
        with pytest.raises(UserError, match="layout 'hf' holds vision transformers only"):
            save("clip", tmp_path / "hf", whole, params, layout="hf")


def read_back(value, folder):
    (folder / "open_clip_config.json").write_text(json.dumps(value))
    return read_open_clip(folder)


def test_conversion_between_layouts_keeps_every_value(folder, params, tmp_path):
    there = convert(open_checkpoint("clip", folder), tmp_path / "open_clip", layout="open_clip")
    back = convert(open_checkpoint("clip", there), tmp_path / "hf", layout="hf")
    assert "visual.transformer.resblocks.0.attn.in_proj_weight" in load_file(there / "open_clip_model.safetensors")
    assert same(load_clip(back).params, params)
    clip = load_clip(there)
    np.testing.assert_array_equal(clip.tokenize(TEXTS), load_clip(folder).tokenize(TEXTS))
    np.testing.assert_allclose(
        clip.encode_text(clip.tokenize(TEXTS)), load_clip(folder).encode_text(clip.tokenize(TEXTS)), atol=1e-6
    )


def test_flax_conversion(tmp_path):
    converted = load_clip(convert(open_checkpoint("clip", FIXTURE), tmp_path / "out"))
    assert same(converted.params, load_clip(FIXTURE).params)


def test_save_refuses_parameters_of_another_shape(config, params, tmp_path):
    wrong = trees.unflatten({**trees.flatten(params), "text/position": np.zeros((3, 24), np.float32)})
    with pytest.raises(UserError, match="do not fit the configuration at text/position; nothing written"):
        save("clip", tmp_path / "out", config, wrong)
    assert not (tmp_path / "out").exists()


def test_a_packaged_model_is_found_by_name(folder, monkeypatch):
    monkeypatch.setattr(source, "assets_folder", lambda: folder.parent)
    assert source.asset_names() == ("clip",)
    assert source.resolve("clip") == folder


def test_a_cached_hub_snapshot_is_used_offline(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(source.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "cache" / "models--some--model"
    shutil.copytree(folder, home / "snapshots" / ("a" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("a" * 40)
    assert load_clip("some/model").fingerprint == load_clip(folder).fingerprint
    with pytest.raises(UserError, match="some/model at v2: .*HF_HUB_OFFLINE"):
        load_clip("some/model", revision="v2")


def test_configuration_keys_left_out_have_their_defaults(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip", "vision_config": {"patch_size": 16}}')
    config = read_hf(tmp_path)
    assert (config.vision.patch_size, config.vision.width, config.text.context) == (16, 768, 77)
    assert config.text.eos_token_id == 49407


def test_old_configurations_repeat_sections_under_a_second_name(tmp_path):
    value = {"model_type": "clip", "text_config": {"hidden_size": 3}, "text_config_dict": {"hidden_size": 40}}
    (tmp_path / "config.json").write_text(json.dumps(value | {"vision_config_dict": None}))
    assert read_hf(tmp_path).text.width == 40
