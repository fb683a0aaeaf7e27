"""Scores of a dense network on the devices of a mesh: images in, sum of confusion matrices out."""

import typing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, UInt8

from fmda.data import ClassList, Dataset
from fmda.errors import UserError
from fmda.evaluate.confusion import IGNORE, Scores, batch_confusion
from fmda.evaluate.maps import common_list
from fmda.evaluate.protocol import Protocol
from fmda.evaluate.windows import SIDE, DenseForward, Geometry, WindowGrid, label_maps, pad, score_samples
from fmda.mesh import BATCH, replicated
from fmda.progress import track

T = TypeVar("T")

THREADS = 2
"""Threads that decode images."""

AHEAD = 4
"""Images that are decoded before they are needed."""

IN_FLIGHT = 2
"""Batches whose counts may be pending on the devices."""


def score_on_mesh(
    forward: DenseForward,
    params: Any,
    dataset: Dataset,
    mesh: Mesh,
    protocol: Protocol,
    *,
    classes: ClassList | None = None,
    limit: int | None = None,
) -> Scores:
    """Returns the scores of a dense network over a labelled dataset, the same in every process.

    Each device scores one image at a time; windows, resize, arg max and confusion matrix are one jitted function.
    Processes score their shares of the images independently, and the counts are added at the end.

    Args:
        forward: (params, RGB in 0..255 [N, h, w, 3]) -> scores [N, h', w', K]. Pass the same function object every
            time, since a new one is compiled again.
        params: a tree of arrays; copied to each device.
        dataset: labelled examples.
        mesh: its devices share the images.
        protocol: resize, windows, flip, and the class maps by known name or file.
        classes: what the network predicts; default the dataset's classes.
        limit: score only the first `limit` images.

    Raises:
        UserError: no image, an image without labels, or class lists that do not match.
    """
    common = common_list(classes or dataset.classes, dataset.classes, protocol.class_map)
    names = common.classes.names
    count = image_count(dataset, limit)
    unmapped = np.array_equal(common.predictions, np.arange(256))
    table = None if unmapped else jnp.asarray(common.predictions)
    local = mesh.local_mesh
    params = local_copy(params, mesh)
    samples = cache(partial(score_samples, forward, params))

    def prepare(index: int) -> Prepared:
        example = dataset[index]
        if example.labels is None:
            raise UserError(f"{dataset.name}: image '{example.name}' has no label map; score a labelled split")
        grid = WindowGrid.of(example.image.shape[:2], protocol)
        place = grid.geometry(samples(grid.window))
        labels = pad(common.labels[example.labels], IGNORE)
        return Prepared(grid.window, grid.shape, (grid.prepare(example.image), labels, place))

    def count_batch(batch: Prepared) -> Array:
        return _count(
            forward, params, *batch.arrays, table,
            window=batch.window, shape=batch.shape, flip=protocol.flip, classes=len(names), mesh=local,
        )  # fmt: skip

    total = np.zeros((len(names), len(names) + 1), np.int64)
    for counts in over_images(count_batch, prepare, count, mesh, f"score {dataset.name}"):
        total += counts.astype(np.int64).sum(0)
    return Scores.from_confusion(sum_over_processes(total), names, protocol)


class NamedScores(typing.Protocol):
    """Scores of one evaluation."""

    def named(self) -> Iterable[tuple[str, float]]:
        """Returns (name, value) pairs."""
        ...


@dataclass(frozen=True)
class SegmentationEvaluator:
    """Scores of the network in training, for `fmda.train.task`; `best` may name any of them.

    Attributes:
        name: of the evaluation; scores are logged as `<name>/<score>`.
        every: steps between evaluations; 0 evaluates at the end only.
        score: training state -> scores, such as a call of `score_on_mesh` or `label_free_scores`.
    """

    name: str
    every: int
    score: Callable[[Any], NamedScores]

    def run(self, state: Any) -> Iterable[tuple[str, float]]:
        """Returns the scores by name."""
        return self.score(state).named()


def read_ahead(read: Callable[[int], T], indices: Iterable[int]) -> Iterator[T]:
    """Yields `read(index)` in order; a few calls run ahead in threads."""
    pool = ThreadPoolExecutor(THREADS)
    pending: deque[Future[T]] = deque()
    try:
        for index in indices:
            pending.append(pool.submit(read, index))
            if len(pending) > AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Prepared(NamedTuple):
    """Input of the devices for one image; in a batch, the arrays have a leading axis.

    Attributes:
        window, shape: of the grid (`WindowGrid`).
        arrays: a tree of NumPy arrays.
    """

    window: tuple[int, int]
    shape: tuple[int, int]
    arrays: Any


def image_count(dataset: Dataset, limit: int | None) -> int:
    """Returns how many images are scored. Raises UserError for none."""
    if len(dataset) == 0:
        raise UserError(f"{dataset.name}: split '{dataset.split}' holds no image; check root and split")
    return len(dataset) if limit is None else min(limit, len(dataset))


def over_images(
    run: Callable[[Prepared], Any], prepare: Callable[[int], Prepared], count: int, mesh: Mesh, what: str
) -> Iterator[Any]:
    """Yields what `run` returns for this process's share of `count` images, batch by batch, as NumPy arrays [n, ...].

    A batch has one image for each device of this process. `run` returns before the devices are done; a few batches are
    under way at a time. `what` names the task in the progress line.
    """
    share = range(jax.process_index(), count, jax.process_count())
    running: deque[tuple[Any, int]] = deque()

    def oldest() -> Any:
        results, images = running.popleft()
        return jax.tree.map(lambda leaf: np.asarray(leaf)[:images], results)

    for batch, images in _batches(track(read_ahead(prepare, share), what, len(share)), mesh.local_mesh.size):
        running.append((run(batch), images))
        if len(running) > IN_FLIGHT:
            yield oldest()
    while running:
        yield oldest()


def _batches(prepared: Iterable[Prepared], size: int) -> Iterator[tuple[Prepared, int]]:
    """Yields (batch of `size` images that share one program, how many of them count); the others fill it up."""
    groups: dict[Any, list[Prepared]] = {}
    for one in prepared:
        key = (one.window, one.shape, *(a.shape for a in jax.tree.leaves(one.arrays)))
        group = groups.setdefault(key, [])
        group.append(one)
        if len(group) == size:
            yield _stacked(groups.pop(key)), size
    for group in groups.values():
        yield _stacked(group + group[:1] * (size - len(group))), len(group)


def _stacked(group: list[Prepared]) -> Prepared:
    arrays = jax.tree.map(lambda *leaves: np.stack(leaves), *(one.arrays for one in group))
    return Prepared(group[0].window, group[0].shape, arrays)


@partial(jax.jit, static_argnames=("forward", "window", "shape", "flip", "classes", "mesh"))
def _count(
    forward: DenseForward,
    params: Any,
    images: UInt8[Array, "b H W 3"],
    labels: UInt8[Array, "b H2 W2"],
    place: Geometry,
    table: UInt8[Array, " 256"] | None,
    *,
    window: tuple[int, int],
    shape: tuple[int, int],
    flip: bool,
    classes: int,
    mesh: Mesh,
) -> Int[Array, "b K K+1"]:
    """Returns the confusion matrix of each image, split over the devices like the images."""

    def on_device(params: Any, images: Array, labels: Array, place: Geometry, table: Array | None) -> Array:
        predictions, _ = label_maps(forward, params, images, place, window, shape, flip)
        if table is not None:
            predictions = table[predictions]
        # in bands: XLA's scatter over a whole image is five times as slow on a CPU
        bands = tuple(array.reshape(len(array), -1, SIDE, array.shape[2]) for array in (labels, predictions))

        def band(pair: tuple[Array, Array]) -> Array:
            return batch_confusion(pair[0], pair[1], classes, void=True)

        return lax.map(lambda one: lax.map(band, one).sum(0), bands)

    specs = (P(), BATCH, BATCH, BATCH, P())
    split = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=BATCH, check_vma=False)
    return split(params, images, labels, place, table)


def local_copy(params: Any, mesh: Mesh) -> Any:
    """Returns the tree with a whole copy of each leaf on every device of this process."""
    if jax.process_count() == 1:
        return jax.device_put(params, replicated(mesh))
    whole = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(params)
    return multihost_utils.global_array_to_host_local_array(whole, mesh, P())


def sum_over_processes(array: np.ndarray) -> np.ndarray:
    """Returns the sum over all processes of an array of one shape and dtype in each."""
    if jax.process_count() == 1:
        return array
    # as bytes: jax would cut 64-bit numbers
    gathered = np.asarray(multihost_utils.process_allgather(array.view(np.uint8)))
    return gathered.view(array.dtype).sum(0)
