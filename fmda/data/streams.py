"""Streams of training examples: a source, an order and a transform; several of them joined into one batch.

Every random choice is a function of the seed and the position in the stream. Order and augmentation depend neither on
workers, threads and processes nor on restarts.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Float, Int

from fmda.data.loader import Batch, Batches, Transform, stack
from fmda.data.transforms import Wanted
from fmda.errors import UserError


class Order(Protocol):
    """Which example stands at a position of a stream; picklable, a pure function."""

    def __call__(self, position: int, count: int, seed: int) -> int:
        """Returns the index, from 0 to count - 1, of the example at a position 0, 1, 2, ..."""
        ...


@dataclass(frozen=True)
class Shuffled:
    """Each epoch is another permutation of the examples."""

    def __call__(self, position: int, count: int, seed: int) -> int:
        """Returns the index of the example at a position."""
        epoch, place = divmod(position, count)
        return index_shuffle(place, max_index=count - 1, seed=(seed + epoch) % 2**32, rounds=4)


@dataclass(frozen=True)
class Repeated:
    """In each epoch example i occurs `factors[i]` times: the whole part always, once more with the fraction as chance.

    An epoch has round(sum of factors) places; factors are scaled so that their sum is this number. Occurrences are
    drawn systematically and shuffled anew in each epoch.
    """

    factors: tuple[float, ...]

    def __call__(self, position: int, count: int, seed: int) -> int:
        """Returns the index of the example at a position. Raises UserError for another number of examples."""
        if len(self.factors) != count:
            raise UserError(f"factors: {len(self.factors)} for {count} examples; give one for each")
        epoch, place = divmod(position, max(1, round(sum(self.factors))))
        return int(_repeated_epoch(self.factors, seed, epoch)[place])


@functools.lru_cache(maxsize=8)
def _repeated_epoch(factors: tuple[float, ...], seed: int, epoch: int) -> Int[np.ndarray, " places"]:
    rng = np.random.default_rng((seed, epoch, 1))
    total = np.cumsum(factors, dtype=np.float64)
    places = max(1, round(total[-1]))
    points = (np.arange(places) + rng.random()) * (total[-1] / places)
    return rng.permutation(np.searchsorted(total, points, side="right").clip(max=len(factors) - 1))


@dataclass(frozen=True, eq=False)
class RareClasses:
    """Rare class sampling (Hoyer et al. 2022, DAFormer, 3.3): a class by its rarity, then an example that shows it.

    P(c) is the softmax of (1 - f_c) / temperature, where f_c is the share of class c among all labelled pixels.

    Attributes:
        pixels: pixels of each class in each example.
        temperature: 0.01 in DAFormer; larger ones approach equal shares.
        least: an example is drawn for a class only if it has more pixels of it than this; where no example has, the
            class is left out.
        least_in_crop: a crop is drawn again until it has more pixels of the class than this (`RandomCrop`); 1500 in
            DAFormer, 6000 in HRDA. 0 asks for nothing.
    """

    pixels: Int[np.ndarray, "n k"]
    temperature: float = 0.01
    least: int = 3000
    least_in_crop: int = 0

    def __post_init__(self) -> None:
        """Raises UserError where no example may be drawn for any class."""
        if not self.examples:
            raise UserError(
                f"rare classes: no image has more than {self.least} pixels of any class; lower rare_pixels (`least`)"
            )

    @functools.cached_property
    def examples(self) -> dict[int, Int[np.ndarray, " m"]]:
        """The examples that may be drawn for each class that any of them shows."""
        shown = {k: np.flatnonzero(column > self.least) for k, column in enumerate(np.asarray(self.pixels).T)}
        return {k: indices for k, indices in shown.items() if len(indices)}

    @functools.cached_property
    def shares(self) -> Float[np.ndarray, " classes"]:
        """How often each class of `examples` is drawn; sums to 1."""
        frequency = self.pixels.sum(0)[list(self.examples)] / max(1, self.pixels.sum())
        weights = np.exp((frequency.min(initial=1.0) - frequency) / self.temperature)
        return weights / weights.sum()

    def __call__(self, position: int, count: int, seed: int) -> int:
        """Returns the index of the example at a position."""
        chosen, rng = self._drawn(position, seed)
        return int(rng.choice(self.examples[chosen]))

    def wanted(self, position: int, seed: int) -> Wanted | None:
        """Returns what the crop at a position should show."""
        return Wanted(self._drawn(position, seed)[0], self.least_in_crop) if self.least_in_crop else None

    def _drawn(self, position: int, seed: int) -> tuple[int, np.random.Generator]:
        rng = np.random.default_rng((seed, position, 2))
        place = int(np.searchsorted(np.cumsum(self.shares)[:-1], rng.random(), side="right"))
        return list(self.examples)[place], rng


@dataclass(frozen=True)
class Stream:
    """An endless sequence of examples in batches.

    Attributes:
        source: examples by index; picklable where workers are used, as a `Dataset` is.
        transform: (example, generator) -> Example, or a dict of arrays; None takes examples as they are. Picklable
            where workers are used (a class of `transforms`, or a function at the top of a module).
        batch: examples of a batch, over all processes.
        order: which example stands at a position.
    """

    source: Sequence[Any]
    transform: Transform | None
    batch: int
    order: Order = Shuffled()

    def __post_init__(self) -> None:
        """Raises UserError for an empty source or a batch below 1."""
        if len(self.source) == 0:
            raise UserError("the dataset is empty: there are no examples to draw; check its folder and split")
        if self.batch < 1:
            raise UserError(f"batch: {self.batch}; give at least 1")

    def rows(self, positions: range, seed: int) -> Batch:
        """Returns the examples at these positions as one batch."""
        indices = [self.order(position, len(self.source), seed) for position in positions]
        return stack([self._example(*pair, seed) for pair in zip(positions, indices, strict=True)])

    def _example(self, position: int, index: int, seed: int) -> Any:
        example = self.source[index]
        if self.transform is None:
            return example
        rng = np.random.default_rng((seed, position))
        wanted = self.order.wanted(position, seed) if isinstance(self.order, RareClasses) else None
        return self.transform(example, rng) if wanted is None else self.transform(example, rng, wanted)


def batches(
    streams: Stream | Mapping[str, Stream],
    seed: int,
    *,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Returns the endless batches of one stream, or of several as {name: batch of that stream} with one position.

    The batch of a stream is {"image": uint8 [b, H, W, 3], "labels": uint8 [b, H, W]} (without labels no "labels"), or
    what the transform's dicts hold, stacked. Process p of n gets rows p*b to (p+1)*b of what a single process would
    get. The order of a named stream depends on seed and name.

    Raises UserError for a batch that cannot be split over the processes.
    """
    named = {"": streams} if isinstance(streams, Stream) else dict(streams)
    for name, stream in named.items():
        if stream.batch % process_count:
            raise UserError(
                f"{name + '.' if name else ''}batch: {stream.batch} cannot be split over {process_count} processes; "
                f"take a multiple of {process_count}"
            )
    sizes: dict[str, Any] = {n: {"examples": len(one.source), "batch": one.batch} for n, one in named.items()}
    make_batch = functools.partial(_make_batch, named, seed, process_index, process_count)
    return Batches(make_batch, {"seed": seed, **sizes.get("", sizes)}, workers)


def _make_batch(streams: dict[str, Stream], seed: int, process_index: int, process_count: int, number: int) -> Batch:
    """Returns one process's rows of batch `number`."""
    batch: Batch = {}
    for name, stream in streams.items():
        rows = stream.batch // process_count
        first = number * stream.batch + process_index * rows
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest()
        batch[name] = stream.rows(range(first, first + rows), int.from_bytes(digest) if name else seed)
    return batch.get("", batch)
