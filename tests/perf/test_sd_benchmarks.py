import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.parity]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("name", "options", "rows"),
    [
        ("sd_vae", ["--batch", "1"], [{"direction": "encode", "batch": 1}, {"direction": "decode", "batch": 1}]),
        ("sd_unet_step", [], [{"batch": 1}]),
        ("sd_sampling", ["--sampler", "plms", "--window", "2"], [{"sampler": "plms", "batch": 1}]),
    ],
)
def test_both_sides_run_and_agree(tmp_path, name, options, rows):
    out = tmp_path / "record.json"
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--tiny", "--small", "--peers", "eager"]
    ended = subprocess.run(
        [*command, "--repeats", "2", *options, "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(out.read_text())
    assert found == json.loads(ended.stdout)
    assert found["complete"] and found["versions"]["diffusers"]
    assert [{key: row[key] for key in head} for row, head in zip(found["results"], rows, strict=True)] == rows
    for row in found["results"]:
        for side in ("ours", "eager"):
            assert row[side]["median_s"] > 0 and row[side]["latency_s"] > 0, row[side]
            assert row[side]["calls"] == row[side]["window"] == 2
        assert row["difference_eager"] and all(
            pair["rms"] < row["agree_within"] == 1e-2 for pair in row["difference_eager"].values()
        )
        # other work on the machine is a reason to withhold it
        assert (row["ratio_eager"] is None) == bool(row["ratio_eager_withheld"])
        assert "differ" not in (row["ratio_eager_withheld"] or "")
