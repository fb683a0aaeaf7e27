"""Whole personalisations of a tiny model by the command line: what they leave, what they refuse, what they survive.

They run in processes of their own, quickly compiled, and share their compiled programs.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import meeting
import numpy as np
import pytest
import small_diffusion as small
from PIL import Image

from fmda import trees
from fmda.config import from_dict, read_yaml
from fmda.data.files import read_image
from fmda.diffusion.draw import SamplerConfig
from fmda.diffusion.load import load_stable_diffusion
from fmda.errors import UserError
from fmda.evaluate.report import report
from fmda.methods.datum.lora import target_kernels
from fmda.methods.datum.personalise import export_steps, prepare, starting_point
from fmda.methods.datum.settings import Config
from fmda.methods.datum.snapshots import read_snapshot, snapshot_model
from fmda.methods.generate import Config as GenerateConfig
from fmda.methods.generate import PromptConfig
from fmda.methods.generate import stages as generate_stages
from fmda.methods.kinds import open_run
from fmda.methods.pipeline import run_stages
from fmda.train.checkpoints import read_params
from fmda.weights import files

SCRIPT = Path(__file__).with_name("personalise_waiting.py")
CONFIG = """kind: personalise
image: target.png
model: model
prompt: a sks road
resize: 20
crop: 16
steps: 6
batch: 8
optim: {learning_rate: 1.0e-3, eps: 1.0e-6}
snapshots: [1, 3, 6]
export: [0, 3, 6]
store: float32
log_every: 1
save_steps: 1
save_minutes: 60
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a picture and a configuration; all its paths are relative."""
    place = tmp_path_factory.mktemp("personalise")
    small.stable_diffusion(place / "model")
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:24, :40]
    smooth = np.stack([rows * 8, columns * 5, 128 + 0 * rows], axis=-1) + rng.normal(0, 20, (24, 40, 3))
    Image.fromarray(np.clip(smooth, 0, 255).astype(np.uint8)).save(place / "target.png")
    (place / "run.yaml").write_text(CONFIG)
    return place


def launch(place, work, *options, devices=1, **variables):
    """Returns the running program; what it says on stderr is added to `<work>.log`."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONPATH": str(SCRIPT.parents[3]),
        **variables,
    }
    command = [sys.executable, str(SCRIPT), "run", "run.yaml", f"work_dir={work}", *options]
    with open(place / f"{work}{variables.get('FMDA_PROCESS', '')}.log", "a") as log:
        return subprocess.Popen(
            command, cwd=place, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )


def finish(place, work, *options, **settings):
    """Runs to the end; returns the run folder."""
    process = launch(place, work, *options, **settings)
    process.communicate(timeout=900)
    assert process.returncode == 0, (place / f"{work}.log").read_text()
    return place / work


def configured(place, **changes):
    """Returns the configuration with paths that hold everywhere."""
    values = read_yaml(place / "run.yaml") | {"image": str(place / "target.png"), "model": str(place / "model")}
    values.pop("kind")
    return from_dict(Config, values | changes)


def arrays(folder, part="unet"):
    name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    return files.read_arrays(folder / part / f"{name}.safetensors")


def metrics(work):
    """Returns the lines of the metrics, without how long things took."""
    lines = (work / "train/metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "time"} for line in lines]


@pytest.fixture(scope="module")
def unbroken(place):
    return finish(place, "unbroken")


def test_a_run_leaves_pictures_snapshots_and_models(place, unbroken):
    picture = Image.open(place / "target.png").resize((33, 20), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(read_image(unbroken / "prepare/target.png"), np.asarray(picture))
    assert read_image(unbroken / "prepare/crops.png").shape == (32, 64, 3)
    kept = sorted(path.name for path in (unbroken / "train/snapshots").iterdir())
    assert kept == ["000001.safetensors", "000003.safetensors", "000006.safetensors"]
    assert sorted(path.name for path in (unbroken / "export").iterdir()) == [
        "0", "3", "6", "stage.json", "training.json",
    ]  # fmt: skip
    last = json.loads((unbroken / "export/training.json").read_text())["last"]
    assert last["step"] == 6 and 0 < last["loss"] < 10 and last["learning_rate"] == pytest.approx(1e-3)
    assert [row["step"] for row in metrics(unbroken) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    origin = {"base": load_stable_diffusion(place / "model").fingerprint, "step": 3}
    assert json.loads((unbroken / "export/3/personalised.json").read_text()) == origin | {
        "token": "sks", "prompt": "a sks road"
    }  # fmt: skip
    drawing = GenerateConfig("unread", prompts=PromptConfig(texts=("a car",)), count=1, sample=SamplerConfig(steps=2))
    run_stages(generate_stages(dataclasses.replace(drawing, model=str(unbroken / "export/3"))), place / "drawn", {})
    line = json.loads((place / "drawn/images/manifest.jsonl").read_text())
    assert line["personalised"]["step"] == 3 and line["personalised"]["base"] == origin["base"]


def test_all_weights_of_unet_and_text_encoder_move_and_the_autoencoder_stays(place, unbroken):
    for part in ("unet", "text_encoder"):
        before, after = arrays(place / "model", part), arrays(unbroken / "export/6", part)
        assert before.keys() == after.keys()
        assert all(not np.array_equal(before[name], after[name]) for name in before)
    assert small.same(arrays(place / "model", "vae"), arrays(unbroken / "export/6", "vae"))


def test_step_0_is_the_untouched_model(place, unbroken):
    for part in ("unet", "text_encoder", "vae"):
        assert small.same(arrays(place / "model", part), arrays(unbroken / "export/0", part))


def test_a_snapshot_is_the_model_that_is_exported(place, unbroken):
    config = configured(place)
    model = snapshot_model(config, unbroken / "train", 3)
    exported = load_stable_diffusion(unbroken / "export/3")
    assert small.same(model.params, exported.params) and model.fingerprint == exported.fingerprint
    assert small.same(read_snapshot(unbroken / "train", 3)["unet"], model.unet.params)
    with pytest.raises(UserError, match=r"000002\.safetensors: no such snapshot; there are steps \[1, 3, 6\]"):
        snapshot_model(config, unbroken / "train", 2)


def test_a_snapshot_goes_with_the_model_it_began_from(place, unbroken):
    with pytest.raises(UserError, match="its weights are not those that .* began with"):
        snapshot_model(configured(place), unbroken / "train", 3, base=load_stable_diffusion(unbroken / "export/3"))


def test_an_export_that_was_broken_off_is_made_again(place, unbroken, tmp_path):
    (tmp_path / ".6.part/unet").mkdir(parents=True)
    paths = export_steps(configured(place, store="float16"), unbroken / "train", tmp_path, {"6": 6})
    assert paths == [tmp_path / "6"] and [path.name for path in tmp_path.iterdir()] == ["6"]
    stored = arrays(tmp_path / "6")
    assert {array.dtype for array in stored.values()} == {np.dtype("float16")}
    whole = arrays(unbroken / "export/6")
    assert all(np.array_equal(stored[name], whole[name].astype(np.float16)) for name in whole)


def test_an_export_of_another_step_is_replaced_and_one_of_the_same_stays(place, unbroken, tmp_path):
    config, train = configured(place), unbroken / "train"
    export_steps(config, train, tmp_path, {"chosen": 3})
    (tmp_path / "chosen/note").touch()
    export_steps(config, train, tmp_path, {"chosen": 3})
    assert (tmp_path / "chosen/note").is_file()
    export_steps(config, train, tmp_path, {"chosen": 6})
    assert not (tmp_path / "chosen/note").exists() and small.same(
        arrays(tmp_path / "chosen"), arrays(unbroken / "export/6")
    )


def test_text_states_are_frozen_where_the_unet_trains_alone(place):
    model = load_stable_diffusion(place / "model")
    frozen, weights, _ = starting_point(configured(place, trained="unet"), model)
    assert set(weights) == {"unet"} and set(frozen) == {"vae", "context"}
    expected = model.text_encoder(model.tokenize(["a sks road"]))
    np.testing.assert_array_equal(frozen["context"], expected)


def test_frozen_networks_are_stored_as_they_compute(place):
    model = load_stable_diffusion(place / "model")
    frozen, weights, _ = starting_point(configured(place, trained="lora", precision="bfloat16"), model)
    assert weights is None
    stored = trees.flatten({part: frozen[part] for part in ("vae", "unet", "text_encoder")})
    assert {leaf.dtype.name for leaf in stored.values()} == {"bfloat16"}
    _, weights, _ = starting_point(configured(place, precision="bfloat16"), model)
    assert {leaf.dtype.name for leaf in trees.flatten(weights).values()} == {"float32"}


def test_a_long_prompt_is_cut_and_the_warning_shows_what_is_lost(place):
    model = load_stable_diffusion(place / "model")
    with pytest.warns(UserWarning, match=r"longer than the 16 tokens that model reads; lost: '.*road'"):
        frozen, *_ = starting_point(
            configured(place, prompt="a car car car car car car car car car car sks road"), model
        )
    assert frozen["ids"].shape == (1, 16)


def refused(capsys, *arguments):
    """Returns the one line with which `fmda run` ends, exit code 2."""
    from fmda.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["run", *map(str, arguments)])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    assert ended.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def save_grey(path):
    Image.open(path).convert("L").save(path)


def save_clear(path):
    Image.open(path).convert("RGBA").save(path)


def cut(path):
    path.write_bytes(path.read_bytes()[:300])


def shrink(path):
    Image.open(path).resize((12, 30)).save(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "target.png: no such"),
        (cut, "target.png: "),
        (shrink, "target.png: 12x30 pixels hold no crop of 16"),
        (save_grey, "target.png: a grey picture"),
        (save_clear, "target.png: a picture with an alpha channel"),
    ],
)
def test_a_picture_that_cannot_be_used_leaves_no_run(place, tmp_path, monkeypatch, capsys, damage, message):
    shutil.copytree(place / "model", tmp_path / "model")
    for name in ("target.png", "run.yaml"):
        shutil.copy(place / name, tmp_path)
    damage(tmp_path / "target.png")
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "run.yaml", "work_dir=work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_model_with_a_missing_part_leaves_no_run(place, tmp_path, monkeypatch, capsys, part):
    shutil.copytree(place / "model", tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    monkeypatch.chdir(place)
    line = refused(capsys, "run.yaml", f"work_dir={tmp_path / 'work'}", f"model={tmp_path / 'model'}")
    assert f"no {part} in it" in line
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prompt=a road", "prompt: 'a road' does not hold the token 'sks'"),
        ("accumulate=3", "accumulate: a batch of 8 is not taken in 3 parts"),
        ("snapshots=[3,9]", "snapshots: [3, 9] must name steps, rising from 1 or later to 6"),
        ("snapshots=[]", "snapshots: [] must name steps"),
        ("seed=-1", "steps, batch, bank, seed: 6, 8, 0, -1; give at least 1 step and a batch of 1, nothing negative"),
        ("batch=0", "steps, batch, bank, seed: 6, 0, 0, 0; give at least 1 step and a batch of 1"),
        ("optim={learning_rate: -1}", "optim.learning_rate: -1.0; give a positive number"),
        ("optim={warmup_steps: 50}", "optim.warmup_steps: 50 does not fit into a run of 6 steps"),
        ("prior={count: 0}", "prior.count: 0; give at least 1"),
        ("prior={weight: .nan}", "prior.weight: nan; give a positive number"),
        ("lora={alpha: .inf}", "lora.alpha: inf; give a positive number"),
        ("noise={offset: .nan}", "noise: offset nan"),
        ("resize=100000", "resize: 100000 makes more than 268,435,456 pixels"),
        ("device_memory=-1", "device_memory: -1.0 GiB is no size of a memory"),
        ("ema=5.0", "ema: 5.0 is no share to keep"),
        ("batch=6", "batch: 6 does not divide over 8 devices; batch=8 does, or mesh=[2,1] takes fewer"),
        ("probe={count: 3}", "probe: count 3, crops 64"),
        ("probe={clip: street-clp}", "street-clp: no such folder, and no model of the package has that name"),
        ("probe={clip: street-clip, prompts: {classes: [tree]}}", "prompts.classes: 'tree' is not one of"),
        ("probe={clip: street-clip, sample: {size: [33, 33]}}", "size: 33x33 are no multiples of 4 pixels"),
        ("probe={clip: street-clip, sample: {steps: 2000}}", "2000"),
        ("prior={sampler: {size: [12, 12]}}", "prior.sampler.size: class pictures of 12x12 hold no crop of 16"),
        ("export=[5]", "export: step 5 is no snapshot; choose of [0, 1, 3, 6]"),
        ("crop=30", "crop: 30 pixels of a side of 20"),
        ("crop=18", "crop: 18x18 are no multiples of 4 pixels; 16x16 would be"),
        ("device_memory=0.001", "batch: 8 needs about"),
        ("trained=all", "trained: 'all' is none of the choices"),
        ("prior={images: nothing}", "prior.images: nothing holds no pictures"),
    ],
)
def test_a_value_that_cannot_be_is_one_line(place, tmp_path, monkeypatch, capsys, override, message):
    monkeypatch.chdir(place)
    line = refused(capsys, "run.yaml", f"work_dir={tmp_path / 'work'}", override)
    assert message in line and not (tmp_path / "work").exists()


@pytest.mark.parametrize("name", ["probe", "prior"])
def test_a_device_too_small_for_what_is_drawn_is_told_before_training(place, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(place)
    drawn = {"probe": "clip: street-clip, sample: {steps: 2}", "prior": "sampler: {steps: 2}"}[name]
    override = f"{name}={{batch: 1000000, {drawn}}}"
    line = refused(capsys, "run.yaml", f"work_dir={tmp_path / 'work'}", override, "device_memory=0.05")
    assert f"{name}.batch: 1000000 needs about" in line and f"{name}.batch=" in line.split(";")[1]
    assert not (tmp_path / "work").exists()


def test_a_finished_run_tells_that_the_picture_has_changed(place, unbroken, tmp_path, monkeypatch, capsys):
    for name in ("target.png", "run.yaml"):
        shutil.copy(place / name, tmp_path)
    shutil.copytree(place / "model", tmp_path / "model")
    shutil.copytree(unbroken, tmp_path / "unbroken")
    monkeypatch.chdir(tmp_path)
    open_run("run.yaml", ["work_dir=unbroken"]).execute(lambda _: None)  # nothing to do
    (tmp_path / "target.png").unlink()
    open_run("run.yaml", ["work_dir=unbroken"]).execute(lambda _: None)  # the copy in the folder serves
    Image.fromarray(np.full((24, 40, 3), 99, np.uint8)).save(tmp_path / "target.png")
    line = refused(capsys, "run.yaml", "work_dir=unbroken")
    assert "target.png: is not the picture that" in line and "choose another work_dir=" in line


def test_prepared_crops_are_encoded_once_and_class_pictures_are_read(place, tmp_path):
    (tmp_path / "class").mkdir()
    for name in "ab":
        shutil.copy(place / "target.png", tmp_path / "class" / f"{name}.png")
    config = configured(place, bank=3, prior={"images": str(tmp_path / "class")})
    prepare(config, tmp_path)
    written = (tmp_path / "bank.npz").read_bytes()
    with np.load(tmp_path / "bank.npz") as bank:
        assert bank["target"].shape == bank["class"].shape == (3, 8, 8, 8)
        assert not np.array_equal(bank["target"][0], bank["target"][1])
    prepare(config, tmp_path)
    assert (tmp_path / "bank.npz").read_bytes() == written


def moved(place, exported, part):
    before, after = arrays(place / "model", part), arrays(exported, part)
    return {name for name in before if not np.array_equal(before[name], after[name])}


@pytest.mark.slow
def test_the_unet_alone(place):
    exported = finish(place, "unet", "trained=unet", "bank=5", "accumulate=2") / "export/6"
    assert moved(place, exported, "unet") == set(arrays(exported)) and not moved(place, exported, "text_encoder")


@pytest.mark.slow
def test_adapters_are_merged_into_what_is_exported(place):
    work = finish(place, "lora", "trained=lora", "lora={rank: 3, alpha: 6.0}")
    base = load_stable_diffusion(place / "model").params
    for part, kernels in (("unet", 4 * 2 * 4), ("text_encoder", 2 * 4)):
        assert len(target_kernels(base[part])) == len(moved(place, work / "export/6", part)) == kernels
    adapters = trees.flatten(read_snapshot(work / "train", 6)["unet"])
    layer = "mid_attention/cross_attention/query"
    change = 2.0 * adapters[f"{layer}/a"] @ adapters[f"{layer}/b"]
    exported = trees.flatten(load_stable_diffusion(work / "export/6").unet.params)[f"{layer}/kernel"]
    np.testing.assert_allclose(exported, trees.flatten(base["unet"])[f"{layer}/kernel"] + change, atol=1e-6)


@pytest.mark.slow
def test_prior_preservation_draws_its_class_pictures_first(place):
    prior = "prior={prompt: a road, count: 3, batch: 2, weight: 0.5, sampler: {sampler: ddim, steps: 2}}"
    work = finish(place, "prior", prior, "ema=0.5", "batch=2")
    assert len(list((work / "prepare/class/images").iterdir())) == 3
    for row in (row for row in metrics(work) if "loss" in row):
        assert row["loss"] == pytest.approx(row["target_loss"] + 0.5 * row["prior_loss"], rel=1e-5)


def test_a_snapshot_is_the_average_where_one_is_kept(place):
    work = finish(place, "averaged", "ema=0.5", "steps=2", "snapshots=[2]", "export=[2]")
    kept = read_snapshot(work / "train", 2)
    assert small.same(kept, read_params(work / "train", "ema"))
    assert not small.same(kept, read_params(work / "train", "params"))


def test_probes_choose_the_step_that_is_exported(place):
    prompts = "prompts: {form: '{token} {class}', classes: [car, bus]}"
    probe = f"probe={{count: 4, batch: 2, crops: 4, clip: street-clip, {prompts}, sample: {{steps: 2}}}}"
    work = finish(place, "probed", probe, "export=null", "steps=2", "snapshots=[2]")
    drawn_of = [line["prompt"] for line in map(json.loads, (work / "probe/2/manifest.jsonl").read_text().splitlines())]
    assert drawn_of == ["sks car", "sks bus"] * 2
    drawn = [(work / f"probe/{step}/images/im_000000_p0.png").read_bytes() for step in (0, 2)]
    assert drawn[0] != drawn[1]
    choice = json.loads((work / "choose/choice.json").read_text())
    assert choice["curves"]["steps"] == [0, 2] and choice["step"] in (0, 2)
    model = load_stable_diffusion(work / "export/chosen")
    assert small.same(model.params, snapshot_model(configured(place), work / "train", choice["step"]).params)
    trained = (work / "train/stage.json").read_bytes()
    with pytest.raises(AssertionError, match="export: was made from other inputs or settings; delete it"):
        finish(place, "probed", probe, "export=[0,2]", "steps=2", "snapshots=[2]", "log_every=2")
    shutil.rmtree(work / "export")
    finish(place, "probed", probe, "export=[0,2]", "steps=2", "snapshots=[2]", "log_every=2")
    # another export needs no other training
    assert (work / "export/0").is_dir() and (work / "train/stage.json").read_bytes() == trained
    page = report([work], work / "report.html").read_text()
    assert "Personalised on one picture" in page and "When to stop" in page and page.count("data:image/") >= 2


@pytest.mark.slow
def test_killed_at_any_batch_the_snapshots_are_the_same_bits(place, unbroken):
    # a save waits for the one before: with 3 steps begun, that of the first is on the disk
    for allowed in (0, 3, 3, 1):
        process = launch(place, "killed")
        for _ in range(allowed):
            assert process.stdout.readline() == "drawn\n"
            process.stdin.write("\n")
            process.stdin.flush()
        # one more batch is drawn and held back: the run stands somewhere in the last step begun, or the save before
        assert process.stdout.readline() == "drawn\n"
        process.kill()
        process.communicate(timeout=60)
    killed = finish(place, "killed")
    assert (place / "killed.log").read_text().count("resuming at step") >= 2
    for step in ("000001", "000003", "000006"):
        name = f"train/snapshots/{step}.safetensors"
        assert (killed / name).read_bytes() == (unbroken / name).read_bytes()
    for part in ("unet", "text_encoder"):
        assert small.same(arrays(killed / "export/6", part), arrays(unbroken / "export/6", part))
    assert metrics(killed) == metrics(unbroken)


@pytest.mark.slow
def test_a_run_goes_on_only_with_the_weights_it_began_with(place, unbroken, tmp_path, monkeypatch, capsys):
    for name in ("target.png", "run.yaml"):
        shutil.copy(place / name, tmp_path)
    shutil.copytree(unbroken, tmp_path / "unbroken")
    shutil.copytree(unbroken / "export/3", tmp_path / "model")
    (tmp_path / "unbroken/train/stage.json").unlink()
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, "run.yaml", "work_dir=unbroken")
    assert "holds a run of another configuration (weights: " in line


TEN = ("steps=10", "snapshots=[10]", "export=[10]")


@pytest.fixture(scope="module")
def one(place):
    return read_snapshot(finish(place, "one", *TEN) / "train", 10)


def apart(place, one, work):
    """Returns the largest difference between two runs' weights.

    Biases of the text encoder's keys are left out: their gradient is rounding alone.
    """
    mine, yours = trees.flatten(read_snapshot(work / "train", 10)), trees.flatten(one)
    before = trees.flatten({part: load_stable_diffusion(place / "model").params[part] for part in one})
    assert max(np.abs(yours[path] - before[path]).max() for path in yours) > 5e-3
    paths = [path for path in yours if not path.endswith("attention/key/bias")]
    return max(np.abs(mine[path] - yours[path]).max() for path in paths)


def shares_cut(log):
    """Whether most of the parameters, and of the moments, were cut over devices."""
    shares = [float(line.split()[-1]) for line in log.read_text().splitlines() if " cut " in line]
    assert len(shares) == 2 and all(share == 0 or share > 0.8 for share in shares), shares
    return [share > 0 for share in shares]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["[8,1]", "[1,8]", "[2,4]"])
def test_eight_devices_equal_one(place, one, mesh):
    work = finish(place, f"eight{mesh[1]}", *TEN, f"mesh={mesh}", devices=8, CUT_ALL="1")
    assert shares_cut(place / f"eight{mesh[1]}.log") == [mesh != "[8,1]"] * 2
    assert json.loads((work / "train/stage.json").read_text())["device"].startswith("8 x ")
    assert apart(place, one, work) < 1e-4


@pytest.mark.slow
def test_two_processes_equal_one(place, one):
    joined = {"FMDA_COORDINATOR": f"localhost:{meeting.free_port()}", "FMDA_PROCESSES": "2"}
    pair = [
        launch(
            place, "two", *TEN, "mesh=[1,8]", "--processes", devices=4, CUT_ALL="1", FMDA_PROCESS=str(number), **joined
        )
        for number in range(2)
    ]
    for process in pair:
        process.stdin.close()
        process.stdin = None
    for process in pair:
        process.communicate(timeout=900)
    logs = "\n".join((place / f"two{number}.log").read_text() for number in range(2))
    assert [process.returncode for process in pair] == [0, 0], logs
    assert shares_cut(place / "two0.log") == [True, True]
    assert apart(place, one, place / "two") < 1e-4


def test_defaults_are_the_paper_s():
    config = Config(image="target.png")
    assert config.snapshot_steps == (200, 400, 600, 800, 1000) and config.export is None
    assert dataclasses.replace(config, steps=3).snapshot_steps == (1, 2, 3)
