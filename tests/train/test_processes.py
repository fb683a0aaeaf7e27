"""Two processes joined by jax.distributed train like one process with as many devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import meeting
import numpy as np
from regression import run

from fmda.mesh import make_mesh
from fmda.train import read_params

SCRIPT = Path(__file__).with_name("run_fit.py")


def run_joined(folder, *options, code=0):
    """Runs two processes of four devices each; returns their error texts."""
    port = meeting.free_port()
    processes = []
    for number in range(2):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(SCRIPT.parents[2]),
            "FMDA_COORDINATOR": f"localhost:{port}",
            "FMDA_PROCESSES": "2",
            "FMDA_PROCESS": str(number),
        }
        command = [sys.executable, str(SCRIPT), str(folder), "--devices", "4", "--steps", "10", *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, text=True, env=environment, **pipes))
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [code, code], "\n".join(errors)
    return errors


def test_two_processes_equal_one(tmp_path):
    run_joined(tmp_path / "two", "--log-every", "5", "--stop-at", "5", code=143)
    first, second = run_joined(tmp_path / "two")
    alone = run(tmp_path / "one", mesh=make_mesh(fsdp=2))
    joined = read_params(tmp_path / "two")
    for ours, theirs in zip(jax.tree.leaves(alone.params), jax.tree.leaves(joined), strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)
    assert "resuming at step 5" in first
    assert "resuming" not in second
