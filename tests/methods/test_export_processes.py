"""A trainer run by two joined processes ends with an export, written once, that loads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import meeting
import pytest
import small_place

from fmda.weights.files import read_arrays

TRAINING = "steps: 2\nbatch: 2\ndata: [scenes]\nlog_every: 1\n"
WARM = TRAINING + "optim: {warmup_steps: 0, learning_rate: 0.001}\n"
CONFIGS = {
    "clip": small_place.CLIP.replace("steps: 4", "steps: 2"),
    "dino": "kind: dino\nmodel: {width: 16, layers: 1, heads: 2, mlp_width: 32}\n"
    "head: {hidden: 16, bottleneck: 8, prototypes: 16}\nviews: {size: 16, local_size: 8, locals: 1}\n" + WARM,
    "dinoiser": "kind: dinoiser\nsize: 32\nchannels: 8\nclip: street-clip\nteacher: street-dino\n" + TRAINING,
}
FILES = {
    "clip": "model.safetensors",
    "dino": "model.safetensors",
    "dinoiser": "dinoiser.safetensors",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_two_processes_export_once(kind, tmp_path):
    small_place.draw_scenes(tmp_path / "scenes", 4)
    (tmp_path / "run.yaml").write_text(CONFIGS[kind])
    joined = {"FMDA_COORDINATOR": f"localhost:{meeting.free_port()}", "FMDA_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    environment = os.environ | joined | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "fmda", "run", "run.yaml", "work_dir=work", "--processes"]
    processes = [
        subprocess.Popen(command, cwd=tmp_path, env=environment | {"FMDA_PROCESS": number}, stderr=subprocess.PIPE)
        for number in "01"
    ]
    errors = [process.communicate(timeout=400)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    count = sum(array.size for array in read_arrays(tmp_path / "work/export" / FILES[kind]).values())
    assert json.loads((tmp_path / "work/export/stage.json").read_text())["outputs"]["parameters"] == count
    assert not list((tmp_path / "work").rglob("*.part"))
