"""The pipeline from one image to a scored network: its arms, its plan, and a dry run of every stage."""

import re
import shlex
from pathlib import Path

import pytest

from fmda.config import read_yaml
from fmda.methods.kinds import open_run

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
    assert len(arms()) == 12


@pytest.mark.parametrize("name", ["street-night", "street-fog"])
def test_the_street_runs_open_and_score_their_own_domain(name):
    job = open_run(CONFIGS / f"{name}.yaml")
    job.stages()
    domain = name.removeprefix("street-")
    for run in ("source-only", "untouched", "datum"):
        assert job.config[run]["config"].val.split == domain
    assert f"/{domain}/" in str(job.config["personalise"]["config"].image)
    assert read_yaml(CONFIGS / f"{name}.yaml")
