"""The small run as a program of its own, for tests that kill it, starve it of disk or join several of it.

Prints one line per batch drawn, and at the end `digest <sha256 of every bit of the state>`.
"""

import argparse
import hashlib
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import regression
from regression import NumberedBatches

from fmda.errors import UserError
from fmda.mesh import make_mesh, start_processes


def digest(state: Any) -> str:
    """Returns the hash of all leaves of a state, in jax's order."""
    hashed = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        hashed.update(np.asarray(leaf).tobytes())
    return hashed.hexdigest()


def main() -> int:
    """Trains, and returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-steps", type=int, default=5)
    parser.add_argument("--log-every", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds that a batch takes")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--fsdp", type=int, default=2)
    parser.add_argument("--disk-full-at", type=int, default=-1, help="batch from which on nothing can be written")
    parser.add_argument("--stop-at", type=int, default=-1, help="step in which process 0 is asked to stop")
    parser.add_argument("--user", type=int, help="user id to become")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.devices)
    start_processes()
    part = regression.BATCH // jax.process_count()

    def await_checkpoint(step: int) -> None:
        # written in the background; its data item comes last
        while step and not (args.folder / "checkpoints" / str(step) / "data/metadata").is_file():
            time.sleep(0.01)

    def make_batch(number: int) -> Any:
        if number == args.disk_full_at:
            await_checkpoint((number - 1) // args.save_steps * args.save_steps)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        if number == args.stop_at and jax.process_index() == 0:
            signal.raise_signal(signal.SIGTERM)
        time.sleep(args.pause)
        print(number, flush=True)
        start = part * jax.process_index()
        return jax.tree.map(lambda leaf: leaf[start : start + part], regression.batch(number))

    mesh = make_mesh(fsdp=args.fsdp)
    if args.user is not None:
        os.setuid(args.user)
    try:
        state = regression.run(
            args.folder,
            args.steps,
            mesh=mesh,
            loader=NumberedBatches(make_batch),
            log_every=args.log_every,
            save_steps=args.save_steps,
        )
    except UserError as fault:
        print(fault, file=sys.stderr)
        return 2
    if jax.process_count() == 1:
        print("digest", digest(state), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
