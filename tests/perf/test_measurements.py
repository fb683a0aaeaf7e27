import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from sides.record import record, write_record
from sides.timing import Timing, alternate, measure, measured_peak
from sides.usage import run_measured

from fmda.errors import UserError
from fmda.perf import (
    compiled_memory,
    device_memory,
    peak_flops,
)


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 181),
        ("NVIDIA L4", 121),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_data_sheets(kind, teraflops):
    assert peak_flops(kind) == teraflops * 1e12


def test_unknown_device_has_no_peak_but_can_be_measured():
    assert peak_flops() is None
    assert peak_flops("NVIDIA H200", "float32") == 495e12
    assert 1e7 < measured_peak(size=64, repeats=10) < 1e14


def test_timing_leaves_out_warm_up_and_takes_turns():
    order = []
    ticks = iter(range(100))
    calls = {"ours": lambda: order.append("ours"), "peer": lambda: order.append("peer")}
    found = alternate(calls, repeats=2, warmup=1, clock=lambda: float(next(ticks)))
    assert order == ["ours", "peer", "ours", "peer", "peer", "ours"]
    assert found["ours"].seconds == (1.0, 1.0)


def test_measure_waits_for_the_result():
    timing = measure(jax.jit(lambda x: x @ x), jnp.ones((8, 8)), repeats=3, note="ones")
    assert len(timing.seconds) == 3
    assert timing.to_json()["note"] == "ones"
    with pytest.raises(ValueError, match="at least 1"):
        measure(lambda: None, repeats=0)


def test_median_and_spread_by_hand():
    timing = Timing((1.0, 2.0, 3.0, 4.0, 100.0))
    assert timing.median == 3.0
    assert timing.spread == pytest.approx((4.0 - 2.0) / 3.0)


def test_peak_memory_of_a_process_is_seen():
    code = "import sys; x = bytearray(b'x') * 80_000_000; sys.exit(3)"
    usage = run_measured([sys.executable, "-c", code])
    assert usage.returncode == 3
    assert 80e6 < usage.peak_bytes < 120e6  # not this process's own, which is larger
    assert usage.seconds > 0


def test_a_timeout_kills_all_that_the_command_started(tmp_path):
    told = tmp_path / "child"
    code = """
import os, sys, time
child = os.fork()
if child:
    open(sys.argv[1], "w").write(str(child))
else:
    os.setsid()  # out of reach of a signal to the parent's group or session
time.sleep(600)
"""
    with pytest.raises(subprocess.TimeoutExpired, match="timed out after 10 seconds"):
        run_measured([sys.executable, "-I", "-S", "-c", code, str(told)], timeout=10)
    stat = Path(f"/proc/{told.read_text()}/stat")
    # what has ended stays listed until its new parent asks for it
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX"


def test_a_command_within_its_time_is_as_without():
    assert run_measured([sys.executable, "-I", "-S", "-c", "raise SystemExit(4)"], timeout=60).returncode == 4


def test_compiled_memory_counts_arguments_outputs_and_donation():
    x = jnp.ones((256, 256))
    plain = compiled_memory(jax.jit(lambda x: x + 1).lower(x).compile())
    assert plain["arguments"] == plain["outputs"] == 256 * 256 * 4
    donated = compiled_memory(jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile())
    assert plain["total"] - donated["total"] == 256 * 256 * 4


def test_device_memory_has_known_keys_only():
    assert set(device_memory()) <= {"in_use", "peak", "limit"}


def test_record_is_plain_json_with_device_and_versions(tmp_path, capsys):
    values = record("x", ours={"median_s": 1.0})
    write_record(values, tmp_path / "deep" / "x.json")
    assert json.loads((tmp_path / "deep" / "x.json").read_text()) == values == json.loads(capsys.readouterr().out)
    assert values["device"].startswith("cpu: ")
    assert values["versions"]["jax"] == jax.__version__
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_record(values, tmp_path / "file" / "x.json")
