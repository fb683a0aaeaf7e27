"""FLOSS against its host on held street-world domains and on real photographs: mIoU, mean over ranking samples.

    python benchmarks/floss_world.py --out benchmarks/results/floss-world.json

Draws the pictures, ranks templates on unlabelled ones (another sample each time), scores host and FLOSS on held ones.
CamVid is scored too where FMDA_DATA holds it. Labels serve the scores alone. A second table orders all 80 templates
against their true IoU on the held pictures, by each label-free criterion.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from sides.record import record, write_record

from fmda.config import from_dict
from fmda.data import open_dataset
from fmda.errors import UserError
from fmda.evaluate import Scores, evaluate_dataset
from fmda.methods.floss import criteria
from fmda.methods.floss.inputs import predicted_classes, unlabelled_images
from fmda.methods.floss.label_maps import segmenter
from fmda.methods.floss.model import Floss
from fmda.methods.floss.selection import select
from fmda.methods.floss.settings import Config
from fmda.methods.render import RenderConfig, write_world

HOSTS: dict[str, dict[str, Any]] = {
    "maskclip": {"crop": 128, "stride": 64, "trained_scale": True},
    "naclip": {"crop": 128, "stride": 64, "prompts": "plain", "trained_scale": True},
    "clip-dinoiser": {"crop": 128, "stride": 64, "trained_scale": True},
}
CAMVID = "CamVid (photographs)"


def configuration(options: argparse.Namespace, host: str, domain: str, work: Path, seed: int) -> Config:
    """Returns the run of a host on a domain, with one sample of unlabelled pictures."""
    values: dict[str, Any] = {"clip": options.clip, "heads": options.heads, "n": options.n, "classes": "cityscapes"}
    sample = {"images": options.images, "seed": seed}
    if domain == CAMVID:
        values["host"] = {"name": host, "long_max": 512, "short_max": 256, **HOSTS[host]}
        values["data"] = {"name": "camvid", "class_map": "cityscapes-to-camvid", "limit": options.camvid}
        values["unlabelled"] = {"split": "train", **sample}
    else:
        side = options.side
        values["host"] = {"name": host, "long_max": 2 * side, "short_max": side, **HOSTS[host]}
        values["data"] = {"name": "world", "root": str(work / "held"), "split": domain}
        values["unlabelled"] = {"name": "world", "root": str(work / "unlabelled"), "split": domain, **sample}
    return from_dict(Config, values)


def measured(options: argparse.Namespace, host: str, domain: str, work: Path) -> dict[str, Any]:
    """Returns one row: host, FLOSS by sample and criterion, and what the label-free criteria are worth."""
    configs = [configuration(options, host, domain, work, seed) for seed in range(options.samples)]
    data = configs[0].data
    held = open_dataset(data.name, data.root, data.split)
    model = Floss(configs[0], predicted_classes(configs[0]))

    def scores(chosen: Any) -> Scores:
        return evaluate_dataset(segmenter(model, chosen), held, data.class_map, limit=data.limit)

    alone = scores(None)
    found: dict[str, list[Scores]] = {name: [] for name in options.criteria}
    for seed, config in enumerate(configs):
        tally = model.rank(unlabelled_images(config), work / f"{host}-{domain.split()[0]}-{seed}.npz")
        for name, results in found.items():
            results.append(scores(select(criteria.CRITERIA[name](tally), tally.share, options.n)))
    row: dict[str, Any] = {"host": host, "domain": domain, "images": data.limit or len(held)}
    row["host_miou"] = round(100 * alone.miou, 2)
    for name, results in found.items():
        gains = np.array([100 * (s.miou - alone.miou) for s in results])
        row[name] = {"miou": round(100 * float(np.mean([s.miou for s in results])), 2)}
        row[name] |= {"gain": round(float(gains.mean()), 2), "gain_by_sample": [round(float(g), 2) for g in gains]}
    row["host_iou"] = dict(zip(alone.names, np.round(100 * alone.iou, 1).tolist(), strict=True))
    mean = np.mean([s.iou for s in found[options.criteria[0]]], axis=0)
    row["floss_iou"] = dict(zip(alone.names, np.round(100 * mean, 1).tolist(), strict=True))
    if domain != CAMVID:
        tally = model.rank(held, work / f"{host}-{domain}-held.npz", labels=True)
        row["criteria"] = criteria.comparison(tally, options.n)
    gains_shown = "  ".join(f"{name} {row[name]['miou']} ({row[name]['gain']:+.2f})" for name in found)
    print(f"{host:14} {domain:22} host {row['host_miou']:.2f}  {gains_shown}", flush=True)
    return row


def means(rows: list[dict[str, Any]], names: list[str]) -> dict[str, dict[str, float]]:
    """Returns each host's mean gain over the street world's domains, by criterion."""
    hosts = dict.fromkeys(row["host"] for row in rows)
    return {
        host: {
            name: round(
                float(np.mean([r[name]["gain"] for r in rows if r["host"] == host and r["domain"] != CAMVID])), 2
            )
            for name in names
        }
        for host in hosts
    }


def main() -> None:
    """Runs every host on every domain with every sample, prints a table and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", nargs="+", default=list(HOSTS), choices=list(HOSTS))
    parser.add_argument("--domains", nargs="+", default=["night", "fog", "rain", "snow"])
    parser.add_argument("--criteria", nargs="+", default=["entropy"], choices=list(criteria.CRITERIA))
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--images", type=int, default=16, help="unlabelled pictures a ranking sees")
    parser.add_argument("--held", type=int, default=24, help="held pictures a domain is scored on")
    parser.add_argument("--side", type=int, default=256, help="shorter side of a picture as the host sees it")
    parser.add_argument("--clip", default="street-clip")
    parser.add_argument("--heads", default=None, help="folder of CLIP-DINOiser's heads")
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--camvid", type=int, default=60, help="photographs of CamVid val to score; 0 leaves it out")
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="floss-world-"))
    write_world(RenderConfig(dict.fromkeys(options.domains, options.held), seed=2), work / "held")
    drawn = dict.fromkeys(options.domains, options.images * options.samples)
    write_world(RenderConfig(drawn, seed=1), work / "unlabelled")
    domains = [*options.domains, *([CAMVID] if options.camvid and camvid_is_here() else [])]
    rows = [measured(options, host, domain, work) for host in options.hosts for domain in domains]
    settings = {key: value for key, value in vars(options).items() if key not in ("work", "out")}
    write_record(
        record("floss-world", settings=settings, mean_gain=means(rows, options.criteria), rows=rows), options.out
    )


def camvid_is_here() -> bool:
    """Returns whether the photographs of CamVid are on this machine."""
    try:
        return len(open_dataset("camvid", split="val")) > 0
    except UserError:
        return False


if __name__ == "__main__":
    main()
