"""Endless batches, read ahead by threads or worker processes of grain; the position is saved and restored exactly.

A batch is a pure function of its number, so that workers, threads and restarts do not change what comes out.
"""

import errno
import signal
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from fmda.data.dataset import Example
from fmda.errors import UserError

Batch = dict[str, Any]
Transform = Callable[..., Any]
"""(example, generator[, what a crop should show]) -> what is stacked."""

THREADS = 2
AHEAD = 2
ENDLESS = 2**40


class Batches(Iterator[Batch]):
    """An endless iterator over batches whose position is a small dict. Close it (or use `with`) to stop its workers.

    Args:
        make_batch: number 0, 1, 2, ... -> batch, a tree of arrays; picklable where workers are used.
        kind: JSON values that say what the batches are made of; recorded with the position.
        workers: processes that make batches; 0 makes them in threads of this one. A script that uses workers needs the
            usual `if __name__ == "__main__":`.
    """

    def __init__(self, make_batch: Callable[[int], Batch], kind: Mapping[str, Any], workers: int = 0) -> None:
        self._dataset = grain.MapDataset.range(ENDLESS).map(make_batch)
        self._kind, self._workers = dict(kind), workers
        self._done = 0
        self._open: list[Any] = []  # the running pipeline, if any
        # also at exit: workers that outlive their parent's modules end in tracebacks
        self._finalizer = weakref.finalize(self, _close, self._open)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        if not self._open:
            self._open.append(iter(self._pipeline()))
        try:
            batch = next(self._open[0])
        except (OSError, RuntimeError) as fault:
            cause = _worker_fault(fault) if self._workers else None
            if cause is None:
                raise
            raise cause from None
        self._done += 1
        # what workers send lies in shared memory; a copy frees that at once and leaves ordinary arrays
        return _copied(batch) if self._workers else batch

    def get_state(self) -> dict[str, Any]:
        """Returns the position as a dict that JSON can hold: how many batches were handed out, and of what."""
        return {"batches": self._done, **self._kind}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after the position in `state`, in constant time; the number of workers may differ.

        Raises UserError if the state belongs to other data, another batch size or another seed.
        """
        for key, value in self._kind.items():
            if state.get(key) != value:
                raise UserError(
                    f"loader state: {key} is {state.get(key)} there but {value} here; resume with the same data and "
                    "settings, or start in a new work folder"
                )
        self.close()
        self._done = int(state["batches"])

    def close(self) -> None:
        """Stops threads and workers. The iterator may be used again; it then goes on where it stood."""
        _close(self._open)

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pipeline(self) -> grain.IterDataset:
        rest = self._dataset.slice(slice(self._done, None))
        # grain reads 500 elements ahead by default; here an element is a whole batch
        options = grain.ReadOptions(num_threads=1 if self._workers else THREADS, prefetch_buffer_size=AHEAD)
        stream = rest.to_iter_dataset(options)
        if self._workers:
            # grain asks absl's flags when it starts workers, and absl refuses until a program has parsed them
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=AHEAD),
                worker_init_fn=_start_worker,
            )
        return stream


def stack(examples: Sequence[Any]) -> Batch:
    """Returns examples (or dicts of arrays) as one dict of arrays with a leading batch axis.

    Raises UserError where shapes differ, naming two of the examples.
    """
    rows = [_arrays(example) for example in examples]
    batch: Batch = {}
    for key in rows[0]:
        values = [np.asarray(row[key]) for row in rows]
        odd = next((i for i, value in enumerate(values) if value.shape != values[0].shape), None)
        if odd is not None:
            names = [getattr(examples[i], "name", f"row {i}") for i in (0, odd)]
            raise UserError(
                f"batch: '{key}' of {names[0]} is {values[0].shape} but of {names[1]} {values[odd].shape}; "
                "crop or resize to one size, or take batches of one"
            )
        batch[key] = np.stack(values)
    return batch


def _arrays(example: Any) -> Mapping[str, Any]:
    if isinstance(example, Example):
        arrays = {"image": example.image, "labels": example.labels, "margins": example.margins}
        return {name: array for name, array in arrays.items() if array is not None}
    if isinstance(example, Mapping):
        return example
    raise UserError(f"a transform gave a {type(example).__name__}; it must return an Example or a dict of arrays")


def _worker_fault(fault: OSError | RuntimeError) -> UserError | None:
    """Returns what a failure between processes means to a user; None for one that has another cause."""
    crashed = "Worker process was terminated unexpectedly" in str(fault)
    # a full tmpfs refuses a new segment (ENOSPC) or kills the process that writes to it (SIGBUS)
    if getattr(fault, "errno", None) == errno.ENOSPC or (crashed and f"exit code {-signal.SIGBUS}." in str(fault)):
        return UserError(
            "/dev/shm: no space left for the batches of loader processes; set workers=0, or enlarge it "
            "(docker run --shm-size=2g)"
        )
    if crashed:
        return UserError(
            "loader: a loader process ended at its start or was killed; start the run under "
            "`if __name__ == '__main__':` in a script file, or set workers=0"
        )
    return None


def _close(running: list[Any]) -> None:
    while running:
        running.pop().close()


def _copied(batch: Any) -> Any:
    return {name: _copied(leaf) for name, leaf in batch.items()} if isinstance(batch, Mapping) else np.array(batch)


def _start_worker(worker: int, count: int) -> None:
    """Keeps OpenCV to one thread in each worker, else the workers fight for the cores."""
    import cv2

    cv2.setNumThreads(1)
