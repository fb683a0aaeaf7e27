"""Trains one embedded model within a time limit, on scenes drawn into memory, measures it, and exports it in shards.

    python benchmarks/assets.py street-diffusion --seconds 270 --export street-diffusion --out record.json

The configuration is the committed one of `configs/pretrain/`, with scenes that this device draws in place of folders
and training that stops by the clock. What the seconds do not leave for training goes to compilation, drawing, the
check of quality and the export. The record holds steps, throughput and the scores of the check; an asset enters the
package when they are better than those beside the asset it replaces.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.numpy import load_file, save_file
from sides.record import record, write_record

from fmda.errors import UserError
from fmda.methods.kinds import open_run
from fmda.world.names import DOMAINS

CONFIGS = Path(__file__).parent.parent / "configs" / "pretrain"
SHARD = 15 * 2**20
"""Bytes of a shard: below 16 MiB with its header."""
TRAIN = {"photo": 1600, "styles": 1600, "game": 600, "night": 600, "fog": 600, "dusk": 600, "rain": 600, "snow": 600}
HELD = 12
"""Images of each domain for the check."""
QUALITY = ("quality.json", "zero-shot.json")
"""What a check writes."""
LEAST = 5.0
"""Seconds of training below which nothing is learned."""

MODELS: dict[str, tuple[float, dict[str, Any], list[str]]] = {
    "street-diffusion": (
        150.0,
        {"batch": 128, "model": "{channels: [96, 192, 288], heads: [3, 6, 9], attention: [true, true, true]}"},
        ["vae=street-diffusion", "optim.learning_rate=6.0e-4"],
    ),
    "street-clip": (90.0, {"batch": 512}, []),
}
"""Seconds that are not training, settings at full size, and settings at any size."""
TINY: dict[str, list[str]] = {
    "street-diffusion": [
        "model={channels: [8, 16, 16], heads: [1, 2, 2], attention: [true, true, true]}",
        "windows={size: 64, count: 1}",
        "batch=8", "check_images=16", "check_sample.steps=2",
    ],
    "street-clip": ["batch=16", "crops=8"],
}  # fmt: skip


def drawn(counts: dict[str, int], seed: int) -> str:
    """Returns the YAML list of domains drawn into memory."""
    return json.dumps([{"domain": name, "count": count, "seed": seed} for name, count in counts.items()])


def settings(name: str, seconds: float, tiny: bool) -> list[str]:
    """Returns the overrides of a run. Raises UserError where nothing would be left for training."""
    overhead, full, always = MODELS[name]
    left = 3.0 if tiny else seconds - overhead
    if left < (0 if tiny else LEAST):
        raise UserError(f"--seconds: {seconds:g} leave nothing for training; give {overhead + LEAST:.0f} or more")
    counts, held = ({"photo": 8, "night": 8}, {"photo": 4}) if tiny else (TRAIN, dict.fromkeys(DOMAINS, HELD))
    sizes = TINY[name] if tiny else [f"{key}={value}" for key, value in full.items()]
    clock = ["steps=1000000", f"minutes={left / 60:.3f}", "log_every=5", "save_minutes=60", "save_steps=1000000"]
    return [f"data={drawn(counts, 100)}", f"held={drawn(held, 7)}", *clock, *always, *sizes]


def export(source: Path, target: Path) -> list[str]:
    """Copies a model's folder, with weights above `SHARD` bytes in shards; returns the files."""
    shutil.rmtree(target, ignore_errors=True)
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".safetensors" or path.stat().st_size <= SHARD:
            shutil.copy(path, place)
            continue
        arrays = load_file(path)
        split = split_state_dict_into_shards_factory(
            arrays, get_storage_size=lambda array: array.nbytes, max_shard_size=SHARD,
            filename_pattern=f"{path.stem}{{suffix}}.safetensors",
        )  # fmt: skip
        for file, names in split.filename_to_tensors.items():
            save_file({name: arrays[name] for name in names}, place.parent / file, {"format": "pt"})
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        place.with_name(f"{path.name}.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return [str(path.relative_to(target)) for path in sorted(target.rglob("*")) if path.is_file()]


def main() -> None:
    """Runs the training and prints its record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--seconds", type=float, default=300.0, help="of the whole command")
    parser.add_argument("--tiny", action="store_true", help="a very small network on few scenes, to test the command")
    parser.add_argument("--export", type=Path, required=True, help="folder of the trained model, replaced")
    parser.add_argument("--out")
    options = parser.parse_args()
    overrides = settings(options.model, options.seconds, options.tiny)
    with tempfile.TemporaryDirectory() as work:
        run = open_run(CONFIGS / f"{options.model}.yaml", [*overrides, f"work_dir={work}/run"])
        stages = run.execute(print)
        lines = [json.loads(line) for line in (stages["train"] / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if "loss" in line][-1]
        (path,) = (stages["check"] / name for name in QUALITY if (stages["check"] / name).is_file())
        quality = json.loads(path.read_text())
        files = export(stages["export"], options.export)
    result = record(
        "assets",
        model=options.model,
        overrides=overrides,
        steps=last["step"],
        loss=last["loss"],
        images_per_second=last["time"]["examples_per_second"],
        mfu=last["time"].get("mfu"),
        quality=dict(scalars(quality)),
        files=files,
    )
    write_record(result, options.out)


def scalars(values: Any, prefix: str = "") -> list[tuple[str, float]]:
    """Returns the numbers in nested mappings by dotted name."""
    if isinstance(values, dict):
        return [pair for key, value in values.items() for pair in scalars(value, f"{prefix}{key}.")]
    return [(prefix[:-1], float(values))] if isinstance(values, int | float) else []


if __name__ == "__main__":
    main()
