"""FLOSS on the models and the street world that come with the package."""

import json

import pytest

from fmda.config import from_dict
from fmda.methods.floss.run import Config, stages
from fmda.methods.render import RenderConfig, write_world
from fmda.runs.stages import run_stages


@pytest.mark.slow
def test_floss_is_better_than_its_host_on_night_streets(tmp_path, monkeypatch):
    monkeypatch.setenv("FMDA_CACHE", str(tmp_path / "cache"))
    for name, seed in (("unlabelled", 1), ("held", 2)):
        write_world(RenderConfig({"night": 6}, seed=seed), tmp_path / name)
    values = {
        "host": {"name": "clip-dinoiser", "long_max": 256, "short_max": 128, "crop": 128, "stride": 64}
        | {"trained_scale": True},
        "classes": "cityscapes",
        "data": {"name": "world", "root": str(tmp_path / "held"), "split": "night"},
        "unlabelled": {"name": "world", "root": str(tmp_path / "unlabelled"), "split": "night"},
    }
    config = from_dict(Config, values)
    run_stages(stages(config), tmp_path / "run", {"config": config}, lambda line: None)
    host, floss = (
        100 * json.loads((tmp_path / "run" / name / "scores.json").read_text())["scores"]["miou"]
        for name in ("host", "floss")
    )
    print(host, floss)
    assert host > 5 and floss > host + 0.5
