"""Two processes score a dataset together and get the scores of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import meeting
import pytest
from run_scoring import scores

from fmda.mesh import make_mesh

SCRIPT = Path(__file__).with_name("run_scoring.py")


def test_two_processes_get_the_scores_of_one():
    port = meeting.free_port()
    processes = []
    for number in range(2):
        environment = {
            **os.environ,
            "PYTHONPATH": str(SCRIPT.parents[2]),
            "FMDA_COORDINATOR": f"localhost:{port}",
            "FMDA_PROCESSES": "2",
            "FMDA_PROCESS": str(number),
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen([sys.executable, str(SCRIPT)], text=True, env=environment, **pipes))
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    # the processes' connection prints to stdout too, at any moment
    lines = ([line for line in out.splitlines() if not line.startswith("[Gloo]")] for out, _ in outputs)
    first, second = (json.loads(line[-1]) for line in lines)
    confusion, label_free = scores(make_mesh(devices=jax.devices()[:1]))
    assert first == second and first[0] == confusion
    assert first[1] == pytest.approx(label_free, rel=1e-12)
