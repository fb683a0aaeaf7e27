"""Personalisations of a tiny model by the command line, for the tests of this folder.

They run in processes of their own, quickly compiled, and share their compiled programs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_diffusion as small
from PIL import Image

from fmda.config import from_dict, read_yaml
from fmda.methods.datum.settings import Config
from fmda.weights import files

SCRIPT = Path(__file__).with_name("personalise_waiting.py")
CONFIG = """kind: personalise
image: target.png
model: model
prompt: a sks road
resize: 20
crop: 16
steps: 6
batch: 8
optim: {learning_rate: 1.0e-3, eps: 1.0e-6}
snapshots: [1, 3, 6]
export: [0, 3, 6]
store: float32
log_every: 1
save_steps: 1
save_minutes: 60
"""


def make_place(place):
    """Fills a folder with a model, a picture and a configuration; all its paths are relative. Returns it."""
    small.stable_diffusion(place / "model")
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:24, :40]
    smooth = np.stack([rows * 8, columns * 5, 128 + 0 * rows], axis=-1) + rng.normal(0, 20, (24, 40, 3))
    Image.fromarray(np.clip(smooth, 0, 255).astype(np.uint8)).save(place / "target.png")
    (place / "run.yaml").write_text(CONFIG)
    return place


def launch(place, work, *options, devices=1, **variables):
    """Returns the running program; what it says on stderr is added to `<work>.log`."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(SCRIPT.parents[3]),
        **variables,
    }
    command = [sys.executable, str(SCRIPT), "run", "run.yaml", f"work_dir={work}", *options]
    with open(place / f"{work}{variables.get('FMDA_PROCESS', '')}.log", "a") as log:
        return subprocess.Popen(
            command, cwd=place, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )


def finish(place, work, *options, **settings):
    """Runs to the end; returns the run folder."""
    process = launch(place, work, *options, **settings)
    process.communicate(timeout=900)
    assert process.returncode == 0, (place / f"{work}.log").read_text()
    return place / work


def configured(place, **changes):
    """Returns the configuration with paths that hold everywhere."""
    values = read_yaml(place / "run.yaml") | {"image": str(place / "target.png"), "model": str(place / "model")}
    values.pop("kind")
    return from_dict(Config, values | changes)


def arrays(folder, part="unet"):
    name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    return files.read_arrays(folder / part / f"{name}.safetensors")


def metrics(work):
    """Returns the lines of the metrics, without how long things took."""
    lines = (work / "train/metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "time"} for line in lines]


def refused(capsys, *arguments):
    """Returns the one line with which `fmda run` ends, exit code 2."""
    from fmda.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["run", *map(str, arguments)])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    assert ended.value.code == 2 and len(lines) == 1, lines
    return lines[0]
