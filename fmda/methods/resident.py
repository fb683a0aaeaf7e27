"""Tasks whose small datasets lie on the devices, so that a step does not wait for the host."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from fmda.augment.geometry import flipped, windows
from fmda.data.resident import resident
from fmda.data.streams import Stream
from fmda.perf.memory import device_memory
from fmda.train import Outcome, Task, TrainState

SHARE = 0.1
UNKNOWN = 10 * 2**30


def with_resident_data(task: Task, names: Collection[str] | None = None) -> Task:
    """Returns the task with those of its streams held on every device, as uint8, that together fit.

    Batches, positions and results stay the same, bit for bit; only who crops and flips changes. A stream fits if its
    transform is one that `fmda.data.resident` knows and it takes at most `SHARE` of a device's memory.

    Args:
        task: its objective is given the windows as if the host had cut them.
        names: streams that may be held; None: all. A stream without a name is called "".
    """
    streams = {"": task.streams} if isinstance(task.streams, Stream) else dict(task.streams)
    budget = SHARE * device_memory().get("limit", UNKNOWN)
    arrays: dict[str, Any] = {}
    crops: dict[str, tuple[int, int]] = {}
    for name in streams if names is None else names:
        if (held := resident(streams[name], budget)) is not None:
            arrays[name], crops[name], streams[name] = held
            budget -= sum(array.nbytes for array in held.arrays.values())
    if not arrays:
        return task

    def objective(params: Any, state: TrainState, frozen: Any, batch: Mapping[str, Any], key: Any) -> Outcome:
        def examples(name: str, places: Any) -> Any:
            if name not in crops:
                return places
            cut = windows(frozen["resident"][name], places["row"], places["top"], places["left"], crops[name])
            return flipped(cut, places["flip"]) | {key: places[key] for key in ("margins",) if key in places}

        if "" in crops:
            examples_batch = examples("", batch)
        else:
            examples_batch = {name: examples(name, part) for name, part in batch.items()}
        return task.objective(params, state, frozen["task"], examples_batch, key)

    frozen = {"task": task.frozen, "resident": arrays}
    return replace(task, objective=objective, frozen=frozen, streams=streams.get("", streams))
