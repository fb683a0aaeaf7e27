"""Batches for training: shuffled anew each epoch, the same whatever the number of workers, and resumed exactly.

grain shuffles, repeats, groups and runs the workers. What passes through it is only (position, index) pairs until a
batch is built, so that every random choice is a function of the seed and the position in the stream: the order and
the augmentations do not depend on workers, threads, processes or restarts.
"""

import errno
import signal
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import grain
import numpy as np
from absl import flags

from fmda.data.dataset import Example
from fmda.errors import UserError

Batch = dict[str, np.ndarray]
Transform = Callable[[Any, np.random.Generator], Any]

THREADS = 2
AHEAD = 2


def batches(
    source: Sequence[Any],
    transform: Transform | None,
    batch_size: int,
    *,
    seed: int,
    epochs: int | None = None,
    shuffle: bool = True,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> "Batches":
    """Returns an endless (or `epochs` long) iterator over batches; its position can be saved and restored.

    Args:
        source: examples by index; with workers it must be picklable, as a `Dataset` is.
        transform: (example, generator) -> Example, or a dict of arrays; None takes examples as they are. With workers
            it must be picklable (a class of `transforms`, or a function at the top of a module).
        batch_size: of all processes together. Process p of n gets rows p*b to (p+1)*b, b = batch_size / n, of what a
            single process would get.
        seed: decides the order and, with the position, the generator of each example.
        epochs: None for no end. With an end, the examples that fill no whole batch are left out.
        shuffle: False keeps the order of `source`.
        workers: processes that build batches; 0 builds them in threads of this one. A script that uses workers
            needs the usual `if __name__ == "__main__":`.
        process_index, process_count: which share of every batch is built here.

    A batch is {"image": uint8 [b, H, W, 3], "labels": uint8 [b, H, W]} (no "labels" without labels), or what the
    transform's dicts hold, stacked.
    """
    if len(source) == 0:
        raise UserError("the data set is empty, there is nothing to draw batches from; check its folder and split")
    if batch_size < 1 or batch_size % process_count or not 0 <= process_index < process_count:
        raise UserError(
            f"batch_size {batch_size} cannot be split over {process_count} processes (this is {process_index}); "
            f"take a multiple of {process_count}"
        )
    if epochs is not None and len(source) * epochs < batch_size:
        raise UserError(f"batch_size {batch_size} is more than {epochs} epochs of {len(source)} examples; lower it")
    stream = grain.MapDataset.range(len(source)).seed(seed)
    if shuffle:
        stream = stream.shuffle()
    stream = stream.repeat(epochs).map_with_index(_pair).batch(batch_size, drop_remainder=True)
    rows = batch_size // process_count
    build = _Build(source, transform, seed, slice(process_index * rows, (process_index + 1) * rows))
    kind = {"examples": len(source), "batch_size": batch_size, "seed": seed, "shuffle": shuffle}
    return Batches(stream.map(build), kind, workers)


class Batches(Iterator[Batch]):
    """An iterator over batches whose position is a small dict. Close it (or use `with`) to stop its workers."""

    def __init__(self, dataset: grain.MapDataset, kind: Mapping[str, Any], workers: int) -> None:
        self._dataset, self._kind, self._workers = dataset, dict(kind), workers
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
        except StopIteration:
            self.close()
            raise
        except (OSError, RuntimeError) as fault:
            meaning = _worker_fault(fault) if self._workers else None
            if meaning is None:
                raise
            raise meaning from None
        self._done += 1
        # what workers send lies in shared memory; a copy frees that at once and leaves ordinary arrays
        return {key: np.array(value) for key, value in batch.items()} if self._workers else batch

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pipeline(self) -> grain.IterDataset:
        rest = self._dataset.slice(slice(self._done, None)) if self._done else self._dataset
        # grain reads 500 elements ahead by default; here an element is a whole batch
        threads = 1 if self._workers else THREADS
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=AHEAD)
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


class _Build:
    """(positions, indices) of a whole batch -> this process's rows of it, read, transformed and stacked."""

    def __init__(self, source: Sequence[Any], transform: Transform | None, seed: int, rows: slice) -> None:
        self.source, self.transform, self.seed, self.rows = source, transform, seed, rows

    def __call__(self, pairs: tuple[np.ndarray, np.ndarray]) -> Batch:
        positions, indices = (part[self.rows] for part in pairs)
        return stack([self._example(int(p), int(i)) for p, i in zip(positions, indices, strict=True)])

    def _example(self, position: int, index: int) -> Any:
        example = self.source[index]
        if self.transform is None:
            return example
        return self.transform(example, np.random.default_rng((self.seed, position)))


def stack(examples: Sequence[Any]) -> Batch:
    """Returns examples (or dicts of arrays) as one dict of arrays with a leading batch axis.

    Raises UserError where shapes differ, naming two of the examples.
    """
    rows = [_fields(example) for example in examples]
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


def _fields(example: Any) -> Mapping[str, Any]:
    if isinstance(example, Example):
        fields = {"image": example.image}
        return fields if example.labels is None else {**fields, "labels": example.labels}
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


def _pair(position: int, index: int) -> tuple[int, int]:
    return position, index


def _start_worker(worker: int, count: int) -> None:
    """Keeps OpenCV to one thread in each worker, else the workers fight for the cores."""
    import cv2

    cv2.setNumThreads(1)
