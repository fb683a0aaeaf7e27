"""Every layout in which Stable Diffusion's networks are stored gives the same parameters."""

import json
import shutil
from dataclasses import make_dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import load_file, save_file
from small_diffusion import TEXT, UNET, VAE, deviation, drawn, same, text_encoder, unet, vae

import fmda
from fmda import trees
from fmda.errors import UserError
from fmda.models.sd_unet import UNetConfig
from fmda.weights import check, diffusers, source
from fmda.weights import diffusers_tables as tables
from fmda.weights.checkpoint import family_of, network_graph, open_checkpoint, weight_fingerprint
from fmda.weights.load import load_text_encoder, load_unet, load_vae
from fmda.weights.network import save

FIXTURES = Path(__file__).parent.parent / "fixtures"
LINEAR = UNetConfig(
    channels=(8, 16), layers=2, attention=(True, True), heads=(2, 4), context_width=6, groups=8, linear_projection=True
)
LOADERS = {"unet": load_unet, "vae": load_vae, "text_encoder": load_text_encoder}
MADE = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
FILES = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


@pytest.fixture(scope="module", params=LOADERS)
def part(request):
    return request.param


@pytest.fixture(scope="module")
def made(part):
    return MADE[part]()


@pytest.fixture
def folder(part, made, tmp_path):
    save(part, tmp_path / part, made.config, made.params)
    return tmp_path / part


def arrays_of(folder, part):
    """Takes the arrays out of the folder."""
    path = folder / f"{FILES[part]}.safetensors"
    arrays = load_file(path)
    path.unlink()
    return arrays


def nested(arrays):
    tree = {}
    for name, array in arrays.items():
        *path, leaf = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = array
    return tree


def flax_table(part):
    return {"unet": tables.FLAX_UNET[False], "vae": tables.FLAX_VAE, "text_encoder": tables.FLAX_TEXT_ENCODER}[part]


def test_what_was_saved_is_loaded(part, made, folder):
    loaded = getattr(fmda, f"load_{part}")(folder)
    assert loaded.config == made.config and loaded.graphdef == made.graphdef
    assert same(loaded.params, made.params)
    assert family_of(folder) == part
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", f"{FILES[part]}.safetensors"]


def test_flax_msgpack(part, made, folder):
    arrays_of(folder, part)
    written = nested(flax_table(part).write(made.params))
    name = "flax_model.msgpack" if part == "text_encoder" else "diffusion_flax_model.msgpack"
    (folder / name).write_bytes(serialization.msgpack_serialize(written))
    assert same(LOADERS[part](folder).params, made.params)
    # the other file, where both are there, goes first
    save(part, folder, made.config, jax.tree.map(lambda x: x + 1, made.params))
    assert not same(LOADERS[part](folder).params, made.params)


def test_shards(part, made, folder):
    arrays, index = arrays_of(folder, part), {}
    for k, names in enumerate((sorted(arrays)[::2], sorted(arrays)[1::2]), start=1):
        shard = f"{FILES[part]}-0000{k}-of-00002.safetensors"
        save_file({name: arrays[name] for name in names}, folder / shard)
        index |= dict.fromkeys(names, shard)
    (folder / f"{FILES[part]}.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert same(LOADERS[part](folder).params, made.params)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_under_its_own_file_name(part, made, folder, dtype):
    rounded = {name: array.astype(dtype) for name, array in arrays_of(folder, part).items()}
    save_file(rounded, folder / f"{FILES[part]}.fp16.safetensors")
    expected = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), made.params)
    assert same(LOADERS[part](folder).params, expected)


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        ("safetensors.index.fp16.json", "{0}.fp16-0000{1}-of-00002.safetensors"),
        ("safetensors.fp16.index.json", "{0}-0000{1}-of-00002.fp16.safetensors"),
        ("fp16.safetensors.index.json", "{0}-0000{1}-of-00002.fp16.safetensors"),
    ],
)
def test_shards_in_half_precision_are_read_where_nothing_fuller_lies(index, shard, part, made, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "full")
    arrays, homes = {name: array.astype(np.float16) for name, array in arrays_of(folder, part).items()}, {}
    for k, names in enumerate((sorted(arrays)[::2], sorted(arrays)[1::2]), start=1):
        file = shard.format(FILES[part], k)
        save_file({name: arrays[name] for name in names}, folder / file)
        homes |= dict.fromkeys(names, file)
    (folder / f"{FILES[part]}.{index}").write_text(json.dumps({"weight_map": homes}))
    expected = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), made.params)
    assert same(LOADERS[part](folder).params, expected)
    # all of them are what the hub is asked for
    found = source._weights_wanted([p.name for p in folder.iterdir()], "here", source.PARTS[part])
    assert sorted([*found, "config.json"]) == sorted(p.name for p in folder.iterdir())
    shutil.copy(tmp_path / "full" / f"{FILES[part]}.safetensors", folder)
    assert same(LOADERS[part](folder).params, made.params)
    assert source._weights_wanted([p.name for p in folder.iterdir()], "here", source.PARTS[part]) == [
        f"{FILES[part]}.safetensors"
    ]


def test_dtype_chooses_how_parameters_are_kept_and_saved(part, made, folder, tmp_path):
    loaded = LOADERS[part](folder, dtype=jnp.bfloat16)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(loaded.params)} == {"bfloat16"}
    save(part, tmp_path / "half", made.config, made.params, dtype=np.float16)
    stored = load_file(tmp_path / "half" / f"{FILES[part]}.safetensors")
    assert {str(array.dtype) for array in stored.values()} == {"float16"}
    assert check.verify(tmp_path / "half").dtypes == {"float16": len(stored)}


def test_outputs_are_float32_whatever_computes(tmp_path):
    for name, make in MADE.items():
        save(name, tmp_path / name, make().config, make().params)
    net, coder, words = (load(tmp_path / name, dtype=jnp.bfloat16) for name, load in LOADERS.items())
    ids = jnp.zeros((1, 5), jnp.int32)
    found = [
        jax.eval_shape(net, jnp.zeros((1, 4, 4, 4)), jnp.zeros(1, jnp.int32), jnp.zeros((1, 5, 12))),
        *jax.eval_shape(coder.encode, jnp.zeros((1, 8, 8, 3))),
        jax.eval_shape(coder.decode, jnp.zeros((1, 4, 4, 4))),
        jax.eval_shape(words, ids),
    ]
    assert [str(x.dtype) for x in found] == ["float32"] * 5
    assert found[-1].shape == (1, 5, 12)


def test_old_names_of_the_autoencoders_attention(tmp_path):
    made = vae()
    save("vae", tmp_path, made.config, made.params)
    old = {}
    for name, array in load_file(tmp_path / "diffusion_pytorch_model.safetensors").items():
        for new_name, old_name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{new_name}.", f".{old_name}.")
        old[name] = array
    save_file(old, tmp_path / "diffusion_pytorch_model.safetensors")
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in old
    assert same(load_vae(tmp_path).params, made.params)
    assert check.verify(tmp_path).layout == "diffusers autoencoder, names before 0.18"


def test_names_of_the_text_encoder_since_transformers_5(tmp_path):
    made = text_encoder()
    save("text_encoder", tmp_path, made.config, made.params)
    arrays = load_file(tmp_path / "model.safetensors")
    assert all(name.startswith("text_model.") for name in arrays)
    save_file({name.removeprefix("text_model."): x for name, x in arrays.items()}, tmp_path / "model.safetensors")
    assert same(load_text_encoder(tmp_path).params, made.params)
    # a counter that old releases stored, under names of either kind
    counted = arrays | {"text_model.embeddings.position_ids": np.arange(16)[None]}
    for names in (counted, {name.removeprefix("text_model."): x for name, x in counted.items()}):
        save_file(names, tmp_path / "model.safetensors")
        assert same(load_text_encoder(tmp_path).params, made.params)


def test_linear_projections_and_heads_by_level(tmp_path):
    params = drawn(network_graph("unet", LINEAR)[1])
    save("unet", tmp_path, LINEAR, params)
    loaded = load_unet(tmp_path)
    assert loaded.config == LINEAR and same(loaded.params, params)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["attention_head_dim"] == [2, 4] and config["use_linear_projection"] is True
    assert load_file(tmp_path / "diffusion_pytorch_model.safetensors")[
        "mid_block.attentions.0.proj_in.weight"
    ].shape == (16, 16)


def test_a_whole_checkpoint_serves_each_network(tmp_path):
    for name, make in MADE.items():
        save(name, tmp_path / name, make().config, make().params)
    for name, load in LOADERS.items():
        assert same(load(tmp_path).params, load(tmp_path / name).params)
        assert load(tmp_path).config == {"unet": UNET, "vae": VAE, "text_encoder": TEXT}[name]


def test_configuration_keys_left_out_have_diffusers_defaults(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768}')
    assert diffusers.read_unet(tmp_path / "x", {})[0] == UNetConfig()
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert diffusers.read_vae(tmp_path / "x", {})[0].scale == 0.18215


@pytest.mark.parametrize(
    ("version", "size", "expected"),
    [
        ("0.8.1", 32, 64), ("0.2.2", 32, 64), ("0.0.4", 96, 96), ("0.9.0.dev0", 32, 32), ("0.30.0", 32, 32),
        ("1.0", 32, 32), (None, 32, 32),
    ],
)  # fmt: skip
def test_sample_sizes_of_releases_before_0_9_are_64_at_least(version, size, expected, tmp_path):
    config = {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768, "sample_size": size}
    named = {} if version is None else {"_diffusers_version": version}
    (tmp_path / "config.json").write_text(json.dumps(config | named))
    assert diffusers.read_unet(tmp_path / "x", {})[0].sample_size == expected


def test_a_flax_unet_as_saved_computes_here_what_it_computes_from_the_saved_folder(tmp_path):
    flax = load_unet(FIXTURES / "flax-hf-sd1/unet", remat="blocks")
    saved = flax.as_saved()
    assert (saved.config.gate, saved.config.transformer_eps) == ("gelu", 1e-6)
    assert saved.as_saved() is saved and saved.params is flax.params
    save("unet", tmp_path, flax.config, flax.params)
    loaded = load_unet(tmp_path, remat="blocks")
    assert loaded.config == saved.config and loaded.graphdef == saved.graphdef
    with np.load(FIXTURES / "flax-hf-sd1/unet/io.npz") as io:
        latents = io["sample"].transpose(0, 2, 3, 1)
        given, recorded = (latents, io["timesteps"], io["encoder_hidden_states"]), io["out"].transpose(0, 2, 3, 1)
    with jax.default_matmul_precision("highest"):
        ours, theirs = np.asarray(saved(*given)), np.asarray(loaded(*given))
    np.testing.assert_array_equal(ours, theirs)
    # Flax's own output is another by about 1e-4 of the largest value: more than rounding, less than anyone sees
    assert 1e-5 < deviation(ours, recorded) < 1e-3


@pytest.mark.parametrize(
    "name", ["flax-hf-sd1/unet", "flax-hf-sd1/vae", "flax-hf-sd1/text_encoder", "flax-hf-sd2/unet"]
)
def test_recorded_flax_checkpoints_are_read_whole_and_written_as_they_were(name):
    checkpoint = open_checkpoint(name.split("/")[1], FIXTURES / name)
    arrays, written = checkpoint.arrays(), checkpoint.table.write(checkpoint.params())
    assert written.keys() == arrays.keys()
    assert all(np.array_equal(written[key], arrays[key]) for key in arrays)


def test_a_record_beside_the_weights_is_compared(tmp_path):
    report = check.verify(FIXTURES / "flax-hf-sd1/text_encoder")
    assert report.ok and report.layout == "Hugging Face text encoder, Flax"
    assert report.parameters == 44544 and report.deviations["last_hidden_state"] < 1e-6
    copy = shutil.copytree(FIXTURES / "flax-hf-sd1/text_encoder", tmp_path / "copy")
    with np.load(copy / "io.npz") as io:
        np.savez(copy / "io.npz", **{**io, "last_hidden_state": io["last_hidden_state"] * 1.001})
    report = check.verify(copy)
    assert not report.ok and report.deviations["last_hidden_state"] == pytest.approx(1e-3, rel=0.01)


def test_fingerprints_follow_content(part, made, folder, tmp_path):
    first = check.verify(folder).fingerprint
    assert first == check.verify(shutil.copytree(folder, tmp_path / "elsewhere")).fingerprint and len(first) == 12
    flat = trees.flatten(made.params)
    path = next(iter(flat))
    save(part, tmp_path / "changed", made.config, trees.unflatten({**flat, path: flat[path] + 1}))
    assert check.verify(tmp_path / "changed").fingerprint != first


def test_a_new_field_with_its_default_changes_no_fingerprint():
    before = make_dataclass("Shape", [("width", int, 3), ("sides", tuple, ())], frozen=True)
    after = make_dataclass("Shape", [("width", int, 3), ("sides", tuple, ()), ("later", int, 0)], frozen=True)
    weights = {"w": np.ones(2)}
    assert weight_fingerprint(weights, before(4)) == weight_fingerprint(weights, after(4))
    different = [before(), before(4), after(later=1), after(4, later=1)]
    assert len({weight_fingerprint(weights, one) for one in different}) == 4


def test_fingerprints_follow_values_not_number_formats(part, made, folder, tmp_path):
    first = weight_fingerprint(made.params, made.config)
    assert check.verify(folder).fingerprint == first
    exact, narrow = (LOADERS[part](folder, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert exact.origin is None and narrow.origin is not None
    assert weight_fingerprint(narrow.params, made.config) != narrow.fingerprint == exact.fingerprint == first
    # what was stored in few digits is exact in more
    save(part, tmp_path / "half", made.config, made.params, dtype=jnp.bfloat16)
    few = [LOADERS[part](tmp_path / "half", dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16)]
    assert [loaded.origin for loaded in few] == [None, None]
    found = {loaded.fingerprint for loaded in few}
    assert found == {check.verify(tmp_path / "half").fingerprint} != {first}


def test_a_file_that_changed_since_it_was_opened_is_not_read(folder, part, made):
    narrow = LOADERS[part](folder, dtype=jnp.bfloat16)
    save(part, folder, made.config, jax.tree.map(lambda x: x + 1, made.params))
    with pytest.raises(UserError, match="safetensors: changed since it was opened; start again"):
        narrow.fingerprint  # noqa: B018


def test_values_beyond_float16_are_refused_by_name(part, made, tmp_path):
    flat = trees.flatten(made.params)
    path = next(path for path in flat if flat[path].ndim)
    large = trees.unflatten({**flat, path: np.full_like(flat[path], -70000.0)})
    with pytest.raises(UserError, match=f"new: {path} holds 70000, beyond float16, which ends at 65504; store it as"):
        save(part, tmp_path / "new", made.config, large, dtype=np.float16)
    assert not (tmp_path / "new").exists()
    save(part, tmp_path / "new", made.config, large, dtype=jnp.bfloat16)


def test_float16_is_refused_where_the_device_cannot_compute_in_it(folder, part):
    with pytest.raises(UserError, match="dtype: this device cannot compute in float16 .*; choose bfloat16 or float32"):
        LOADERS[part](folder, dtype=np.float16)


REPOSITORY = [
    "README.md", "model_index.json", "v1-4.ckpt", "safety_checker/model.safetensors", "scheduler/scheduler_config.json",
    "tokenizer/vocab.json", "unet/config.json", "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.safetensors.index.json", "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.fp16.json", "vae/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_flax_model.msgpack",
    "text_encoder/config.json", "text_encoder/flax_model.msgpack",
]  # fmt: skip


class Hub:
    """Stands in for the hub: answers which files a repository has, and notes what is fetched."""

    def __init__(self, monkeypatch, files, folder):
        self.folder, self.fetched = folder, None
        monkeypatch.setattr(source.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(source.HfApi, "list_repo_files", lambda *_args, **_options: files)
        monkeypatch.setattr(source, "snapshot_download", self.fetch)

    def fetch(self, name, *, revision, allow_patterns):
        self.fetched = (name, revision, set(allow_patterns))
        return str(self.folder)


def test_of_a_repository_only_what_is_needed_is_fetched(tmp_path, monkeypatch):
    hub = Hub(monkeypatch, REPOSITORY, tmp_path)
    assert source.resolve("some/model", "flax", "diffusers") == source.resolve("some/model", "flax", "any") == tmp_path
    assert hub.fetched == ("some/model", "flax", {
        "model_index.json", "tokenizer/*", "scheduler/*", "unet/config.json", "vae/config.json",
        "text_encoder/config.json", "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors", "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/flax_model.msgpack",
    })  # fmt: skip


def test_a_repository_of_one_network_is_fetched_alone(tmp_path, monkeypatch):
    hub = Hub(monkeypatch, ["config.json", "diffusion_pytorch_model.safetensors", "model.ckpt"], tmp_path)
    made = vae()
    save("vae", tmp_path, made.config, made.params)
    assert same(load_vae("some/vae").params, made.params)
    assert hub.fetched == ("some/vae", None, {"*.json", "*.txt", "*.model", "diffusion_pytorch_model.safetensors"})
