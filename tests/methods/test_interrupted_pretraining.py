"""CLIP pretraining through the command line: killed many times, on eight devices, in two processes, the same."""

import itertools
import json
import random
import resource
import time

import meeting
import numpy as np
import pytest
import small_place
from launched import finish, last_step, launch, steps_and_losses

from fmda import trees
from fmda.train import read_params

pytestmark = pytest.mark.slow

STEPS, KILLS = 40, 8
CONFIG = small_place.CLIP.replace("steps: 4\n", f"steps: {STEPS}\n") + "log_every: 1\nsave_steps: 3\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a few scenes and the configuration."""
    folder = tmp_path_factory.mktemp("pretraining")
    small_place.draw_scenes(folder / "scenes", 4)
    (folder / "run.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def unbroken(place):
    return finish(place, "unbroken")


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_killed_at_random_moments_the_weights_are_the_same_bits(place, unbroken):
    moments = random.Random(3)
    # while Python starts, in the first stage, at any step, and after the last one
    marks = ["start", "tokenizer"]
    edges = np.linspace(1, STEPS, KILLS - 2, dtype=int)
    marks += [moments.randrange(low, high) for low, high in itertools.pairwise(edges)] + ["export"]
    work, hits = place / "killed", []
    for mark in marks:
        process = launch(place, "killed")
        reached = {
            "start": lambda: True,
            "tokenizer": lambda: (work / "tokenizer").is_dir(),
            "export": lambda: (work / "train/stage.json").is_file() or (work / "export").is_dir(),
        }.get(mark, lambda mark=mark: last_step(work) >= mark)
        while not reached() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 2.0 if mark == "start" else 0.05))
        if process.poll() is None:
            hits.append(last_step(work))
        process.kill()
        process.wait(timeout=60)
    finish(place, "killed")
    assert len(hits) == KILLS and len(set(hits)) > 4
    # records of the run hold times and the work folder; weights, configuration and tokenizer do not
    broken, whole = content(work / "export"), content(unbroken / "export")
    differing = {path.name for path in whole if broken[path] != whole[path]}
    assert broken.keys() == whole.keys() and differing <= {"stage.json", "training.json"}
    assert steps_and_losses(work) == steps_and_losses(unbroken)


def distance(ours, theirs):
    """Returns the largest difference between the parameters, and between their averages, of two runs.

    Biases of attention keys are left out: they shift all scores of a query alike, which the softmax takes back. Their
    gradient is rounding alone, and Adam makes steps of full size from it.
    """
    found = []
    for which in ("params", "teacher"):
        mine, yours = (trees.flatten(read_params(work / "train", which)) for work in (ours, theirs))
        assert mine.keys() == yours.keys()
        found += [np.abs(mine[p] - yours[p]).max() for p in mine if not p.endswith("attention/key/bias")]
    assert len(found) > 40
    return float(max(found))


@pytest.fixture(scope="module")
def one(place):
    return finish(place, "one", "steps=6")


def test_a_disk_that_is_full_in_training_is_one_line_and_the_same_command_goes_on(place, one):
    # a process of its own: what the array store has to say comes when it ends
    command = launch(place, "full", "steps=6")
    resource.prlimit(command.pid, resource.RLIMIT_FSIZE, (20000, 20000))
    code, lines = command.wait(timeout=900), (place / "full.log").read_text().splitlines()
    assert code == 2 and lines[-1].startswith(f"fmda: {place}/full/train/checkpoints: File too large; make room")
    assert all(line.startswith(("[", "captions", "clip", "check scenes")) for line in lines[:-1]), lines
    finish(place, "full", "steps=6")
    assert (place / "full/export/model.safetensors").read_bytes() == (one / "export/model.safetensors").read_bytes()


def test_eight_devices_equal_one(place, one):
    eight = finish(place, "eight", "steps=6", JAX_NUM_CPU_DEVICES="8")
    assert json.loads((eight / "train/stage.json").read_text())["device"].startswith("8 x ")
    assert distance(one, eight) < 1e-5


def test_two_joined_processes_equal_one(place, one):
    joined = {"FMDA_COORDINATOR": f"localhost:{meeting.free_port()}", "FMDA_PROCESSES": "2"}
    pair = [
        launch(place, "two", "steps=6", "--processes", JAX_NUM_CPU_DEVICES="4", FMDA_PROCESS=str(number), **joined)
        for number in range(2)
    ]
    codes = [process.wait(timeout=900) for process in pair]
    assert codes == [0, 0], "\n".join((place / f"two{number}.log").read_text() for number in range(2))
    assert distance(one, place / "two") < 1e-5
    assert (place / "two/export/vocab.json").exists() == (one / "export/vocab.json").exists()
