"""Every damaged or unsuited Stable Diffusion is one line with the mend: in the library, and by the command line."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_diffusion import UNET, stable_diffusion, unet, vae

from fmda import cli, trees
from fmda.diffusion.load import check_stable_diffusion, load_stable_diffusion, save_stable_diffusion
from fmda.errors import UserError
from fmda.weights.files import read_names
from fmda.weights.load import load_text_encoder, load_unet, load_vae
from fmda.weights.network import save
from fmda.weights.source import DIFFUSION_FILES, weight_file

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "sd"
    return folder, stable_diffusion(folder)


@pytest.fixture
def place(pristine, tmp_path, monkeypatch):
    """The working directory, which holds a copy of the tiny model as `sd`."""
    shutil.copytree(pristine[0], tmp_path / "place" / "sd")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def edit(name, **values):
    def damage(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def config(part, **values):
    return edit(f"{part}/config.json", **values)


def weights(part, change):
    def damage(folder):
        path = next((folder / part).glob("*.safetensors"))
        arrays = load_file(path)
        change(arrays)
        save_file(arrays, path)

    return damage


def remove(*names):
    def damage(folder):
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def rename(name, to):
    return lambda folder: (folder / name).rename(folder / to)


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


KEY = "mid_block.resnets.0.conv1.bias"
# what is wrong -> (damage, what the line must hold, whether `models check` lists it instead of ending at once; None
# where the command line is not tried)
CASES = {
    "component missing": (remove("vae"), ["sd: no vae in it"], False),
    "components missing": (remove("scheduler", "tokenizer"), ["sd: no scheduler, tokenizer in it"], None),
    "configuration missing": (remove("unet/config.json"), ["sd: no unet in it"], None),
    "weights missing": (remove(f"vae/{WEIGHTS}"), ["sd/vae: holds no weights; one of diffusion_pytorch"], None),
    "inpainting": (config("unet", in_channels=9), ["sd/unet/config.json: in_channels is 9", "inpainting"], False),
    "other latents": (config("unet", in_channels=8), ["8-channel ones, the others give 12 and 4"], None),
    "other noise": (config("unet", out_channels=8), ["makes 8-channel latents of 4-channel ones, the others"], None),
    "key missing": (weights("unet", lambda a: a.pop(KEY)), [f"sd/unet/{WEIGHTS}: ", f"1 missing: {KEY}"], True),
    "key too many": (weights("vae", lambda a: a.update(extra=np.zeros(3))), ["1 not known to the model: extra"], True),
    "wrong shape": (weights("unet", lambda a: a.update({KEY: np.zeros(3, np.float32)})),
        [f"{KEY} is [3] but should be [16]"], True),
    "text key missing": (weights("text_encoder", lambda a: a.pop("text_model.final_layer_norm.bias")),
        ["sd/text_encoder/model.safetensors: ", "1 missing: text_model.final_layer_norm.bias"], None),
    "pickle": (rename(f"unet/{WEIGHTS}", "unet/diffusion_pytorch_model.bin"), ["a torch pickle can run code",
        "convert it once with: python -c", f"sd/unet/{WEIGHTS}')"], False),
    "text pickle": (rename("text_encoder/model.safetensors", "text_encoder/pytorch_model.bin"),
        ["a torch pickle can run code", "sd/text_encoder/model.safetensors')"], None),
    "cut short": (write(f"vae/{WEIGHTS}", b"\x10"), [f"sd/vae/{WEIGHTS}: damaged or cut short"], None),
    "unknown class": (config("unet", _class_name="UNet3DConditionModel"),
        ["sd/unet/config.json: _class_name is 'UNet3DConditionModel', not 'UNet2DConditionModel'"], False),
    "networks mixed up": (lambda f: shutil.copy(f / "vae/config.json", f / "unet"), ["_class_name is 'AutoencoderKL'"],
        None),
    "unsupported option": (config("unet", class_embed_type="timestep"),
        ["sd/unet/config.json: class_embed_type is 'timestep', not None, which alone can be built"], False),
    "unsupported block": (config("unet", down_block_types=["AttnDownBlock2D", "DownBlock2D"]),
        ["down_block_types is ['AttnDownBlock2D', 'DownBlock2D'], not 2 of"], None),
    "unsupported size": (config("unet", layers_per_block=[1, 2]), ["layers_per_block is [1, 2], not one whole"], None),
    "heads that do not fit": (config("unet", attention_head_dim=[3, 2]),
        ["attention_head_dim 3 does not divide its level in block_out_channels, 8"], None),
    "groups that do not fit": (config("vae", norm_num_groups=5),
        ["norm_num_groups 5 does not divide every one of block_out_channels, 8"], None),
    "unsupported autoencoder": (config("vae", shift_factor=0.1), ["sd/vae/config.json: shift_factor is 0.1"], None),
    "unsupported blocks of the autoencoder": (config("vae", down_block_types=["DownEncoderBlock2D"]),
        ["sd/vae/config.json: down_block_types is ['DownEncoderBlock2D'], not"], None),
    "other text encoder": (config("text_encoder", model_type="t5"), ["model_type is 't5', not 'clip_text_model'"],
        None),
    "half a configuration": (write("vae/config.json", b'{"a": '), ["sd/vae/config.json: cannot be read as JSON"],
        None),
    "tokenizer too large": (config("text_encoder", vocab_size=500), ["tokenizer has 519 tokens, the model 500"], True),
    "tokenizer of a smaller model": (config("text_encoder", vocab_size=49408),
        ["sd/tokenizer: its tokenizer ends sentences with id 518, the model reads them off at 49407; take both"], None),
    "tokenizer damaged": (write("tokenizer/tokenizer.json", b"{}"), ["sd/tokenizer: its tokenizer files cannot"], None),
    "widths that differ": (config("unet", cross_attention_dim=24), ["sd: its UNet reads 24-wide texts", "give 12"],
        True),
    "unknown scheduler": (edit("scheduler/scheduler_config.json", _class_name="FlowMatch", beta_end=None),
        ["sd/scheduler/scheduler_config.json: ", "'FlowMatch' is not supported"], True),
}  # fmt: skip


SIZE = "not one whole number above 0"
TEXT_SIZES = (
    "vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "intermediate_size",
)  # fmt: skip
# (file, key, values of a wrong type or out of range, what the line says of it after the key)
VALUES = [
    ("unet/config.json", "block_out_channels", (5, "x", None, [], [0, 0], [-16, 16], [16.0, 32.0], [True, 16]),
        "not a list of whole numbers above 0"),
    ("unet/config.json", "down_block_types", (None, 5, "x", [[], {}]), "which can be built"),
    ("unet/config.json", "up_block_types", (None, 5), "which alone can be built"),
    ("unet/config.json", "attention_head_dim", (None, 0, "x", -8, {}, True), SIZE),
    ("unet/config.json", "attention_head_dim", ([0, 0], [None, 2], [2.0, 2], [2]), "a list of 2 whole numbers above 0"),
    ("unet/config.json", "num_attention_heads", (0, "x", -8), SIZE),
    ("unet/config.json", "num_attention_heads", ([], [0, 0]), "a list of 2 whole numbers above 0"),
    ("unet/config.json", "use_linear_projection", ("x", None, 1), "not true or false"),
    ("unet/config.json", "layers_per_block", ("x", 0, -1, 1.0, True), SIZE),
    ("vae/config.json", "block_out_channels", (5, [0, 0]), "not a list of whole numbers above 0"),
    ("vae/config.json", "down_block_types", (None, 5), "which alone can be built"),
    ("vae/config.json", "latent_channels", ("x", 0, [4]), SIZE),
    ("vae/config.json", "scaling_factor", ("x", None, 0, -1, np.nan, np.inf, True, [1]),
        "not one finite number above 0"),
    *(("text_encoder/config.json", key, ("x", None, [1], 0, -1, 2.0, True), SIZE) for key in TEXT_SIZES),
    ("text_encoder/config.json", "num_attention_heads", (5,), "does not divide hidden_size, 12"),
    ("text_encoder/config.json", "hidden_act", (None, 0, [1], "gelo"), "not a known word; "),
    ("text_encoder/config.json", "layer_norm_eps", ("x", None, -1), "not one finite number above 0"),
    ("tokenizer/tokenizer_config.json", "model_max_length", ("x", [1], {}, True), "not one number"),
]  # fmt: skip


ARRAYS = ("key missing", "key too many", "wrong shape", "text key missing")


def content(folder):
    return {p: None if p.is_dir() else p.read_bytes() for p in sorted(folder.rglob("*"))}


def fails(capsys, place, command):
    """Runs a command that must exit with 2 and one line, and leave everything as it was; returns (stdout, line)."""
    before = content(place)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(command.split())
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and err.startswith("fmda: ") and err.count("\n") == 1, err
    assert re.search(r"[;,] |: known", err), f"no mend in: {err}"
    assert content(place) == before
    return out, err


@pytest.mark.parametrize("case", CASES)
def test_damage_is_one_line(case, place, capsys):
    damage, fragments, listed = CASES[case]
    damage(place / "sd")
    with pytest.raises(UserError) as error:
        load_stable_diffusion("sd")
    assert all(fragment in str(error.value) for fragment in fragments), error.value
    assert "\n" not in str(error.value) and re.search("[;,?] ", str(error.value))
    # all of it is known before a long run, but for what only the arrays tell
    if case in ARRAYS:
        assert check_stable_diffusion("sd").schedule.sampler == "ddim"
    else:
        with pytest.raises(UserError) as early:
            check_stable_diffusion("sd")
        assert str(early.value) == str(error.value)
    if listed is None:
        return
    _, line = fails(capsys, place, "convert sd new")
    assert all(fragment in line for fragment in fragments), line
    out, line = fails(capsys, place, "models check sd")
    if listed:
        assert "sd: " in line and "not fit for use, see above" in line
        assert fragments[-1].removeprefix("1 ").split(": ")[-1] in out and "NOT GOOD" in out
    else:
        assert all(fragment in line for fragment in fragments) and out == ""


@pytest.mark.parametrize(
    ("name", "key", "value", "what"),
    [
        pytest.param(name, key, value, what, id=f"{name.split('/')[0]}: {key} {value!r}")
        for name, key, values, what in VALUES
        for value in values
    ],
)
def test_a_wrong_value_is_one_line(name, key, value, what, place, capsys):
    edit(name, **{key: value})(place / "sd")
    for call in (load_stable_diffusion, check_stable_diffusion):
        with pytest.raises(UserError) as error:
            call("sd")
        line = str(error.value)
        assert line.startswith(f"sd/{name}: ") and re.search(rf"\b{key}\b.*{what}.*; ", line), line
    with pytest.raises(SystemExit) as ended:
        cli.main(["models", "check", "sd"])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and err.startswith("fmda: ") and err.count("\n") == 1 and line in out + err


@pytest.mark.parametrize("limit", [1e30, 10**30, None, 0])
def test_a_tokenizer_may_name_any_limit(limit, place):
    edit("tokenizer/tokenizer_config.json", model_max_length=limit)(place / "sd")
    assert load_stable_diffusion("sd").tokenize(["a road"]).shape == (1, 16)


def test_what_is_not_good_is_named(place, capsys):
    for damage, what in (
        (CASES["wrong shape"][0], f"fmda: sd: unet/{WEIGHTS}: not fit for use"),
        (CASES["unknown scheduler"][0], "fmda: sd: scheduler: not fit for use"),
        (weights("unet", lambda a: a.update({KEY: np.full(16, np.nan, np.float32)})), f"sd: unet/{WEIGHTS}: not fit"),
    ):
        shutil.copytree(place / "sd", place / "good")
        damage(place / "sd")
        assert what in fails(capsys, place, "models check sd")[1]
        shutil.rmtree(place / "sd")
        (place / "good").rename(place / "sd")


def test_the_command_that_converts_a_pickle_is_complete(place):
    CASES["pickle"][0](place / "sd")
    with pytest.raises(UserError) as error:
        load_unet("sd")
    code = str(error.value).split('python -c "')[1].removesuffix('"')
    compile(code, "command", "exec")
    assert "'sd/unet/diffusion_pytorch_model.bin'" in code and f"'sd/unet/{WEIGHTS}'" in code


@pytest.mark.parametrize("name", ["pytorch_model.fp16.bin", "open_clip_pytorch_model.bin"])
def test_a_converted_pickle_is_found_again(name, tmp_path):
    with pytest.raises(UserError) as error:
        read_names(tmp_path / name)
    converted = tmp_path / str(error.value).split("'")[-2].rsplit("/", 1)[-1]
    converted.touch()
    assert weight_file(tmp_path) == converted


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 22366552\n"


@pytest.mark.parametrize("name", [f"unet/{WEIGHTS}", "unet/config.json"])
def test_a_git_lfs_pointer_is_named(name, place):
    (place / "sd" / name).write_bytes(POINTER)
    with pytest.raises(UserError, match=rf"sd/{name}: is a Git LFS pointer.*; run `git lfs pull`"):
        check_stable_diffusion("sd")


def test_a_complete_float16_file_goes_before_a_pointer(place):
    shutil.copy(place / "sd/unet" / WEIGHTS, place / "sd/unet/diffusion_pytorch_model.fp16.safetensors")
    (place / "sd/unet" / WEIGHTS).write_bytes(POINTER)
    assert weight_file(place / "sd/unet", DIFFUSION_FILES).name == "diffusion_pytorch_model.fp16.safetensors"
    check_stable_diffusion("sd")


def test_a_single_variant_is_read_and_several_are_named(place):
    folder, (stem, end) = place / "sd/unet", WEIGHTS.split(".")
    (folder / WEIGHTS).rename(folder / f"{stem}.bf16.{end}")
    assert weight_file(folder, DIFFUSION_FILES).name == f"{stem}.bf16.{end}"
    shutil.copy(folder / f"{stem}.bf16.{end}", folder / f"{stem}.non_ema.{end}")
    with pytest.raises(UserError, match=f"sd/unet: holds several variants, {stem}.bf16.{end}, {stem}.non_ema"):
        weight_file(folder, DIFFUSION_FILES)
    shutil.copy(folder / f"{stem}.bf16.{end}", folder / WEIGHTS)
    assert weight_file(folder, DIFFUSION_FILES).name == WEIGHTS


def test_a_broken_link_is_named(tmp_path):
    (tmp_path / WEIGHTS).symlink_to("../blobs/missing")
    with pytest.raises(UserError, match=f"{WEIGHTS}: is a link to a file that is not there; copy or download"):
        weight_file(tmp_path, DIFFUSION_FILES)


def test_a_missing_shard_is_known_before_loading(place):
    (place / "sd/vae" / WEIGHTS).rename(place / "sd/vae/one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (place / "sd/vae" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="sd/vae/two.safetensors: shard named in .*index.json is not there; copy"):
        check_stable_diffusion("sd")


@pytest.mark.parametrize("homes", [{"a": 5}, {"a": None}, {"a": ["one"]}, 5, None])
def test_an_index_without_files_is_one_line(homes, place, capsys):
    (place / "sd/vae" / WEIGHTS).rename(place / "sd/vae/one.safetensors")
    (place / "sd/vae" / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": homes}))
    what = f"sd/vae/{WEIGHTS}.index.json: has no 'weight_map' with the file of each array; copy or download it again"
    for call in (load_stable_diffusion, check_stable_diffusion):
        with pytest.raises(UserError) as error:
            call("sd")
        assert str(error.value) == what
    assert what in fails(capsys, place, "models check sd")[1]


def test_a_single_network_says_the_same(place, capsys):
    for load, part, case in ((load_unet, "unet", "key missing"), (load_vae, "vae", "key too many")):
        damage, fragments, _ = CASES[case]
        damage(place / "sd")
        with pytest.raises(UserError) as error:
            load(f"sd/{part}")
        assert all(fragment in str(error.value) for fragment in fragments)
        assert all(fragment in fails(capsys, place, f"convert sd/{part} new")[1] for fragment in fragments)
        out, line = fails(capsys, place, f"models check sd/{part}")
        assert "NOT GOOD" in out and f"sd/{part}: {WEIGHTS}: not fit for use" in line
    config("unet", _class_name="UNet3DConditionModel")(place / "sd")
    for command in ("convert sd/unet new", "models check sd/unet"):
        _, line = fails(capsys, place, command)
        assert "sd/unet/config.json: _class_name 'UNet3DConditionModel' cannot be built; did you mean 'UNet2D" in line


@pytest.mark.parametrize(
    ("load", "source", "what"),
    [
        (load_unet, "sd/vae", "_class_name is 'AutoencoderKL', not 'UNet2DConditionModel': this is"),
        (load_vae, "sd/tokenizer", "sd/tokenizer: holds neither vae/ nor config.json; give a folder in diffusers'"),
        (load_text_encoder, "sd", "sd: has no folder 'text_encoder'; copy or download the whole checkpoint again"),
        (load_stable_diffusion, "sd/unet", "sd/unet: no unet, vae, text_encoder, scheduler, tokenizer in it"),
        (load_stable_diffusion, "nowhere", "nowhere: no such folder"),
        (load_stable_diffusion, "some/model", "some/model: no such folder, not in the hub's local cache"),
    ],
)
def test_the_wrong_folder(place, load, source, what):
    remove("text_encoder")(place / "sd")
    with pytest.raises(UserError) as error:
        load(source)
    assert what in str(error.value) and "\n" not in str(error.value)


def zeros(*shape):
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: unet()(zeros(1, 5, 4, 4), zeros(1), zeros(1, 3, 12)), "latents: 5x4 are no multiples of 2; choose"),
        (
            lambda: unet()(zeros(1, 4, 4, 3), zeros(1), zeros(1, 3, 12)),
            "[1, 4, 4, 3] where the UNet reads [B, h, w, 4]",
        ),
        (lambda: unet()(zeros(4, 4, 4), zeros(1), zeros(1, 3, 12)), "latents: of shape [4, 4, 4] where the UNet"),
        (
            lambda: unet()(zeros(1, 4, 4, 4), zeros(1), zeros(1, 3, 24)),
            "context: 24 wide where the UNet reads 12; take",
        ),
        (lambda: vae().encode(zeros(1, 9, 8, 3)), "images: 9x8 pixels are no multiples of 2; crop or resize them"),
        (
            lambda: vae().encode(zeros(1, 8, 8, 1)),
            "images: of shape [1, 8, 8, 1], not [B, H, W, 3]; convert them to RGB",
        ),
        (lambda: vae().encode(zeros(8, 8, 4)), "images: of shape [8, 8, 4], not [B, H, W, 3]; convert them to RGB"),
        (
            lambda: vae().decode(zeros(1, 4, 4, 8)),
            "latents: of shape [1, 4, 4, 8] where the autoencoder reads [B, h, w, 4]",
        ),
    ],
)
def test_inputs_that_do_not_fit(call, what):
    with pytest.raises(UserError) as error:
        call()
    assert what in str(error.value) and "; " in str(error.value)


def test_a_text_longer_than_the_context(pristine):
    with pytest.raises(UserError, match="text of 17 tokens, but the model has 16 positions; shorten"):
        pristine[1].text_encoder(jnp.zeros((1, 17), jnp.int32))


def test_a_folder_with_something_in_it_is_left_alone(place, pristine, capsys):
    (place / "taken").mkdir()
    (place / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="taken: is there already; name a new folder"):
        save_stable_diffusion("taken", pristine[1])
    for out in ("taken", "sd", "taken/notes.txt"):
        for source in ("sd", "sd/unet"):
            assert f"{out}: is there already; name a new folder" in fails(capsys, place, f"convert {source} {out}")[1]


def test_parameters_of_another_shape_are_not_written(place, pristine):
    before, model = content(place), pristine[1]
    wrong = trees.unflatten({**trees.flatten(model.vae.params), "quant/bias": zeros(3)})
    with pytest.raises(UserError, match="new/vae: parameters do not fit the configuration at quant/bias; nothing"):
        save_stable_diffusion("new", model.with_params({"vae": wrong}))
    with pytest.raises(UserError, match="parameters do not fit"):
        save("unet", place / "new", UNET, model.vae.params)
    assert content(place) == before


def test_a_disk_that_fills_up_leaves_nothing_and_the_same_command_goes_on(place, capsys, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fmda.diffusion.load.shutil.copyfile", full)
        assert "new: No space left" in fails(capsys, place, "convert sd new")[1]
    with monkeypatch.context() as patch:
        patch.setattr("fmda.weights.files.save_file", full)
        line = fails(capsys, place, "convert sd new")[1]
        assert f"new/unet/{WEIGHTS}: No space left" in line and ".part" not in line
    (place / ".new.part").mkdir()  # what a killed try left
    cli.main("convert sd new".split())
    assert (place / "new" / "model_index.json").is_file() and not list(place.glob(".*"))
