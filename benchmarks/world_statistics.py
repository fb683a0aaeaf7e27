"""How often each class occurs in the street world, beside Cityscapes and KITTI: table to stderr, JSON to stdout.

python benchmarks/world_statistics.py [--domains photo,game] [--images 200] [--out FILE]
"""

import argparse
import sys
from pathlib import Path

import jax
import numpy as np
from sides.record import record, write_record

from fmda.methods.render import image_keys
from fmda.world import CLASSES, DOMAINS
from fmda.world.renderer import render_batch

# share of labelled pixels, per cent: the Cityscapes training set as commonly quoted, and KITTI semantics as counted
CITYSCAPES = (36.9, 6.1, 22.8, 0.7, 0.9, 1.2, 0.2, 0.6, 15.9, 1.2, 4.0, 1.2, 0.1, 7.0, 0.3, 0.2, 0.2, 0.1, 0.4)
KITTI = (23.1, 3.8, 8.2, 0.9, 0.8, 1.4, 0.3, 0.6, 30.3, 9.4, 10.7, 0.1, 0.0, 6.0, 0.2, 0.1, 0.2, 0.0, 0.1)


def statistics(domains: list[str], images: int, height: int, width: int, seed: int, batch: int = 10) -> dict:
    """Returns per class the share of labelled pixels, the share of pictures that show it (with at least 10 pixels at
    128x256, in proportion elsewhere), and the median area where shown; and the share of void pixels."""
    counts = []
    for domain in domains:
        for start in range(0, images, batch):
            keys = image_keys(seed, domain, list(range(start, start + batch)))
            found = render_batch(keys, np.full(batch, DOMAINS.index(domain), np.int32), height=height, width=width)
            counts.append(np.asarray(jax.device_get(found.facts["pixels"])))
    pixels = np.concatenate(counts)
    least = max(10 * height * width // (128 * 256), 1)
    shares = 100.0 * pixels.sum(0) / pixels.sum()
    rows = {}
    for k, name in enumerate(CLASSES):
        seen = pixels[:, k][pixels[:, k] >= least]
        rows[name] = {
            "share": round(float(shares[k]), 3),
            "cityscapes": CITYSCAPES[k],
            "kitti": KITTI[k],
            "images": round(100.0 * len(seen) / len(pixels), 1),
            "median_pixels": int(np.median(seen)) if len(seen) else 0,
        }
    void = 100.0 * (1.0 - pixels.sum() / (len(pixels) * height * width))
    return {
        "domains": domains,
        "images": len(pixels),
        "size": [height, width],
        "void": round(float(void), 2),
        "classes": rows,
    }


def main() -> None:
    """Runs the count named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domains", default="game,photo")
    parser.add_argument("--images", type=int, default=200, help="per domain")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = statistics(args.domains.split(","), args.images, args.height, args.width, args.seed)
    print(
        f"{'class':<15}{'world %':>9}{'Cityscapes %':>14}{'KITTI %':>9}{'in images %':>13}{'median px':>11}",
        file=sys.stderr,
    )
    for name, row in result["classes"].items():
        line = f"{name:<15}{row['share']:>9.2f}{row['cityscapes']:>14.1f}{row['kitti']:>9.1f}{row['images']:>13.1f}"
        print(f"{line}{row['median_pixels']:>11}", file=sys.stderr)
    print(f"{'void':<15}{result['void']:>9.2f}", file=sys.stderr)
    write_record(record("world-statistics", **result), args.out)


if __name__ == "__main__":
    main()
