"""`fmda run` on a configuration, in which each batch waits for a line on stdin; at its end, all go on.

With CUT_ALL in the environment, leaves of any size are cut over the axis fsdp, and stderr tells how many of the state's
leaves are.
"""

import dataclasses
import os
import sys

import jax

from fmda.cli import main
from fmda.mesh import LargestAxis
from fmda.methods.datum import personalise
from fmda.train import loop

ALL = (("*", LargestAxis(min_size=0)),)
make_batches, fit = loop.batches, loop.fit


def fit_and_tell(task, *arguments):
    state = fit(dataclasses.replace(task, rules=ALL), *arguments)
    for name in ("params", "opt"):
        leaves = [leaf for leaf in jax.tree.leaves(getattr(state, name)) if leaf.ndim]
        cut = sum("fsdp" in leaf.sharding.spec for leaf in leaves)
        print(f"{name} cut {cut / len(leaves):.2f}", file=sys.stderr)
    return state


class Waiting:
    """A loader that says when a batch is drawn, and hands it out when it is told to."""

    def __init__(self, *arguments, **options):
        self.inner = make_batches(*arguments, **options)
        self.get_state, self.set_state = self.inner.get_state, self.inner.set_state

    def __enter__(self):
        return self

    def __exit__(self, *fault):
        self.inner.close()

    def __next__(self):
        batch = next(self.inner)
        print("drawn", flush=True)
        sys.stdin.readline()
        return batch


if __name__ == "__main__":
    loop.batches = Waiting
    if "CUT_ALL" in os.environ:
        personalise.FSDP_RULES, loop.fit = ALL, fit_and_tell
    sys.argv[0] = "fmda"
    sys.exit(main())
