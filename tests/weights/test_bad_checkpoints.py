"""Every damaged or wrong checkpoint is one line that names the file and the mend."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fmda.errors import UserError
from fmda.weights.load import load_clip
from fmda.weights.network import save

WEIGHTS = "model.safetensors"


def rewrite(folder, change):
    arrays = load_file(folder / WEIGHTS)
    change(arrays)
    save_file(arrays, folder / WEIGHTS)


def lose(folder):
    rewrite(folder, lambda arrays: arrays.pop("text_projection.weight"))


def add(folder):
    rewrite(folder, lambda arrays: arrays.update({"vision_model.extra.weight": np.zeros(3, np.float32)}))


def misshape(folder):
    rewrite(folder, lambda arrays: arrays.update({"visual_projection.weight": np.zeros((15, 32), np.float32)}))


def deepen(folder):
    edit(folder / "config.json", lambda value: value["text_config"].update({"num_hidden_layers": 3}))


def pickled(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def truncate(folder):
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)


def empty(folder):
    (folder / WEIGHTS).write_bytes(b"")


def broken_msgpack(folder):
    (folder / WEIGHTS).unlink()
    (folder / "flax_model.msgpack").write_bytes(b"\x81\xa5logit\xc4")


def no_weights(folder):
    (folder / WEIGHTS).unlink()


def no_config(folder):
    (folder / "config.json").unlink()


def half_a_config(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[: len(text) // 2])


def other_model(folder):
    edit(folder / "config.json", lambda value: value.update({"model_type": "bert"}))


def strange_activation(folder):
    edit(folder / "config.json", lambda value: value["vision_config"].update({"hidden_act": "quick_gelo"}))


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def other_tokenizer(folder):
    edit(folder / "config.json", lambda value: value["text_config"].update({"eos_token_id": 7}))


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("damage", "file", "what"),
    [
        (lose, WEIGHTS, "1 missing: text_projection.weight"),
        (add, WEIGHTS, "1 not known to the model: vision_model.extra.weight"),
        (misshape, WEIGHTS, "visual_projection.weight is [15, 32] but should be [16, 32]"),
        (deepen, WEIGHTS, "16 missing: text_model.encoder.layers.2."),
        (pickled, "pytorch_model.bin", 'python -c "import torch; from safetensors.torch import save_file'),
        (truncate, WEIGHTS, "damaged or cut short"),
        (empty, WEIGHTS, "damaged or cut short"),
        (broken_msgpack, "flax_model.msgpack", "damaged or cut short"),
        (no_weights, "", "holds no weights; one of open_clip_model.safetensors, model.safetensors"),
        (no_config, "", "holds no config.json nor open_clip_config.json; copy it"),
        (half_a_config, "config.json", "cannot be read as JSON"),
        (other_model, "config.json", "model_type is 'bert', not 'clip'"),
        (strange_activation, "config.json", "did you mean 'quick_gelu'?"),
        (broken_tokenizer, "", "its tokenizer files cannot be read"),
        (other_tokenizer, "", "ends sentences with id 518, the model reads them off at 7"),
    ],
)
def test_damage_is_named(damage, file, what, folder):
    damage(folder)
    with pytest.raises(UserError) as error:
        load_clip(folder)
    text = str(error.value)
    assert str(folder / file) in text and what in text
    assert "\n" not in text and ";" in text


def test_the_command_that_converts_a_pickle_is_complete(folder):
    pickled(folder)
    with pytest.raises(UserError) as error:
        load_clip(folder)
    code = str(error.value).split('python -c "')[1].removesuffix('"')
    compile(code, "command", "exec")
    assert f"'{folder / 'pytorch_model.bin'}'" in code and f"'{folder / WEIGHTS}'" in code


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("/no/such/folder", "no such folder"),
        ("./nothing", "no such folder"),
        ("nobody/nothing", "nobody/nothing: no such folder, not in the hub's local cache"),
        ("strange name", "no such folder, and no model of the package has that name"),
    ],
)
def test_missing_sources(source, what):
    with pytest.raises(UserError) as error:
        load_clip(source)
    assert what in str(error.value) and source in str(error.value)


def test_a_file_instead_of_a_folder(folder):
    with pytest.raises(UserError, match="is a file; give the folder"):
        load_clip(folder / WEIGHTS)


def test_an_unwritable_place_is_named_and_nothing_is_left(config, params, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file/clip: Not a directory"):
        save("clip", tmp_path / "file" / "clip", config, params)
    assert (tmp_path / "file").read_text() == "x"


def test_a_disk_that_does_not_take_the_weights_leaves_the_old_ones(folder, config, params, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fmda.weights.files.save_file", full)
    with pytest.raises(UserError, match="model.safetensors: No space left"):
        save("clip", folder, config, params)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"custom_text": True}, "model_cfg.custom_text is not supported"),
        ({"vision_cfg": {"timm_model_name": "vit_tiny"}}, "vision_cfg.timm_model_name is 'vit_tiny', not a"),
        ({"text_cfg": {"hf_model_name": "roberta"}}, "text_cfg.hf_model_name is not supported"),
        ({"text_cfg": None}, "model_cfg.text_cfg is None, not an object"),
    ],
)
def test_open_clip_options_that_change_the_network_are_refused(change, what, folder):
    arrays = {"visual.class_embedding": np.zeros(3, np.float32)}
    save_file(arrays, folder / "open_clip_model.safetensors")
    model = {"embed_dim": 16, "vision_cfg": {}, "text_cfg": {}} | change
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    with pytest.raises(UserError) as error:
        load_clip(folder)
    assert "open_clip_config.json: " in str(error.value) and what in str(error.value)
