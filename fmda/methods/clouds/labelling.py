"""Batches whose generated images are labelled on the host while the devices train.

The labels of an image depend on the labelling teacher and the image alone. They lie in a folder until another teacher
labels. What is missing there is made again, so that a run may be killed at any moment.
"""

import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from fmda.data import IGNORE
from fmda.data.dataset import Example
from fmda.data.loader import Batch, Batches
from fmda.errors import disk_errors
from fmda.mesh import replicated
from fmda.methods.clouds.objective import labeller_of
from fmda.methods.clouds.streams import SOURCE, cut, place_of
from fmda.methods.mask_head import MaskNetwork
from fmda.methods.tune import TunedNetwork
from fmda.png import is_whole, read_png, write_png
from fmda.train import TrainState

POLL = 0.005
"""Seconds between two looks at the devices while labels are missing."""

LabelMap = UInt8[np.ndarray, "H W"]
Refine = Callable[[UInt8[np.ndarray, "H W 3"], LabelMap], LabelMap]
Predict = Callable[[UInt8[np.ndarray, "H W 3"]], LabelMap]


class _Begun(NamedTuple):
    """A batch that is not handed out yet, and the labels of its generated images, by row."""

    batch: Batch
    labels: dict[int, Future[LabelMap]]


class LabelledBatches(Iterator[Batch]):
    """Batches of `joint_stream` with labels, and without "place".

    `follow` is called with the state before each batch. A context manager that ends its threads.

    Args:
        batches: of `joint_stream`.
        images: the generated ones.
        network: predicts the label maps.
        refine: (image, label map) -> labels; called in threads.
        folder: of the labels.
        mesh: devices of the run.
        check_every: see `next_labeller`.
        confidence: see `label_maps`.
        mirror_first: label the mirrored image for a mirrored view, as the released code does; else its labels are
            those of the image, mirrored.
        ahead: batches whose labels are begun before they are needed.
        threads: images at work at once.

    Attributes:
        waited: seconds for which the devices had nothing to do because labels were missing.
    """

    def __init__(
        self,
        batches: Batches,
        images: Sequence[Example],
        network: MaskNetwork | TunedNetwork,
        refine: Refine,
        folder: Path,
        mesh: Mesh,
        *,
        check_every: int,
        confidence: float = 0.0,
        mirror_first: bool = False,
        ahead: int = 2,
        threads: int = 2,
    ) -> None:
        self._batches, self._images, self._refine = batches, images, refine
        self._encoder, self._folder, self._mesh = network.encoder.params, folder, mesh
        self._check_every, self._mirror_first, self._most_ahead = check_every, mirror_first, ahead
        self._forward = label_maps(network, confidence)
        self._version, self._predict = -1, _unset
        self._metrics: Mapping[str, Any] = {}
        self._begun: deque[_Begun] = deque()
        self._making: dict[tuple[int, int, bool], Future[LabelMap]] = {}
        self._done = 0
        self._pool = ThreadPoolExecutor(threads)
        self.waited = 0.0

    def follow(self, step: int, state: TrainState, metrics: Mapping[str, Any]) -> None:
        """Takes the labelling teacher from the state after `step` updates; all processes call it.

        Waits for the step only where the teacher may be another one than before.
        """
        self._metrics = metrics
        if self._version >= 0 and (step - 1) % self._check_every:
            return
        version, head = labeller_of(state)
        if version == self._version:
            return
        # whole copies, since the state's arrays are sharded and donated; each process labels its own rows
        copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=replicated(self._mesh))(head)
        params = {"encoder": self._encoder, "head": jax.tree.map(lambda leaf: leaf.addressable_data(0), copied)}
        self._version = version
        self._predict = partial(self._forward, params)
        if jax.process_index() == 0:
            for other in self._folder.glob("*"):
                if other.name != str(version):
                    shutil.rmtree(other, ignore_errors=True)
        for begun in self._begun:
            for future in begun.labels.values():
                future.cancel()
        self._begun = deque(self._begin(begun.batch) for begun in self._begun)

    def __next__(self) -> Batch:
        while len(self._begun) <= self._most_ahead:
            self._begun.append(self._begin(next(self._batches)))
        begun = self._begun.popleft()
        self._wait(list(begun.labels.values()))
        batch = dict(begun.batch)
        places, labels = batch.pop("place"), batch["labels"].copy()
        for row, future in begun.labels.items():
            place = place_of(places[row])
            # a mirrored image is not mirrored again
            place = place._replace(mirrored=place.mirrored and not self._mirror_first)
            labels[row] = cut(future.result(), place, labels.shape[1:])
        self._done += 1
        return batch | {"labels": labels}

    def get_state(self) -> dict[str, Any]:
        """Returns the position, as `Batches` does, of the batches that were handed out."""
        return self._batches.get_state() | {"batches": self._done}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after a position; see `Batches.set_state`."""
        self._batches.set_state(state)
        self._begun.clear()
        self._done = int(state["batches"])

    def __enter__(self) -> "LabelledBatches":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _begin(self, batch: Batch) -> _Begun:
        # two threads must not write one file; what is finished lies in the folder
        self._making = {key: future for key, future in self._making.items() if not future.done()}
        labels = {}
        for row, numbers in enumerate(batch["place"]):
            place = place_of(numbers)
            if place.number != SOURCE:
                key = (self._version, place.number, place.mirrored and self._mirror_first)
                if key not in self._making:
                    self._making[key] = self._pool.submit(self._labels, self._predict, *key)
                labels[row] = self._making[key]
        return _Begun(batch, labels)

    def _labels(self, predict: Predict, version: int, number: int, mirrored: bool) -> LabelMap:
        """Returns the labels of a whole image; runs in a thread."""
        example = self._images[number]
        path = self._folder / str(version) / f"{example.name}{'-mirrored' if mirrored else ''}.png"
        if is_whole(path):
            return read_png(path)
        image = np.ascontiguousarray(example.image[:, ::-1]) if mirrored else example.image
        labels = self._refine(image, predict(image))
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(path, labels)
        return labels

    def _wait(self, futures: list[Future[LabelMap]]) -> None:
        """Returns when the labels are made; counts the time after the devices' last step as waited."""
        if not self._metrics:
            # nothing waits before the first step, which is not even compiled
            wait(futures)
        while not all(future.done() for future in futures):
            if all(leaf.is_ready() for leaf in self._metrics.values()):
                start = monotonic()
                wait(futures)
                self.waited += monotonic() - start
            else:
                wait(futures, timeout=POLL)


def label_maps(
    network: MaskNetwork | TunedNetwork, confidence: float = 0.0
) -> Callable[[Any, UInt8[np.ndarray, "H W 3"]], LabelMap]:
    """Returns the function (parameters of "encoder" and "head", image) -> the classes that the network predicts.

    Pixels whose class has a probability below `confidence` are 255.
    """

    @jax.jit
    def forward(params: Any, image: Any) -> Any:
        scores = network.scores(params, image[None])[0]
        labels = jnp.argmax(scores, -1)
        if confidence:
            labels = jnp.where(jax.nn.softmax(scores).max(-1) >= confidence, labels, IGNORE)
        return labels.astype(jnp.uint8)

    return lambda params, image: np.asarray(forward(params, image))


def _unset(image: UInt8[np.ndarray, "H W 3"]) -> LabelMap:
    raise AssertionError("`follow` comes first")
