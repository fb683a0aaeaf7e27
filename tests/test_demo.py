"""`fmda demo`, the whole system through its command, on few images and steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FEW = """
runs.unlabelled.domains.night=1 runs.unlabelled.domains.fog=1 runs.held.domains.night=1 runs.held.domains.fog=1
runs.maskclip-camvid.data.limit=1 runs.maskclip-camvid.unlabelled.images=1
runs.personalise-night.bank=4 runs.personalise-night.steps=2 runs.personalise-night.snapshots=[1,2]
runs.personalise-night.probe.count=4 runs.personalise-night.probe.batch=4 runs.personalise-night.probe.sample.steps=2
runs.generate-night.count=2 runs.generate-night.batch=2 runs.generate-night.sample.steps=2
runs.streets.domains.game=2 runs.streets.domains.night=1 runs.source-only.batch=1 runs.datum.batch=1
runs.source-only.steps=1 runs.datum.steps=1 runs.source-only.optim.warmup_steps=0 runs.datum.optim.warmup_steps=0
runs.source-only.crop=64 runs.datum.crop=64
runs.prompts.count=2 runs.imagined.count=2 runs.imagined.batch=2 runs.imagined.sample.steps=2
runs.warm-up.steps=1 runs.clouds.steps=1 runs.warm-up.batch=2 runs.clouds.batch=2 runs.clouds.figures=1
""".split()


def demo(folder: Path) -> tuple[list[str], str]:
    """Runs the command on one device, as on a user's machine; returns the lines of stdout, and stderr."""
    environment = os.environ | {"FMDA_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "fmda", "demo", "--work-dir", "run", *FEW]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


@pytest.mark.slow
def test_the_demo_ends_with_a_report_of_every_run_and_a_second_call_does_nothing_again(tmp_path):
    lines, log = demo(tmp_path)
    report = Path(lines[-1])
    assert report == tmp_path / "run/report/report.html"
    page = report.read_text(encoding="utf-8")
    for host in ("maskclip", "naclip", "clip-dinoiser"):
        # one score for each domain in the summary on stdout; columns of host and FLOSS on the page
        assert sum(line.split()[0] == host for line in lines) >= 2, lines
        assert f"{host} + FLOSS" in page
    assert len(list((tmp_path / "run/generate-night").rglob("im_*.png"))) == 2
    assert len(list((tmp_path / "run/imagined").rglob("im_*.png"))) == 2
    assert "compiling the training step" in log
    assert "clouds" in page and "image, map of the teacher, prompts, masks" in page
    assert "improved" in page and any("refined-night/improved: covered" in line for line in lines)

    again, log = demo(tmp_path)
    assert again == lines
    assert "compiling" not in log and "rank templates" not in log
