"""A run that is killed, stopped or out of disk ends, when started again, with the same bits as an unbroken one."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from regression import run
from run_fit import digest

from fmda.mesh import make_mesh

SCRIPT = Path(__file__).with_name("run_fit.py")


def launch(folder, *options, **kwargs):
    """Returns the running program; its output is text."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(SCRIPT.parents[2])}
    command = [sys.executable, str(SCRIPT), str(folder), *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **kwargs
    )


def finish(process):
    """Returns (exit code, output lines, error text)."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out.splitlines(), err


def records(folder):
    """Returns the lines of metrics.jsonl without their times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Returns (digest, metrics) of the run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("unbroken")
    code, out, err = finish(launch(folder))
    assert code == 0, err
    return out[-1], records(folder)


def test_killed_at_random_moments(tmp_path, unbroken):
    moments = random.Random(7)
    kills, delivered = 4, 0
    for _ in range(kills):
        process = launch(tmp_path, "--pause", "0.01")
        # The first batch comes before compilation; a low number of lines hits that, or the first steps.
        for _ in range(moments.randint(1, 16)):
            process.stdout.readline()
        time.sleep(moments.uniform(0, 0.05))
        delivered += process.poll() is None
        process.kill()
        process.communicate(timeout=60)
    code, out, err = finish(launch(tmp_path))
    assert code == 0, err
    assert delivered == kills
    assert (out[-1], records(tmp_path)) == unbroken
    again = run(tmp_path, steps=60, mesh=make_mesh())
    assert f"digest {digest(again)}" == unbroken[0]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stop_signals_save_and_exit(tmp_path, unbroken, signum, code):
    process = launch(tmp_path, "--pause", "0.02", "--save-steps", "1000")
    for _ in range(9):
        process.stdout.readline()
    process.send_signal(signum)
    returned, out, err = finish(process)
    assert returned == code
    assert "stopped and saved at step" in err
    assert "Traceback" not in err
    code, resumed, err = finish(launch(tmp_path))
    assert code == 0 and "resuming at step" in err
    assert (resumed[-1], records(tmp_path)) == unbroken


def test_full_disk_is_one_line_and_costs_only_the_steps_since_the_last_save(tmp_path, unbroken):
    # No line of metrics is due before the checkpoint of step 10: that one meets the full disk.
    code, _, err = finish(launch(tmp_path, "--disk-full-at", "8", "--log-every", "1000"))
    assert code == 2
    assert "Traceback" not in err
    assert "checkpoints: File too large; make room" in err.splitlines()[-1]
    code, out, err = finish(launch(tmp_path))
    assert code == 0 and "resuming at step 5" in err
    assert out[-1] == unbroken[0]


def test_full_disk_under_the_metrics_is_one_line(tmp_path):
    code, _, err = finish(launch(tmp_path, "--disk-full-at", "6", "--save-steps", "1000"))
    assert code == 2
    assert "Traceback" not in err
    assert "File too large; make room" in err.splitlines()[-1]


@pytest.fixture
def read_only():
    """Returns a folder that everyone may read and nobody may write, in a place that everyone reaches."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_read_only_folder_is_one_line(read_only):
    # Nothing is read-only to root, who therefore becomes the folder's stranger.
    options = ["--user", "65534"] if os.geteuid() == 0 else []
    code, _, err = finish(launch(read_only, *options))
    assert code == 2
    assert "Traceback" not in err
    assert str(read_only) in err.splitlines()[-1] and "Permission denied; make room or fix" in err.splitlines()[-1]
    assert list(read_only.iterdir()) == []
