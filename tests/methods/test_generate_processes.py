"""Two processes joined by jax.distributed draw the same folder as one."""

import os
import subprocess
import sys

import meeting
import pytest
import small_diffusion

SET = """kind: generate
model: model
prompts: {form: "a {class}", classes: [car, bus, train]}
count: 7
batch: 2
sample: {sampler: ddim, steps: 2, guidance: 2.0}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("processes")
    small_diffusion.stable_diffusion(place / "model")
    (place / "set.yaml").write_text(SET)
    return place


def run(place, work, processes, options=()):
    """Returns exit codes and messages of `fmda run` by so many processes of two devices; `options` are of the first."""
    port = meeting.free_port()
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if processes > 1:
        environment |= {"FMDA_COORDINATOR": f"localhost:{port}", "FMDA_PROCESSES": str(processes)}
    command = [sys.executable, "-m", "fmda", "run", "set.yaml", f"work_dir={work}"]
    running = []
    for number in range(processes):
        whole = [*command, *(() if number else options), "--processes"]
        variables = environment | {"FMDA_PROCESS": str(number)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running.append(subprocess.Popen(whole, cwd=place, env=variables, text=True, **pipes))
    messages = [process.communicate(timeout=300)[1] for process in running]
    return [process.returncode for process in running], messages


def contents(folder):
    names = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "stage.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


@pytest.mark.slow
def test_two_processes_equal_one(place):
    codes, messages = run(place, "one", 1)
    assert codes == [0], messages
    codes, messages = run(place, "two", 2)
    assert codes == [0, 0], messages
    one, two = (contents(place / work / "images") for work in ("one", "two"))
    assert len([name for name in one if name.startswith("images/")]) == 7
    assert one == two


@pytest.mark.slow
def test_a_fault_of_one_process_ends_all_and_is_told(place):
    codes, messages = run(place, "fault", 2, ["device_memory=0.00001"])
    assert codes[0] == 2 and codes[1] != 0
    assert messages[0].strip().splitlines()[-1].startswith("fmda: batch: 2 needs about")
