"""One process for each side of a benchmark: options, start, clock, comparison, and a record that survives a kill."""

import argparse
import contextlib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from sides.networks import MODES, torch_build
from sides.record import record, write_record
from sides.timing import Timing, measure, measured_peak
from sides.usage import run_measured

from fmda.atomic import write_atomic
from fmda.errors import UserError
from fmda.perf import device_memory, peak_flops

PEERS = ("eager", *MODES)
BATCHES = 4
"""Different inputs, taken in turn."""
SHOWN = 4096
"""Values of the first result that are compared, evenly taken."""
LATENCIES = 3
"""Calls that are waited for one by one."""
QUIET = 0.15  # share of the cores that other processes may take
STEADY = 0.15  # quartile distance over median
SPARE = 2e9  # bytes of the host to be left over
AGREE = {"float32": 1e-2, "bfloat16": 1e-1}
"""Largest root-mean-square difference over the peer's root mean square; float32 has TensorFloat-32 products on GPUs."""

Launch = Callable[[int], Any]
"""Starts call number i; may return before it is done."""


def arguments(about: str, *, latent: bool = True) -> argparse.ArgumentParser:
    """Returns a parser with what all these benchmarks take; without `latent` no side of latents."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", help="a sweep")
    if latent:
        parser.add_argument("--latent", type=int, help="side of the latents: pixels / 8")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, help="windows that are timed")
    parser.add_argument("--window", type=int, help="calls that are started before they are waited for")
    parser.add_argument("--warmup", type=int, help="calls that do not count, at least 1")
    parser.add_argument("--peers", nargs="*", choices=PEERS)
    parser.add_argument("--side-timeout", type=float, help="seconds after which a side is given up")
    parser.add_argument("--small", action="store_true", help="small pictures, float32, few calls; always on a CPU")
    parser.add_argument("--tiny", action="store_true", help="a very small network, to try the script")
    parser.add_argument("--out")
    # what `run_side` gives to a process of one side: a file with all options
    parser.add_argument("--side", help=argparse.SUPPRESS)
    return parser


def parsed(parser: argparse.ArgumentParser, small: dict[str, Any], full: dict[str, Any]) -> argparse.Namespace:
    """Returns the options; for what was not given, `small` values on a CPU or where asked for, else `full` ones.

    `options.side` is the side that this process is to run, None in the process that starts the others, whose backend
    `options.backend` is.
    """
    options = parser.parse_args()
    if options.side is not None:
        return argparse.Namespace(**json.loads(Path(options.side).read_text(encoding="utf-8")))
    options.backend = jax.default_backend()
    few = {"side_timeout": None, "latent": 16, "dtype": "float32", "peers": ["eager"], "warmup": 1}
    many = {"side_timeout": 480, "latent": 64, "dtype": "bfloat16", "peers": ["eager", "compiled"]}
    for name, value in (few | small if options.small or options.backend == "cpu" else many | full).items():
        if getattr(options, name, 0) is None:
            setattr(options, name, value)
    if min(options.repeats, options.window, options.warmup) < 1:
        parser.error("--repeats, --window and --warmup are at least 1")
    return options


def busy_seconds() -> float | None:
    """Returns the seconds that all cores together have worked since the machine started; None where it is not told."""
    try:
        first = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()
    except OSError:
        return None
    user, nice, system, _, _, interrupt, soft, stolen = (int(word) for word in first[1:9])
    return (user + nice + system + interrupt + soft + stolen) / os.sysconf("SC_CLK_TCK")


def timed(launch: Launch, wait: Callable[[Any], Any], options: argparse.Namespace) -> dict[str, Any]:
    """Returns the seconds of a call among others, of one that is waited for, of launching, and the load of others.

    A window starts `options.window` calls and waits for the last, so that the host prepares one while the device does
    another, as in training; devices take calls in order. `wait` is given what the last launch returned, as earlier
    results may be donated to it.
    """
    launches: list[float] = []

    def start() -> Any:
        begin = time.perf_counter()
        out = launch(len(launches))
        launches.append(time.perf_counter() - begin)
        return out

    def call() -> None:
        wait(start())

    def window() -> None:
        for _ in range(options.window - 1):
            start()
        wait(start())

    begin = time.perf_counter()
    call()
    first = time.perf_counter() - begin
    for _ in range(options.warmup - 1):
        call()
    single = None if options.window == 1 else measure(call, repeats=min(LATENCIES, options.repeats), warmup=0)
    clock, own, busy = time.perf_counter(), time.process_time(), busy_seconds()
    seconds = measure(window, repeats=options.repeats, warmup=0).seconds
    wall, used = time.perf_counter() - clock, time.process_time() - own
    after, calls = busy_seconds(), options.repeats * options.window
    timing = Timing(tuple(value / options.window for value in seconds))
    return timing.to_json() | {
        "window": options.window,
        "latency_s": (single or timing).median,
        "launch_s": float(np.median(launches[-calls:])),
        "first_call_s": first,
        "cpu_s": used / calls,
        "cores_of_others": None if busy is None or after is None else max(0.0, after - busy - used) / wall,
    }


def run_side(script: str, side: str, options: argparse.Namespace, **changed: Any) -> dict[str, Any]:
    """Returns what a side answers in a new process, under the options but for `changed`, or {"failed": why}.

    "peak_bytes" is that of the device where it tells, else of the process.
    """
    # in the peer's process jax only shapes the weights and draws the noise
    env = {"JAX_PLATFORMS": "cpu"}
    if side == "ours":
        # torch takes as much of the device as it wants
        share = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
        env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": share}
    with tempfile.TemporaryDirectory() as folder:
        told, path = Path(folder) / "options.json", Path(folder) / "answer.json"
        told.write_text(json.dumps(vars(options) | changed | {"side": side, "answer": str(path)}), encoding="utf-8")
        command = [sys.executable, script, "--side", str(told)]
        try:
            used = run_measured(command, env=os.environ | env, timeout=options.side_timeout)
        except subprocess.TimeoutExpired:
            return {"failed": f"timeout after {options.side_timeout:g} s"}
        if not path.exists():
            return {"failed": f"the process ended with {used.returncode}"}
        found = json.loads(path.read_text(encoding="utf-8"))
    if "failed" in found:
        return found
    return {"peak_bytes": used.peak_bytes} | found | {"process_peak_bytes": used.peak_bytes, "process_s": used.seconds}


def answer(options: argparse.Namespace, side: Callable[[argparse.Namespace], dict[str, Any]]) -> None:
    """Runs this process's side and writes what it found, with the device's peak memory where it is told, or why not."""
    try:
        values = side(options)
        if options.side == "ours":
            peak = device_memory().get("peak")
        else:
            import torch

            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None
            values |= {"torch": torch_build()}
        values |= {} if peak is None else {"peak_bytes": peak}
    except UserError as error:
        values = {"failed": str(error)}
    except Exception as error:
        # one side without memory must not end the other sides and rows
        traceback.print_exc()
        values = {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    write_atomic(Path(options.answer), json.dumps(values))


def difference(ours: dict[str, list[float]], peer: dict[str, list[float]]) -> dict[str, dict[str, float | None]]:
    """Returns by name the root-mean-square difference over the peer's root mean square, and the largest over largest.

    None where a value is not finite.
    """
    found = {}
    for name, values in peer.items():
        a, b = np.array(ours[name]), np.array(values)
        pair = {
            "rms": math.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)),
            "largest": float(np.abs(a - b).max() / np.abs(b).max()),
        }
        found[name] = {kind: value if math.isfinite(value) else None for kind, value in pair.items()}
    return found


def compared(sides: dict[str, dict[str, Any]], images: int, flops: float, dtype: str, within: float) -> dict[str, Any]:
    """Returns a row of the record: rates of all sides, and the peers' times over ours where they mean something."""
    peak, cores = peak_flops(dtype=dtype), len(os.sched_getaffinity(0))
    row: dict[str, Any] = {"flops": flops, "agree_within": within}
    for name, side in sides.items():
        row[name] = {key: value for key, value in side.items() if key != "found"}
        if "failed" not in side:
            rate = flops / side["median_s"]
            row[name] |= {"images_per_second": images / side["median_s"], "tflops_per_second": rate / 1e12}
            row[name] |= {"mfu": rate / peak if peak else None}
    for name in [name for name in sides if name != "ours"]:
        faults = [f"{side} failed" for side in ("ours", name) if "failed" in sides[side]]
        if not faults:
            apart = difference(sides["ours"]["found"], sides[name]["found"])
            others = max(sides[side]["cores_of_others"] or 0.0 for side in ("ours", name))
            spread = max(sides[side]["spread"] for side in ("ours", name))
            row |= {f"difference_{name}": apart, f"spread_{name}": spread}
            faults += [f"{others:.1f} cores busy with other work"] if others > QUIET * cores else []
            faults += [f"spread {spread:.2f}"] if spread > STEADY else []
            near = [pair["rms"] is not None and pair["rms"] < within for pair in apart.values()]
            faults += [] if all(near) else ["results differ"]
        row[f"ratio_{name}"] = None if faults else sides[name]["median_s"] / sides["ours"]["median_s"]
        row[f"ratio_{name}_withheld"] = ", ".join(faults) or None
    return row


def sweep(
    name: str,
    script: str,
    cases: Iterable[tuple[dict[str, Any], float]],
    options: argparse.Namespace,
    agree: Mapping[str, float] = AGREE,
    *,
    model: str | None = None,
    peer: str = "diffusers and transformers, torch, scaled_dot_product_attention, channels last",
    **values: Any,
) -> None:
    """Runs all sides of all cases and prints the record; `--out` holds it after every side, whole.

    Args:
        name: the benchmark.
        script: its file.
        cases: what each row is about, {"batch": images, option: value}, and its FLOPs.
        options: the options; what a case sets is a list there.
        agree: by type, how far results may be apart.
        model: what is measured; None names Stable Diffusion.
        peer: what the others are.
        values: what else to record.
    """
    # no data sheet, so no MFU: what a matrix product of jax reaches here
    stand_in = None if peak_flops(dtype=options.dtype) else measured_peak(options.dtype)
    rows: list[dict[str, Any]] = []

    def so_far(complete: bool) -> dict[str, Any]:
        return record(
            name,
            model=model or ("tiny" if options.tiny else "Stable Diffusion 1.4, full size"),
            dtype=options.dtype,
            **values,
            peer=f"{peer}; " + "; ".join(f"{side}: torch.compile, mode {mode}" for side, mode in MODES.items()),
            matmul_flops_per_second=stand_in,
            complete=complete,
            results=rows,
        )

    for case, flops in cases:
        rows.append({})
        sides: dict[str, dict[str, Any]] = {}
        for side in ("ours", *options.peers):
            one = {option: [value] for option, value in case.items()}
            found = sides[side] = run_side(script, side, options, **one)
            rows[-1] = case | compared(sides, case["batch"], flops, options.dtype, agree[options.dtype])
            # stdout is for the record at the end
            said = f"failed: {found['failed']}" if "failed" in found else f"{found['median_s']:.4g} s"
            print(*(f"{key} {value}" for key, value in case.items()), side, said, file=sys.stderr, flush=True)
            with contextlib.redirect_stdout(io.StringIO()):
                write_record(so_far(complete=False), options.out)
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    write_record(so_far(complete=True), options.out)


def check_memory(need: float) -> None:
    """Raises UserError where the host's free memory is short of `need` bytes; nothing must be pushed out of memory."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    if need + SPARE > free:
        raise UserError(
            f"memory: a process needs {need / 1e9:.1f} GB and should leave {SPARE / 1e9:.0f}, but {free / 1e9:.1f} are "
            "free; wait, or take a machine with more (a training step: --optimizer none)"
        )


def shown(values: Any) -> list[float]:
    """Returns some of an array's values, evenly taken."""
    flat = np.asarray(values, np.float32).reshape(-1)
    return flat[:: max(1, flat.size // SHOWN)].tolist()
