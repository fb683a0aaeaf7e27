"""Two processes joined by jax.distributed train like one process with as many devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import meeting
import numpy as np
from regression import RULES, parts

from fmda.mesh import make_mesh
from fmda.train import fit, read_params

SCRIPT = Path(__file__).with_name("run_fit.py")


def run_joined(folder, steps):
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
        command = [sys.executable, str(SCRIPT), str(folder), "--devices", "4", "--steps", str(steps)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, text=True, env=environment, **pipes))
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return errors


def test_two_processes_equal_one(tmp_path):
    run_joined(tmp_path / "two", steps=5)
    first, second = run_joined(tmp_path / "two", steps=10)
    alone = fit(
        **parts(60),
        steps=10,
        mesh=make_mesh(fsdp=2),
        rules=RULES,
        folder=tmp_path / "one",
        key=jax.random.key(0),
    )
    joined = read_params(tmp_path / "two")
    for ours, theirs in zip(jax.tree.leaves(alone.params), jax.tree.leaves(joined), strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)
    assert "resuming at step 5" in first
    assert "resuming" not in second
