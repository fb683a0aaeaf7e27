"""Runs of the command line in processes of their own, which a test may kill."""

import json
import os
import subprocess
import sys
from pathlib import Path


def launch(place, work, *options, **variables):
    """Returns the running `fmda run run.yaml`, its stderr in `<work>.log`; compiled programs are shared by all runs."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        **variables,
    }
    command = [sys.executable, "-m", "fmda", "run", "run.yaml", f"work_dir={work}", *options]
    with open(place / f"{work}{variables.get('FMDA_PROCESS', '')}.log", "a") as log:
        return subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.DEVNULL, stderr=log)


def finish(place, work, *options, **variables):
    """Runs to the end; returns the run folder."""
    code = launch(place, work, *options, **variables).wait(timeout=900)
    assert code == 0, (place / f"{work}.log").read_text()
    return place / work


def last_step(work):
    """Returns the last step in the metrics, 0 where there is none."""
    path = work / "train/metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def steps_and_losses(work):
    """Returns the lines of the metrics, without how long things took."""
    lines = [json.loads(line) for line in (work / "train/metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]
