"""`fmda run` on a configuration, in which each batch waits for a line on stdin; at its end, all go on."""

import sys

from fmda.cli import main
from fmda.methods.datum import personalise

make_batches = personalise.batches


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
    personalise.batches = Waiting
    sys.argv[0] = "fmda"
    sys.exit(main())
