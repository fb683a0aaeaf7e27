"""Whole personalisations of a tiny model by the command line: what they leave, and what is made from it."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import small_diffusion as small
from personalise_small import arrays, configured, finish, metrics, refused
from PIL import Image

from fmda import trees
from fmda.data.files import read_image
from fmda.data.streams import Stream
from fmda.diffusion.draw import SamplerConfig
from fmda.diffusion.load import load_stable_diffusion
from fmda.errors import UserError
from fmda.evaluate.report import report
from fmda.methods.datum.personalise import export_steps, personalisation, prepare
from fmda.methods.datum.settings import Config
from fmda.methods.datum.snapshots import read_snapshot, snapshot_model
from fmda.methods.generate import Config as GenerateConfig
from fmda.methods.generate import PromptConfig
from fmda.methods.generate import stages as generate_stages
from fmda.methods.kinds import open_run
from fmda.methods.lora import target_kernels
from fmda.runs.stages import run_stages
from fmda.train.checkpoints import read_params


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


def task_of(config, model):
    return personalisation(config, model, Stream([{"seed": 0}], None, config.batch))


def test_text_states_are_frozen_where_the_unet_trains_alone(place):
    model = load_stable_diffusion(place / "model")
    task = task_of(configured(place, trained="unet"), model)
    assert set(task.weights) == {"unet"} and set(task.frozen) == {"vae", "context"}
    expected = model.text_encoder(model.tokenize(["a sks road"]))
    np.testing.assert_array_equal(task.frozen["context"], expected)


def test_frozen_networks_are_stored_as_they_compute(place):
    model = load_stable_diffusion(place / "model")
    task = task_of(configured(place, trained="lora", precision="bfloat16"), model)
    assert task.weights is None
    stored = trees.flatten({part: task.frozen[part] for part in ("vae", "unet", "text_encoder")})
    assert {leaf.dtype.name for leaf in stored.values()} == {"bfloat16"}
    task = task_of(configured(place, precision="bfloat16"), model)
    assert {leaf.dtype.name for leaf in trees.flatten(task.weights).values()} == {"float32"}


def test_a_long_prompt_is_cut_and_the_warning_shows_what_is_lost(place):
    model = load_stable_diffusion(place / "model")
    with pytest.warns(UserWarning, match=r"longer than the 16 tokens that model reads; lost: '.*road'"):
        task = task_of(configured(place, prompt="a car car car car car car car car car car sks road"), model)
    assert task.frozen["ids"].shape == (1, 16)


def test_a_finished_run_tells_that_the_picture_has_changed(place, unbroken, tmp_path, monkeypatch, capsys):
    work, target = shutil.copytree(unbroken, tmp_path / "moved"), place / "target.png"
    monkeypatch.chdir(place)
    open_run("run.yaml", [f"work_dir={work}"]).execute(lambda _: None)  # nothing to do
    content = target.read_bytes()
    try:
        target.unlink()
        open_run("run.yaml", [f"work_dir={work}"]).execute(lambda _: None)  # the copy in the folder serves
        Image.fromarray(np.full((24, 40, 3), 99, np.uint8)).save(target)
        line = refused(capsys, "run.yaml", f"work_dir={work}")
    finally:
        target.write_bytes(content)
    assert "target.png is not the image that it was prepared for" in line and "choose another work_dir=" in line


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


@pytest.mark.slow
def test_a_snapshot_is_the_average_where_one_is_kept(place):
    work = finish(place, "averaged", "ema=0.5", "steps=2", "snapshots=[2]", "export=[2]")
    kept = read_snapshot(work / "train", 2)
    assert small.same(kept, read_params(work / "train", "teacher"))
    assert not small.same(kept, read_params(work / "train", "params"))


@pytest.mark.slow
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
    with pytest.raises(AssertionError, match="export: made from other inputs or settings .*; delete it"):
        finish(place, "probed", probe, "export=[0,2]", "steps=2", "snapshots=[2]", "log_every=2")
    shutil.rmtree(work / "export")
    finish(place, "probed", probe, "export=[0,2]", "steps=2", "snapshots=[2]", "log_every=2")
    # another export needs no other training
    assert (work / "export/0").is_dir() and (work / "train/stage.json").read_bytes() == trained
    page = report([work], work / "report.html").read_text()
    assert "Personalised on one image" in page and "When to stop" in page and page.count("data:image/") >= 2


def test_defaults_are_the_paper_s():
    config = Config(image="target.png")
    assert config.snapshot_steps == (200, 400, 600, 800, 1000) and config.export is None
    assert dataclasses.replace(config, steps=3).snapshot_steps == (1, 2, 3)
