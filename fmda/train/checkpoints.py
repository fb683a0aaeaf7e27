"""Checkpoints of a run: arrays, what they are, and the loader's position, written while training goes on.

A run folder holds `checkpoints/<step>/` with the items `state` (arrays), `meta` (JSON: configuration, versions) and
`data` (JSON: loader position, seconds of training). A checkpoint appears under its final name only when it is whole.
"""

import asyncio
import contextlib
import gc
import logging
import math
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers as policies

from fmda import trees
from fmda.errors import UserError, did_you_mean, disk_errors
from fmda.mesh import distribute
from fmda.runs.journal import read_rows
from fmda.train.step import TrainState
from fmda.trees import Tree

METRICS = "metrics.jsonl"
"""Metrics of a run folder, as JSON lines."""

_LEAST_SLICE = 2**20
"""Bytes of an array's slice below which one replica writes the array whole."""

_PACKAGE = f"{os.sep}orbax{os.sep}"
_FILES = ("_CHECKPOINT_METADATA", "state/_METADATA", "meta/metadata", "data/metadata")


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Drops what orbax's threads print about faults inside the context: each fault reaches us as an exception too.

    Tasks that a fault abandoned are collected before the context ends, since they report when they are.
    """

    def keep(record: logging.LogRecord) -> bool:
        text, fault = record.getMessage(), record.exc_info[1] if record.exc_info else None
        # a task names the code it ran, a bare future nothing but what the array store or the file system said
        echo = record.name == "asyncio" and (_PACKAGE in text or "os_error_code" in text or "OCDBT" in text)
        return _PACKAGE not in record.pathname and not echo and not late(fault) and not raised_there(fault)

    def late(fault: BaseException | None) -> bool:
        # reads and writes under way when another one failed report to an event loop that is gone, or are abandoned
        return isinstance(fault, RuntimeError) and str(fault) == "Event loop is closed"

    def raised_there(fault: BaseException | None) -> bool:
        frames = traceback.walk_tb(fault.__traceback__ if fault else None)
        return any(_PACKAGE in frame.f_code.co_filename for frame, _ in frames)

    def unraisable(fault: Any) -> None:
        code = getattr(fault.object, "cr_code", None)
        if not late(fault.exc_value) and not (code is not None and _PACKAGE in code.co_filename):
            hook(fault)

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio", "concurrent.futures")]
    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    for logger in loggers:
        logger.addFilter(keep)
    # Of a write that was to begin when another one failed Python knows the name alone, not the package. It may be heard
    # of as late as when the process ends, so the filter stays.
    warnings.filterwarnings("ignore", "coroutine '.*(serialize|_read_|ocdbt).*' was never awaited", RuntimeWarning)
    try:
        yield
    except BaseException as fault:
        _collect_tasks(fault)
        raise
    finally:
        sys.unraisablehook = hook
        for logger in loggers:
            logger.removeFilter(keep)


def _collect_tasks(fault: BaseException | None) -> None:
    """Waits for orbax's threads and retrieves the faults of abandoned tasks, which are else reported at exit."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            threading.Thread.join(thread, timeout=10)  # orbax's own `join` raises
    while fault is not None:
        traceback.clear_frames(fault.__traceback__)
        fault = fault.__cause__ or fault.__context__
    for task in gc.get_objects():
        # by type: other objects may warn or fail where `isinstance` reads their `__class__`
        if issubclass(type(task), asyncio.Future) and task.done() and not task.cancelled():
            text = repr(task)
            if _PACKAGE in text or "os_error_code" in text or "OCDBT" in text:
                task.exception()
    gc.collect()


class Checkpoints:
    """The checkpoints of one run folder; a context manager that waits for unfinished writes at its end.

    Keeps the last `keep` checkpoints, and the one with the best value of the metric named `best`. What an interrupted
    write left behind is removed on opening.
    """

    def __init__(
        self, folder: Path, *, keep: int = 2, best: str | None = None, best_mode: Literal["max", "min"] = "max"
    ) -> None:
        self.folder = folder / "checkpoints"
        kept: list[policies.PreservationPolicy] = [policies.LatestN(keep)]
        self._tracks_best = best is not None

        def goodness(metrics: Mapping[str, float]) -> float:
            score = float(metrics.get(best or "", math.nan))
            return -math.inf if math.isnan(score) else score if best_mode == "max" else -score

        if best is not None:
            kept.append(policies.BestN(get_metric_fn=goodness, n=1, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            best_fn=goodness if best is not None else None,
            cleanup_tmp_directories=True,
        )
        # Replicas share the writing of large arrays alone: with a slice for each device, many small ones take seconds.
        arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_LEAST_SLICE)
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        handlers = {"state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry)} | {
            name: ocp.JsonCheckpointHandler() for name in ("meta", "data")
        }
        with contextlib.ExitStack() as opening:
            opening.enter_context(quiet_orbax())
            opening.enter_context(disk_errors(self.folder))
            self._manager = ocp.CheckpointManager(self.folder.resolve(), options=options, item_handlers=handlers)
            for step in list(self._manager.all_steps()):
                if not _whole(self.folder, step):
                    self._manager.delete(step)
            # Stays open until the manager is closed: the filter for its background threads, and the naming of faults.
            self._open = opening.pop_all()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, fault: BaseException | None, trace: object) -> None:
        if kind is None:
            with self._open:
                self._manager.close()
            return
        # The fault that ends the context is the one to report, not what closing may add; see `quiet_orbax`.
        with contextlib.suppress(Exception):
            self._manager.close()
        _collect_tasks(fault)
        self._open.close()

    def latest(self) -> int | None:
        """Returns the step of the newest checkpoint, None without any."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: TrainState,
        data: Mapping[str, Any],
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Copies the state off the devices and writes it in the background; `data` and `meta` are JSON values.

        An earlier write is waited for. Raises UserError when that one, or this one's beginning, met a full or read-only
        disk.
        """
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state._asdict()),
            meta=ocp.args.JsonSave(dict(meta)),
            data=ocp.args.JsonSave(dict(data)),
        )
        with disk_errors(self.folder):
            self._manager.save(step, args=items, metrics=dict(metrics) if metrics and self._tracks_best else None)

    def wait(self) -> None:
        """Returns when everything is on the disk; raises UserError when something could not be written."""
        with disk_errors(self.folder):
            self._manager.wait_until_finished()

    def restore(self, step: int, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns (state, the `data` that it was saved with) of a step.

        `target` holds `ShapeDtypeStruct`s with shardings, which need not be those that the state was saved with: it may
        come from other devices, or another number of them. Raises UserError when a leaf is missing, superfluous or of
        another shape, or a file cannot be read.
        """
        how = ocp.checkpoint_utils.construct_restore_args(target._asdict())
        saved = ocp.args.PyTreeRestore(target._asdict(), restore_args=how)
        items = ocp.args.Composite(state=saved, data=ocp.args.JsonRestore())
        try:
            loaded = self._manager.restore(step, args=items)
        except Exception as fault:
            if isinstance(fault, MemoryError) or "RESOURCE_EXHAUSTED" in str(fault):
                raise
            path, reason = self.folder / str(step), " ".join(str(fault).split()) or type(fault).__name__
            raise UserError(
                f"{path}: cannot be restored ({reason:.240}); it is damaged or of another model: move it away to "
                "resume at an earlier checkpoint, or choose another work_dir="
            ) from fault
        return TrainState(**loaded["state"]), loaded["data"]


def _whole(root: Path, step: int) -> bool:
    return all((root / str(step) / name).is_file() for name in _FILES)


def read_params(
    folder: str | Path, which: Literal["params", "teacher", "aux"] = "params", *, step: int | None = None
) -> Tree:
    """Returns the parameters of a run folder's newest checkpoint (or of `step`), on one device; or another part of it.

    No model is needed: shapes and dtypes come from the checkpoint. A process of several may call it by itself: nothing
    waits for the others. Raises UserError where there is no checkpoint.
    """
    root = Path(folder) / "checkpoints"
    steps = sorted(int(path.name) for path in root.glob("*") if path.name.isdecimal())
    whole = [number for number in steps if _whole(root, number)]
    if step is None and whole:
        step = whole[-1]
    if step not in whole:
        which_one = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise UserError(f"{root}: holds {which_one}; train first, or name another run folder")
    path = root.resolve() / str(step) / "state"
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"{me}")
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with (
        quiet_orbax(),
        contextlib.closing(ocp.Checkpointer(handler, multiprocessing_options=alone)) as reader,
    ):
        saved = reader.metadata(path).item_metadata.tree[which]
        device = SingleDeviceSharding(jax.local_devices()[0])
        target = {which: jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), saved)}
        wanted = ocp.args.PyTreeRestore(
            item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
        )
        loaded = reader.restore(path, args=wanted)[which]
    return trees.unflatten(trees.leaf_paths(loaded))


def best_step(folder: str | Path, name: str, mode: Literal["max", "min"] = "max") -> int:
    """Returns the step, of those with a checkpoint in a run folder, whose evaluation has the best score of that name.

    Ties go to the earlier step. Raises UserError where no checkpoint has such a score.
    """
    root = Path(folder) / "checkpoints"
    rows = [row for row in read_rows(Path(folder) / METRICS) if isinstance(row.get(name), int | float)]
    scores = {row["step"]: row[name] for row in rows if _whole(root, row["step"])}
    if not scores:
        raise UserError(f"{folder}: no checkpoint has a score '{name}'; train with best={name}")
    return (max if mode == "max" else min)(sorted(scores), key=lambda step: scores[step])


def starting_state(
    checkpoints: Checkpoints,
    init: Callable[[Any], TrainState],
    key: Any,
    target: TrainState,
    weights: Tree | None = None,
) -> tuple[TrainState, dict[str, Any], str]:
    """Returns (state on the devices, data of the checkpoint or {}, a phrase that names the origin).

    First of these that applies: the newest checkpoint of this run; `init(key)` with the parameters of `weights` in
    place of its own, in the teacher too; `init(key)`. `target` is the state as `ShapeDtypeStruct`s with shardings.
    """
    step = checkpoints.latest()
    if step is not None:
        return *checkpoints.restore(step, target), f"resuming at step {step}"
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    if weights is None:
        return jax.jit(init, out_shardings=shardings)(key), {}, "starting from random parameters"
    _check_weights(weights, target.params)
    leaves = trees.flatten(target.params)
    where = trees.unflatten({path: leaves[path].sharding for path in trees.flatten(weights)})
    # in one program, which leaves out the draws of what is replaced: compiling those can take minutes
    start = jax.jit(lambda key, weights: _with_weights(init(key), weights), out_shardings=shardings)
    state = start(key, distribute(weights, where))
    return state, {}, f"starting from configured weights ({trees.count(weights):,} of {trees.count(state.params):,})"


def _with_weights(state: TrainState, weights: Tree) -> TrainState:
    """Returns the state with copies of the weights: the caller's arrays must not be donated."""
    leaves = trees.flatten(weights)

    def filled(tree: Tree) -> Tree:
        flat = trees.flatten(tree)
        return trees.unflatten(
            {path: jnp.copy(leaves[path]).astype(leaf.dtype) if path in leaves else leaf for path, leaf in flat.items()}
        )

    return state._replace(params=filled(state.params), teacher=filled(state.teacher))


def _check_weights(weights: Tree, params: Tree) -> None:
    shapes = trees.flatten(params)
    for path, leaf in trees.flatten(weights).items():
        if path not in shapes:
            raise UserError(f"initial weights: '{path}' is not a parameter of the model{did_you_mean(path, shapes)}")
        if leaf.shape != shapes[path].shape:
            raise UserError(f"initial weights: '{path}' has shape {leaf.shape}, the model {shapes[path].shape}")
