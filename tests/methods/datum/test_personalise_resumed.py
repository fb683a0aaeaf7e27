"""Personalisations that are killed, over eight devices and by two processes are the same; other weights are refused."""

import json
import shutil

import meeting
import numpy as np
import pytest
import small_diffusion as small
from personalise_small import arrays, finish, launch, metrics, refused

from fmda import trees
from fmda.diffusion.load import load_stable_diffusion
from fmda.methods.datum.snapshots import read_snapshot


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
    work, model = shutil.copytree(unbroken, tmp_path / "unbroken"), place / "model"
    (work / "train/stage.json").unlink()
    monkeypatch.chdir(place)
    model.rename(tmp_path / "model")
    try:
        shutil.copytree(unbroken / "export/3", model)
        line = refused(capsys, "run.yaml", f"work_dir={work}")
    finally:
        shutil.rmtree(model)
        (tmp_path / "model").rename(model)
    assert "holds work of another configuration (weights: " in line


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
def test_eight_devices_equal_one(place, one):
    work = finish(place, "eight", *TEN, "mesh=[2,4]", devices=8, CUT_ALL="1")
    assert shares_cut(place / "eight.log") == [True, True]
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
