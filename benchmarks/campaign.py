"""A prioritised list of accelerator runs that always fits its time limit.

    python benchmarks/campaign.py speed --minutes 8 --out campaign   # training steps, attention, sampling, CLIP, world
    python benchmarks/campaign.py assets --minutes 8 --out campaign  # train the embedded models, evaluate, export
    python benchmarks/campaign.py speed --tiny --out campaign        # the same list on very small networks, any CPU

Each item runs in a process of its own with a time limit of its own, the most important first. After each item
`campaign.json` holds the status, seconds and results of all items so far, and a line per result is printed: images/s,
TFLOP/s, MFU, peak memory, and the ratio to the peer. An item that reaches its limit is stopped with everything that it
started; its record keeps what was complete. An item that no longer fits is recorded as skipped.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmda.atomic import write_json

HERE = Path(__file__).parent
MARGIN = 5.0
"""Seconds kept for writing results at the end of the campaign."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """One run of a campaign.

    Attributes:
        name: of the item, and of its record `<name>.json`.
        command: arguments after the interpreter at full size; {out} is the campaign's folder, {seconds} the limit.
        tiny: the same for very small networks.
        seconds: limit at full size, compilation included.
        least: seconds below which the item is not worth starting.
        results: record -> rows with the keys of `LINE`.
    """

    name: str
    command: str
    tiny: str
    seconds: float
    least: float
    results: Callable[[Row], Iterable[Row]]


def sides(record: Row) -> Iterable[Row]:
    """Yields a row for each batch and side of an `sd_*.py` or `daformer_step.py` record."""
    for row in record["results"]:
        for side in ("ours", "eager", "compiled"):
            if side in row:
                values = row[side]
                yield {"what": f"{side}, batch {row['batch']}", "ratio": row.get(f"ratio_{side}"), **values}


def attention_forms(record: Row) -> Iterable[Row]:
    """Yields a row for each map and form of an `attention.py` record, with gradients."""
    for case in record["cases"]:
        for form, values in case["forms"].items():
            timing = values["with_gradients"]
            yield {
                "what": f"{form}, {case['side']}x{case['side']} places, heads of {case['head']}",
                "images_per_second": record["batch"] / timing["median_s"],
                "tflops_per_second": timing["flops_per_second"] / 1e12,
                "mfu": timing["mfu"],
                "peak_bytes": timing["temporary_bytes"],
                "ratio": case["with_gradients_ratio"].get(form),
            }


def dense_features(record: Row) -> Iterable[Row]:
    """Yields the row of a `clip_dense.py` record."""
    yield {
        "what": f"CLIP {record['model']}, batch {record['batch']}",
        "images_per_second": record["batch"] / record["ours"]["median_s"],
        "tflops_per_second": record["flops_per_second"] / 1e12,
        "mfu": record["mfu"],
        "ratio": record["ratio"],
    }


def rendered(record: Row) -> Iterable[Row]:
    """Yields the row of a `world_speed.py` record."""
    height, width = record["size"]
    yield {"what": f"street world, {height}x{width}", "images_per_second": record["images_per_second"]}


def trained(record: Row) -> Iterable[Row]:
    """Yields a row for each quality score of a trained asset, and its throughput."""
    yield {"what": f"{record['steps']} steps", **{name: record.get(name) for name in ("images_per_second", "mfu")}}
    for name, value in record["quality"].items():
        yield {"what": name, "value": value}


SD = "--batch 16 --dtype bfloat16 --latent 64"
SPEED = (
    Item(
        "sd-unet-step",
        f"sd_unet_step.py {SD} --peers compiled --repeats 4 --window 5 --warmup 2 --side-timeout 85",
        "sd_unet_step.py --tiny --repeats 2 --window 1 --side-timeout 60",
        175, 60, sides,
    ),
    Item(
        "daformer-step",
        "daformer_step.py --batch 2 --dtype bfloat16 --peers eager --repeats 4 --window 5 --warmup 2 --side-timeout 85",
        "daformer_step.py --tiny --batch 1 --repeats 2",
        175, 60, sides,
    ),
    Item(
        "attention",
        "attention.py --batch 16 --dtype bfloat16 --repeats 10",
        "attention.py --tiny --repeats 2",
        70, 30, attention_forms,
    ),
    Item(
        "sd-sampling",
        f"sd_sampling.py --sampler ddim {SD} --steps 50 --repeats 2 --warmup 1 --peers eager --side-timeout 60",
        "sd_sampling.py --sampler ddim --tiny --repeats 2 --side-timeout 60",
        125, 60, sides,
    ),
    Item(
        "clip-dense-b16",
        "clip_dense.py --batch 8 --dtype bfloat16 --repeats 20",
        "clip_dense.py --model tiny --side 32 --repeats 2",
        40, 20, dense_features,
    ),
    Item(
        "clip-dense-l14",
        "clip_dense.py --model L/14 --batch 16 --dtype bfloat16 --repeats 20",
        "clip_dense.py --model tiny --side 64 --repeats 2",
        45, 20, dense_features,
    ),
    Item(
        "world-speed",
        "world_speed.py --batch 32 --images 1024 --threads 1",
        "world_speed.py --height 32 --width 64 --batch 2 --images 16",
        30, 15, rendered,
    ),
)  # fmt: skip
ASSETS = (
    Item(
        "street-diffusion",
        "assets.py street-diffusion --seconds {seconds} --export {out}/street-diffusion",
        "assets.py street-diffusion --tiny --seconds {seconds} --export {out}/street-diffusion",
        270, 120, trained,
    ),
    Item(
        "street-clip",
        "assets.py street-clip --seconds {seconds} --export {out}/street-clip",
        "assets.py street-clip --tiny --seconds {seconds} --export {out}/street-clip",
        200, 90, trained,
    ),
)  # fmt: skip
LISTS = {"speed": SPEED, "assets": ASSETS}
LINE = (
    ("images_per_second", "{:.4g} images/s"),
    ("tflops_per_second", "{:.4g} TFLOP/s"),
    ("mfu", "MFU {:.1%}"),
    ("peak_bytes", "{:.3g} B peak"),
    ("ratio", "ratio {:.2f}"),
    ("value", "{:.4g}"),
    ("failed", "failed: {}"),
)


def run(items: Iterable[Item], seconds: float, folder: Path, tiny: bool) -> list[dict[str, Any]]:
    """Returns the outcome of every item; writes them to `campaign.json` after each."""
    end = time.monotonic() + seconds - MARGIN
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[dict[str, Any]] = []
    for item in items:
        left = end - time.monotonic()
        if left < (0 if tiny else item.least):
            outcomes.append({"name": item.name, "status": "skipped", "seconds": 0.0, "results": []})
        else:
            outcomes.append(execute(item, min(left, item.seconds), folder, tiny))
        outcome = outcomes[-1]
        print(f"{item.name}: {outcome['status']} after {outcome['seconds']:.0f} s", flush=True)
        for row in outcome["results"]:
            shown = [form.format(row[key]) for key, form in LINE if row.get(key) is not None]
            print(f"  {row['what']}: {', '.join(shown)}", flush=True)
        write_json(folder / "campaign.json", {"seconds": seconds, "tiny": tiny, "items": outcomes})
    return outcomes


def execute(item: Item, seconds: float, folder: Path, tiny: bool) -> dict[str, Any]:
    """Returns the outcome of one item: its status (done, stopped, failed), seconds, and the rows of its record."""
    path = folder / f"{item.name}.json"
    path.unlink(missing_ok=True)
    script, *arguments = (item.tiny if tiny else item.command).format(out=folder, seconds=f"{seconds:.0f}").split()
    begin = time.monotonic()
    with open(folder / f"{item.name}.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(HERE / script), *arguments, "--out", str(path)],
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = "done" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "stopped"
        finally:
            stop_group(process)
    used = time.monotonic() - begin
    rows = [dict(row) for row in item.results(json.loads(path.read_text()))] if path.is_file() else []
    return {"name": item.name, "status": status, "seconds": used, "results": [compact(row) for row in rows]}


def stop_group(process: subprocess.Popen) -> None:
    """Ends a process and everything in its process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def compact(row: Row) -> dict[str, Any]:
    """Returns what a campaign shows of a row; everything else stays in the item's own record."""
    return {"what": row["what"], **{key: row[key] for key, _ in LINE if row.get(key) is not None}}


def main() -> None:
    """Runs a campaign; the exit code is 1 when an item failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("list", choices=LISTS)
    parser.add_argument("--minutes", type=float, default=8.0, help="limit of the whole campaign")
    parser.add_argument("--out", type=Path, required=True, help="folder for records, logs and exports")
    parser.add_argument("--tiny", action="store_true", help="very small networks, to test the list on a CPU")
    parser.add_argument("--only", nargs="+", help="names of items")
    options = parser.parse_args()
    items = [item for item in LISTS[options.list] if not options.only or item.name in options.only]
    if not items:
        parser.error(f"--only: choose from {', '.join(item.name for item in LISTS[options.list])}")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out: {options.out} is a file; name a folder")
    outcomes = run(items, 60 * options.minutes, options.out, options.tiny)
    sys.exit(any(outcome["status"] == "failed" for outcome in outcomes))


if __name__ == "__main__":
    main()
