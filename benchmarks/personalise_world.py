"""Does personalisation on ONE picture bring images nearer to its domain, and is the step well chosen?

    python benchmarks/personalise_world.py --out benchmarks/results/personalise-world.json

For each domain of the street world and each of its target pictures, runs a personalisation with probes. Its images
before and after are measured against held pictures of the same domain: CMMD with the small CLIP (unbiased, so that 0 is
what two samples of one distribution have), and the share of the prompted classes that a classifier finds, which is
fitted to real pictures of all domains. The step that the label-free curves choose stands beside the best in hindsight:
that of least CMMD among those that keep the coverage. `named` is the untouched model that is told the domain in words:
what it can do of that domain at all, and how much of the classes the domain itself hides.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from sides.record import record, write_record

from fmda.config import from_dict, merge, read_yaml
from fmda.diffusion.load import load_stable_diffusion
from fmda.diffusion.manifest import Manifest
from fmda.evaluate.quality import cmmd
from fmda.methods.datum import personalise
from fmda.methods.datum.settings import Config
from fmda.methods.datum.stop import probe_config, read_images
from fmda.methods.generate import PromptConfig, draw_images
from fmda.methods.judges import embed
from fmda.methods.pretrain.crops import TAGS
from fmda.methods.pretrain.diffusion_check import Images, Probe, Windows, cut_windows, described
from fmda.methods.pretrain.latent_diffusion import Padded
from fmda.methods.pretrain.latents import WindowConfig, caption_maker
from fmda.methods.render import RenderConfig, write_world
from fmda.runs.stages import run_stages
from fmda.weights.files import read_json
from fmda.weights.load import load_clip
from fmda.weights.network import Loaded

WORDS = {"night": "at night", "fog": "in fog", "dusk": "at dusk", "rain": "in the rain", "snow": "in snow"}
"""What the untouched model is told of a domain."""


def windows(clip: Loaded, roots: Sequence[Path], side: int, count: int) -> Windows:
    """Returns windows of rendered pictures with what they show."""
    assert clip.tokenizer is not None
    config = WindowConfig(size=side)
    captions = caption_maker(config, Padded(clip.tokenizer, clip.config.text.context))
    return cut_windows(config, captions, [str(root) for root in roots], count, seed=3)


def coverage(clip: Loaded, probe: Probe, folder: Path, images: Images) -> tuple[float, float]:
    """Returns the share of images in which a class is found, mean over the classes: where it was prompted, and not.

    The second tells what the classifier would find without any help of the prompt.
    """
    asked = np.array([picture.class_name for picture in Manifest.read(folder).pictures])
    found = probe(described(clip, images))
    names = list(dict.fromkeys(asked.tolist()))
    there, elsewhere = (
        np.mean([found[(asked == name) == wanted, TAGS.index(name)].mean() for name in names])
        for wanted in (True, False)
    )
    return float(there), float(elsewhere)


def judged(folder: Path, held: np.ndarray, clip: Loaded, probe: Probe) -> dict[str, float]:
    """Returns CMMD of a folder's images to held pictures and the coverage of their classes, prompted and not."""
    images = read_images(Manifest.read(folder))
    there, elsewhere = coverage(clip, probe, folder, images)
    distance = cmmd(held, embed(clip, images))
    return {"cmmd": round(distance, 4), "coverage": round(there, 4), "coverage_unprompted": round(elsewhere, 4)}


def measured(config: Config, work: Path, held: np.ndarray, clip: Loaded, probe: Probe) -> dict[str, Any]:
    """Runs one personalisation; returns its curves against held pictures, the chosen step and the best."""
    done = run_stages(personalise.stages(config), work, config)
    rows = [{"step": step, **judged(done["probe"] / str(step), held, clip, probe)} for step in config.probed_steps]
    chosen = read_json(done["choose"] / "choice.json")
    kept = [row for row in rows if row["coverage"] >= config.probe.floor * rows[0]["coverage"]]
    after = next(row for row in rows if row["step"] == chosen["step"])
    best = min(kept, key=lambda row: row["cmmd"])
    return {
        "chosen": after["step"],
        "hindsight": best["step"],
        "cmmd_before": rows[0]["cmmd"],
        "cmmd_after": after["cmmd"],
        "cmmd_hindsight": best["cmmd"],
        "coverage_before": rows[0]["coverage"],
        "coverage_after": after["coverage"],
        "unprompted_before": rows[0]["coverage_unprompted"],
        "unprompted_after": after["coverage_unprompted"],
        "coverage_kept": round(after["coverage"] / max(rows[0]["coverage"], 1e-9), 4),
        "reason": chosen["reason"],
        "steps": rows,
    }


def named(config: Config, work: Path, words: str, held: np.ndarray, clip: Loaded, probe: Probe) -> dict[str, float]:
    """Returns what `judged` says of the untouched model whose prompts name the domain."""
    assert config.probe is not None
    drawing = probe_config(config.probe, config.token, config.precision, None)
    prompts = PromptConfig(form=f"a photo of {{classes}} {words}")
    draw_images(replace(drawing, model=config.model, prompts=prompts), load_stable_diffusion(config.model), work)
    return judged(work, held, clip, probe)


def means(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns the means over the target pictures of each domain."""
    found = {}
    for domain in dict.fromkeys(row["domain"] for row in rows):
        own = [row for row in rows if row["domain"] == domain]
        values = {
            name: float(np.mean([row[name] for row in own])) for name in own[0] if isinstance(own[0][name], float)
        }
        found[domain] = {name: round(value, 4) for name, value in values.items()}
        found[domain]["ratio"] = round(values["cmmd_after"] / values["cmmd_before"], 4)
    return found


def main() -> None:
    """Runs every target of every domain, prints a line for each and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/datum/personalise-street.yaml"))
    parser.add_argument("--model", default="street-diffusion")
    parser.add_argument("--domains", nargs="+", default=["night", "fog"], choices=list(WORDS))
    parser.add_argument("--targets", type=int, default=3, help="target pictures of a domain")
    parser.add_argument("--held", type=int, default=200, help="held pictures of a domain, one window of each")
    parser.add_argument("--count", type=int, default=100, help="images of each step")
    parser.add_argument("--clip", default="street-clip")
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="personalise-world-"))
    every = ("photo", "styles", "game", "night", "fog", "dusk", "rain", "snow")
    known = write_world(RenderConfig(dict.fromkeys(every, 100), seed=21), work / "known")
    targets = write_world(RenderConfig(dict.fromkeys(options.domains, options.targets), seed=22), work / "targets")
    held = write_world(RenderConfig(dict.fromkeys(options.domains, options.held), seed=23), work / "held")
    values = merge(read_yaml(options.config), {"model": options.model, "probe": {"count": options.count}})
    values.pop("kind")
    side = values["crop"]
    clip = load_clip(options.clip)
    seen = windows(clip, known, side, 1600)
    probe = Probe.fit(described(clip, seen.images), seen.present)
    rows, told = [], {}
    for domain, target, root in zip(options.domains, targets, held, strict=True):
        real = embed(clip, windows(clip, [root], side, options.held).images)
        floor = cmmd(real, embed(clip, windows(clip, [known[every.index(domain)]], side, 100).images))
        for number, picture in enumerate(sorted((target / "images").iterdir())):
            config = from_dict(Config, values | {"image": str(picture)})
            row = {"domain": domain, "target": number, "cmmd_floor": round(floor, 4)}
            row |= measured(config, work / f"{domain}-{number}", real, clip, probe)
            print(
                f"{domain:8} {number}  CMMD {row['cmmd_before']:.3f} -> {row['cmmd_after']:.3f} at step {row['chosen']}"
                f" (best {row['cmmd_hindsight']:.3f} at {row['hindsight']}), coverage kept {row['coverage_kept']:.0%}",
                flush=True,
            )
            rows.append(row)
        told[domain] = named(config, work / f"{domain}-named", WORDS[domain], real, clip, probe)
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("work", "out")}
    write_record(record("personalise-world", settings=settings, means=means(rows), named=told, rows=rows), options.out)


if __name__ == "__main__":
    main()
