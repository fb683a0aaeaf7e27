"""Pictures per second of the street world's renderer, as `write_world` calls it: JSON to stdout.

python benchmarks/world_speed.py [--height 128] [--width 256] [--images 96] [--batch 4] [--threads 2] [--out FILE]
"""

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from sides.record import record, write_record

from fmda.methods.render import image_keys
from fmda.world import DOMAINS
from fmda.world.renderer import render_batch


def speed(height: int, width: int, images: int, batch: int, threads: int) -> dict:
    """Returns compile seconds, and pictures per second over all domains in turn."""

    def draw(k: int) -> None:
        domain = DOMAINS[k % len(DOMAINS)]
        keys = image_keys(0, domain, list(range(k * batch, (k + 1) * batch)))
        found = render_batch(keys, np.full(batch, DOMAINS.index(domain), np.int32), height=height, width=width)
        jax.block_until_ready(found)

    start, cpu = time.perf_counter(), time.process_time()
    draw(0)
    compiled, compiled_cpu = time.perf_counter() - start, time.process_time() - cpu
    draw(1)
    calls = max(images // batch, len(DOMAINS))
    start, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(draw, range(calls)))
    seconds, seconds_cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "size": [height, width],
        "batch": batch,
        "threads": threads,
        "images": calls * batch,
        "compile_seconds": round(compiled, 1),
        "compile_cpu_seconds": round(compiled_cpu, 1),
        "images_per_second": round(calls * batch / seconds, 2),
        "cpu_seconds_per_image": round(seconds_cpu / (calls * batch), 4),
    }


def main() -> None:
    """Runs the measurement named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    load = round(os.getloadavg()[0] / len(os.sched_getaffinity(0)), 3)
    found = speed(args.height, args.width, args.images, args.batch, args.threads)
    write_record(record("world-speed", **found, load_per_core=load), args.out)


if __name__ == "__main__":
    main()
