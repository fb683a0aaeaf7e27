"""The pipeline from one image to a scored network: its arms, its plan, and a dry run of every stage."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
import small_diffusion

from fmda.config import read_yaml
from fmda.methods.kinds import open_run
from fmda.methods.render import RenderConfig, write_world
from fmda.methods.uda.self_training import Optimizer, SelfTrainingConfig
from fmda.models.mit import Mit, MitConfig
from fmda.models.module import init
from fmda.weights.network import save

CONFIGS = Path(__file__).parents[3] / "configs/datum"
REAL = CONFIGS / "gta5-to-cityscapes-daformer.yaml"
SHORT = {"P": "runs.personalise", "G": "runs.generate", "D": "runs.datum"}


def arms():
    """Returns {name: overrides} of the arms that the head of the real configuration lists."""
    lines = re.findall(r"^#   (\w.*?)  +([PGD]\..*?)(?:   \(.*)?$", REAL.read_text(), re.MULTILINE)
    # split as a shell splits them
    return {name: [SHORT[one[0]] + one[1:] for one in shlex.split(settings)] for name, settings in lines}


@pytest.mark.parametrize("name", list(arms()))
def test_each_arm_is_a_setting(name):
    job, base = open_run(REAL, arms()[name]), open_run(REAL)
    assert [stage.name for stage in job.stages()][:2] == ["personalise", "generate"] and job.config != base.config
    if name == "the frame itself":
        target = job.config["datum"]["config"].target
        assert (target.name, target.root, target.split) == ("cityscapes", None, "train")


def test_there_are_arms():
    assert len(arms()) == 13


def test_both_adaptations_have_the_published_optimizer():
    runs = open_run(REAL).config
    for name in ("source-only", "datum"):
        config = runs[name]["config"]
        assert config.optim == Optimizer() and (config.steps, config.batch, config.crop) == (40000, 2, 512)
    assert runs["datum"]["config"].learn.self_training == SelfTrainingConfig()


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*-to-*.yaml")))
def test_both_adaptations_of_a_real_run_differ_in_the_target_alone(name):
    job = open_run(CONFIGS / f"{name}.yaml")
    assert [stage.name for stage in job.stages()] == ["personalise", "generate", "source-only", "datum", "report"]
    assert f"fmda run configs/datum/{name}.yaml" in (CONFIGS / f"{name}.yaml").read_text()
    alone, datum = (job.config[run]["config"] for run in ("source-only", "datum"))
    assert datum.target.name == "folder" and datum.learn.self_training.ignored_rows == (0, 0)
    learn = replace(datum.learn, self_training=None)
    assert replace(datum, target=None, learn=learn) == alone


@pytest.mark.parametrize("name", ["street-night", "street-fog"])
def test_the_street_runs_open_and_score_their_own_domain(name):
    job = open_run(CONFIGS / f"{name}.yaml")
    job.stages()
    domain = name.removeprefix("street-")
    for run in ("source-only", "untouched", "datum"):
        assert job.config[run]["config"].val.split == domain
    assert f"/{domain}/" in str(job.config["personalise"]["config"].image)
    assert read_yaml(CONFIGS / f"{name}.yaml")


def scenes(folder, mit):
    """Fills a folder with GTA5 and Cityscapes in their layouts, of rendered streets, and two tiny networks."""
    write_world(RenderConfig({"game": 4, "photo": 4}, height=32, width=64), folder / "world")
    for domain, image, labels in (
        ("game", "gta5/images/{}.png", "gta5/labels/{}_labelTrainIds.png"),
        (
            "photo",
            "cityscapes/leftImg8bit/{split}/aachen/{}_leftImg8bit.png",
            "cityscapes/gtFine/{split}/aachen/{}_gtFine_labelTrainIds.png",
        ),
    ):
        for index in range(4):
            for part, place in (("images", image), ("labels", labels)):
                path = folder / place.format(f"{index:06}", split="train" if index < 2 else "val")
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / f"world/{domain}/{part}/{index:06}.png", path)
    small_diffusion.stable_diffusion(folder / "diffusion")
    save("mit", folder / "mit", mit, init(lambda rngs: Mit(mit, rngs=rngs), jax.random.key(0)))


@pytest.mark.slow
def test_a_dry_run_walks_every_stage_with_sizes_shrunk_by_overrides_alone(tmp_path):
    tiny = MitConfig(widths=(8, 8, 8, 8), depths=(1, 1, 1, 1), heads=(1, 1, 2, 2))
    scenes(tmp_path, tiny)
    uda = f"network.encoder={tmp_path}/mit resize=[64,32] protocol.resize=[64,32] crop=32 rare_pixels=10 steps=2"
    uda += " optim.warmup_steps=0"
    overrides = [
        f"runs.personalise.{setting}"
        for setting in "image=cityscapes/leftImg8bit/train/aachen/000000_leftImg8bit.png "
        f"model={tmp_path}/diffusion revision=null resize=32 crop=16 steps=2 "
        "snapshots=[2] export=[2]".split()
    ]
    overrides += [
        f"runs.generate.{setting}"
        for setting in "model=@personalise/export/2 count=8 sample.steps=4 sample.size=[32,32] dtype=float32 "
        "copies.encoder=street-dino".split()
    ]
    overrides += [f"runs.{run}.{setting}" for run in ("source-only", "datum") for setting in uda.split()]
    environment = os.environ | {
        "FMDA_DATA": str(tmp_path),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "PYTHONPATH": str(CONFIGS.parents[1]),
    }
    # not from the folder of the datasets
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, "-m", "fmda", "run", str(REAL), f"work_dir={tmp_path}/run", *overrides]
    done = subprocess.run(command, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert len(list((run / "generate/images/images").iterdir())) == 8
    assert 0 <= json.loads((run / "generate/copies/copies.json").read_text())["copies"] <= 1
    page = (run / "report/report.html").read_text(encoding="utf-8")
    for name in ("source-only", "datum"):
        assert 0 <= json.loads((run / name / "score/stage.json").read_text())["outputs"]["miou"] <= 1
        assert name in page
    assert "Near the training image" in page


@pytest.mark.slow
def test_the_real_run_is_planned_at_full_size():
    counts = dict(open_run(REAL).plan().parameters)
    assert counts["personalise: trained"] == 859_520_964 + 123_060_480
    assert counts["generate: unet"] == 859_520_964
    assert counts["source-only: trained"] == counts["datum: trained"] == 85_155_283
