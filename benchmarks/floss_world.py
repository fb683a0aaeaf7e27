"""FLOSS against its host on held street-world domains and on real photographs: mIoU, mean over ranking samples.

    python benchmarks/floss_world.py --out benchmarks/results/floss-world.json

Draws the pictures, ranks templates on unlabelled ones (another sample each time), scores host and FLOSS on held ones.
CamVid is scored too where FMDA_DATA holds it. Labels serve the scores alone.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from fmda.config import from_dict
from fmda.data import open_dataset
from fmda.errors import UserError
from fmda.methods.floss import run as floss
from fmda.methods.pipeline import run_stages
from fmda.methods.render import RenderConfig, write_world
from fmda.perf.record import record, write_record

HOSTS: dict[str, dict[str, Any]] = {
    "maskclip": {"crop": 128, "stride": 64},
    "naclip": {"crop": 64, "stride": 32, "prompts": "plain"},
    "clip-dinoiser": {"crop": 128, "stride": 64},
}


def scores(config: dict[str, Any], work: Path) -> tuple[float, float]:
    """Returns mIoU (per cent) of host and of FLOSS."""
    filled = from_dict(floss.Config, config)
    folders = run_stages(floss.stages(filled), work, filled, lambda _: None)
    read = (json.loads((folders[name] / "stage.json").read_text())["outputs"]["miou"] for name in ("host", "floss"))
    host, fused = (100 * value if value <= 1 else value for value in read)
    return host, fused


def main() -> None:
    """Runs every host on every domain with every sample, prints a table and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", nargs="+", default=list(HOSTS), choices=list(HOSTS))
    parser.add_argument("--domains", nargs="+", default=["night", "fog", "rain", "snow"])
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--images", type=int, default=16, help="unlabelled pictures a ranking sees")
    parser.add_argument("--held", type=int, default=24, help="held pictures a domain is scored on")
    parser.add_argument("--clip", default="street-clip")
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--camvid", type=int, default=60, help="photographs of CamVid val to score; 0 leaves it out")
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="floss-world-"))
    write_world(RenderConfig(dict.fromkeys(options.domains, options.held), seed=2), work / "held")
    write_world(
        RenderConfig(dict.fromkeys(options.domains, options.images * options.samples), seed=1), work / "unlabelled"
    )
    rows = []
    for host in options.hosts:
        for domain in options.domains:
            base = {
                "clip": options.clip,
                "n": options.n,
                "host": {"name": host, "long_max": 256, "short_max": 128, **HOSTS[host]},
                "data": {"name": "world", "root": str(work / "held"), "split": domain},
            }
            found = [
                scores(
                    base
                    | {
                        "unlabelled": {
                            "name": "world", "root": str(work / "unlabelled"), "split": domain,
                            "images": options.images, "seed": seed,
                        }
                    },
                    work / f"{host}-{domain}-{seed}",
                )
                for seed in range(options.samples)
            ]  # fmt: skip
            rows.append(row(host, domain, found))
        if options.camvid and camvid_is_here():
            base = {
                "clip": options.clip,
                "n": options.n,
                "classes": "cityscapes",
                "host": {"name": host, "long_max": 320, "short_max": 192, **HOSTS[host]},
                "data": {
                    "name": "camvid", "split": "val", "class_map": "cityscapes-to-camvid", "limit": options.camvid
                },
            }  # fmt: skip
            found = [
                scores(
                    base | {"unlabelled": {"split": "train", "images": options.images, "seed": seed}},
                    work / f"{host}-camvid-{seed}",
                )
                for seed in range(options.samples)
            ]
            rows.append(row(host, "CamVid (photographs)", found))
    settings = {key: value for key, value in vars(options).items() if key not in ("work", "out")}
    write_record(record("floss-world", settings=settings, rows=rows), options.out)


def row(host: str, domain: str, found: list[tuple[float, float]]) -> dict[str, Any]:
    """Returns one row of the table, and prints it."""
    hosts, fused = np.array(found).T
    gain = fused - hosts
    line = {
        "host": host,
        "domain": domain,
        "host_miou": round(float(hosts.mean()), 2),
        "floss_miou": round(float(fused.mean()), 2),
        "gain": round(float(gain.mean()), 2),
        "gain_spread": round(float(gain.std()), 2),
    }
    print("  ".join(f"{value}" for value in line.values()), flush=True)
    return line


def camvid_is_here() -> bool:
    """Returns whether the photographs of CamVid are on this machine."""
    try:
        return len(open_dataset("camvid", split="val")) > 0
    except UserError:
        return False


if __name__ == "__main__":
    main()
