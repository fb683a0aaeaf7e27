"""Personalisations that cannot be: a picture, a model or a value is refused in one line, before anything is written."""

import shutil
from pathlib import Path

import pytest
from personalise_small import refused
from PIL import Image


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
        (Path.unlink, "target.png: cannot be read (No such file or directory)"),
        (cut, "target.png: "),
        (shrink, "target.png: 12x30 pixels hold no crop of 16"),
        (save_grey, "target.png: a grey image"),
        (save_clear, "target.png: an image with an alpha channel"),
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
        ("seed=-1", "seed: expected a whole number >= 0, got '-1'"),
        ("minutes=5", "minutes: a personalisation ends at its snapshots"),
        ("batch=0", "batch: expected a whole number >= 1, got '0'"),
        ("optim={learning_rate: -1}", "optim.learning_rate: expected a number >= 0, got '-1'"),
        ("optim={warmup_steps: 50}", "optim.warmup_steps: 50 does not fit into a run of 6 steps"),
        ("prior={count: 0}", "prior.count: expected a whole number >= 1, got '0'"),
        ("prior={weight: .nan}", "prior.weight: expected a number > 0, got '.nan'"),
        ("lora={alpha: .inf}", "lora.alpha: expected a number > 0, got '.inf'"),
        ("noise={offset: .nan}", "noise.offset: expected a number >= 0, got '.nan'"),
        ("resize=100000", "resize: 100000 makes more than 268,435,456 pixels"),
        ("device_memory=-1", "device_memory: expected a number > 0, got '-1'"),
        ("ema=5.0", "ema: expected a number >= 0 and < 1, got '5.0'"),
        ("batch=6", "batch: 6 does not divide over 8 devices; batch=8 does, or mesh=[2,1] takes fewer"),
        ("probe={count: 3}", "probe.count: expected a whole number >= 4, got '3'"),
        ("probe={clip: street-clp}", "street-clp: no such folder, and no model of the package has that name"),
        ("probe={clip: street-clip, prompts: {classes: [tree]}}", "prompts.classes: 'tree' is not one of"),
        ("probe={prompts: {token: abc}}", "probe.prompts.token: 'abc', but the model learns 'sks'; leave it out"),
        ("probe={clip: street-clip, sample: {size: [33, 33]}}", "size: 33x33 are no multiples of 4 pixels"),
        ("probe={clip: street-clip, sample: {steps: 2000}}", "2000"),
        ("prior={sampler: {size: [12, 12]}}", "prior.sampler.size: class images of 12x12 hold no crop of 16"),
        ("export=[5]", "export: step 5 is no snapshot; choose of [0, 1, 3, 6]"),
        ("crop=30", "crop: 30 pixels of a side of 20"),
        ("crop=18", "crop: 18x18 are no multiples of 4 pixels; 16x16 would be"),
        ("device_memory=0.001", "batch: 8 needs about"),
        ("trained=all", "trained: 'all' is none of the choices"),
        ("prior={images: nothing}", "nothing holds no images"),
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
