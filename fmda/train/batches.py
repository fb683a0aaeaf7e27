"""Batches on their way to the devices, one ahead, each with the loader's position behind it."""

import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
from jax.sharding import Mesh

from fmda.mesh import shard_batch


class Batches(Protocol):
    """An iterator of host batches that can be put back to where it was; grain's iterators are such.

    A batch is a tree of numpy arrays [B, ...], of the same shapes every time; with several processes each draws its own
    part. `get_state` returns JSON values that depend only on how many batches were drawn.
    """

    def __next__(self) -> Any:
        """Returns the next batch, or raises StopIteration."""
        ...

    def get_state(self) -> Any:
        """Returns the position behind the last batch drawn."""
        ...

    def set_state(self, state: Any) -> None:
        """Goes to a position that `get_state` returned."""
        ...


class NumberedBatches:
    """Batches made by a function of their number 0, 1, 2, ...: rendered ones, synthetic ones, slices of an array."""

    def __init__(self, make_batch: Callable[[int], Any]) -> None:
        self._make_batch = make_batch
        self._next = 0

    def __iter__(self) -> "NumberedBatches":
        return self

    def __next__(self) -> Any:
        batch = self._make_batch(self._next)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Returns {"next": number of the batch to come}."""
        return {"next": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to the batch `state["next"]`."""
        self._next = state["next"]


class Placed(NamedTuple):
    """A batch on the devices, its global number of examples, and the loader's position behind it (JSON text)."""

    arrays: Any
    examples: int
    position: str


class Feed:
    """Draws batches and places them on the mesh; `waited` sums the seconds that `next` of the loader took."""

    def __init__(self, batches: Batches, mesh: Mesh, clock: Callable[[], float] = time.monotonic) -> None:
        self._batches = batches
        self._mesh = mesh
        self._clock = clock
        self.waited = 0.0

    def draw(self) -> Placed | None:
        """Returns the next batch, on its way to the devices, or None when there are no more."""
        start = self._clock()
        try:
            # The loader is the caller's: it may well compute on a device, with transfers of its own.
            with jax.transfer_guard("allow"):
                batch = next(self._batches)
        except StopIteration:
            return None
        finally:
            self.waited += self._clock() - start
        position = json.dumps(self._batches.get_state(), default=int)
        arrays = shard_batch(batch, self._mesh)
        examples = max((leaf.shape[0] for leaf in jax.tree.leaves(arrays) if leaf.ndim), default=1)
        return Placed(arrays, examples, position)
