"""The loop that trains everything: compiles first, never waits for a number, survives being killed."""

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

import fmda
from fmda.data.streams import batches
from fmda.errors import UserError, did_you_mean, disk_errors
from fmda.mesh import make_mesh, place, replicate, replicated, shard_batch
from fmda.perf.peaks import peak_flops
from fmda.progress import Line
from fmda.runs import identity
from fmda.train.checkpoints import Checkpoints, starting_state
from fmda.train.metrics import Meter, MetricLog, status
from fmda.train.step import Step, TrainState, step_flops
from fmda.train.stop import Stopped, StopSignals, Watch
from fmda.train.task import Guided, Loader, Task, TrainerConfig

MIB = 2**20


def run_task(task: Task, settings: TrainerConfig, folder: str | Path) -> TrainState:
    """Returns the state after `settings.steps` updates, or `settings.minutes`, resuming in `folder`; see `fit`."""
    processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    mesh = make_mesh(*settings.mesh)
    with contextlib.ExitStack() as opened:
        plain = opened.enter_context(batches(task.streams, settings.seed, workers=settings.workers, **processes))
        loader = plain if task.guide is None else opened.enter_context(task.guide(plain, mesh, Path(folder)))
        return fit(task, settings, folder, loader, mesh)


def fit(
    task: Task,
    settings: TrainerConfig,
    folder: str | Path,
    loader: Loader,
    mesh: Mesh,
    clock: Callable[[], float] = time.monotonic,
) -> TrainState:
    """Returns the state after all updates, those of earlier, interrupted calls on the same folder included.

    Killed at any moment and called again, it ends with the same bits as if it had not been interrupted, on the same
    number of devices of the same kind, as long as the step is deterministic there and no time limit is set.

    Args:
        task, settings: what is trained, and how long.
        folder: gets `metrics.jsonl`, `checkpoints/` and `identity.json`. Several processes must share it.
        loader: batches of `task.streams`, guided where the task asks for it.
        mesh: devices of the run.
        clock: seconds, for tests.

    Raises:
        UserError: folder of another run, full or read-only disk, checkpoint or weights that do not fit, a non-finite
            loss, a score that `settings.best` names but no evaluation returns.
        Stopped: after SIGTERM or Ctrl-C, when everything is saved.
    """
    folder, steps = Path(folder), settings.steps
    _check_best(task, settings)
    _claim(folder, {"config": settings, **task.facts})
    init, key = task.initial_state(steps), jax.random.key(settings.seed)
    shapes = jax.eval_shape(init, key)
    shardings = place(shapes, task.rules, mesh)
    target = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)
    limit = None if settings.minutes is None else settings.minutes * 60
    with (
        Line() as line,
        StopSignals() as signals,
        Checkpoints(folder, best=settings.best, best_mode=settings.best_mode) as checkpoints,
    ):
        state, data, origin = starting_state(checkpoints, init, key, target, weights=task.weights)
        begin, used = int(state.step), float(data.get("seconds", 0.0))
        if begin >= steps or limit and used >= limit:
            return state
        line.note(f"{task.name}: {origin}")
        if data:
            loader.set_state(data["position"])
        key, frozen = replicate((key, task.frozen), mesh)
        feed = _Feed(loader, mesh, clock)
        feed.follow(begin, state, {})
        batch = feed.draw()
        position = None if limit is None else _position(begin, 0.0, steps, mesh)
        line.note(f"{task.name}: compiling the training step ...")
        compiled = _compiled(task, steps, target, (frozen, batch.arrays, key, position), mesh, line)

        log = MetricLog(folder, begin, settings.tensorboard)
        peak = peak_flops(dtype=task.precision)
        work = peak and step_flops(task.objective, target, frozen, batch.arrays, key) / batch.examples
        meter = Meter(work, peak and peak * mesh.size, clock)
        watch = Watch(signals, settings.save_minutes * 60, limit, used, settings.log_every, clock)
        meta = {"config": identity.recorded(settings), "versions": {"fmda": fmda.__version__, "jax": jax.__version__}}
        running: Any = None
        reading: dict[str, float] = {}
        with contextlib.closing(log), jax.transfer_guard("disallow"):
            for number in range(begin + 1, steps + 1):
                last = number == steps or watch.share >= 1.0
                if limit is not None:
                    position = _position(number - 1, watch.share, steps, mesh)
                state, metrics = compiled(state, frozen, batch.arrays, key, position)
                data_position = batch.position
                meter.count(batch.examples)
                if not last:
                    feed.follow(number, state, metrics)
                batch = batch if last else feed.draw()
                # One step may be queued behind the running one, not more: each holds a batch on the devices.
                jax.block_until_ready(running)
                running = metrics
                if last or number % settings.log_every == 0:
                    reading = meter.read(feed.waited, feed.idle)
                    log.take(number, metrics, reading)
                left = meter.seconds_left(steps - number, watch.seconds_left)
                line.update(status(task.name, number, steps, log.loss, reading, left))

                if task.snapshots is not None and number in task.snapshots.steps:
                    with meter.pause(), jax.transfer_guard("allow"):
                        log.flush()
                        task.snapshots.run(state)
                scores: dict[str, float] = {}
                for evaluator in task.evaluators:
                    if last or evaluator.every and number % evaluator.every == 0:
                        with meter.pause(), jax.transfer_guard("allow"):
                            log.flush()
                            pairs = evaluator.run(state)
                            scores |= {f"{evaluator.name}/{name}": float(value) for name, value in pairs}
                if scores:
                    log.write(number, scores)
                    _check_scores(settings.best, scores)
                signum, due = watch.after(number, metrics)
                if last or signum or due or number % settings.save_steps == 0 or settings.best in scores:
                    with meter.pause():
                        log.flush()
                        log.check(number, metrics)
                        saved = {"position": json.loads(data_position), "seconds": watch.seconds}
                        checkpoints.save(number, state, saved, meta, scores if settings.best in scores else None)
                    watch.saved()
                if last:
                    break
                if signum:
                    checkpoints.wait()
                    line.note(f"{task.name}: stopped and saved at step {number}; the same command resumes there")
                    raise Stopped(signum)
        checkpoints.wait()
        line.update(status(task.name, number, steps, log.loss, reading, None))
    return state


def _check_best(task: Task, settings: TrainerConfig) -> None:
    names = [evaluator.name for evaluator in task.evaluators]
    if settings.best is not None and settings.best.split("/")[0] not in names:
        known = f"give <evaluation>/<score> with one of: {', '.join(names)}" if names else "this task has none"
        raise UserError(f"best: '{settings.best}' is not a score of an evaluation; {known}")


def _check_scores(best: str | None, scores: Mapping[str, float]) -> None:
    """Raises UserError where the evaluation that `best` names was made and has no such score."""
    mates = [name for name in scores if best is not None and name.split("/")[0] == best.split("/")[0]]
    if mates and best not in mates:
        raise UserError(f"best: the evaluation returns no '{best}'{did_you_mean(str(best), mates)}")


def _claim(folder: Path, facts: Mapping[str, Any]) -> None:
    """Records what the folder holds, or raises UserError where it holds another run; process 0 writes."""
    with disk_errors(folder):
        if jax.process_index() == 0 or (folder / identity.RECORD).is_file():
            identity.claim(folder, facts)


def _position(done: int, share: float, steps: int, mesh: Mesh) -> jax.Array:
    """Returns the place in the schedule, on the devices: finished steps, or as many as the used time stands for."""
    return replicate(np.float32(max(done, min(1.0, share) * steps)), mesh)


def _compiled(
    task: Task, steps: int, target: TrainState, arguments: tuple[Any, ...], mesh: Mesh, line: Line
) -> Callable[..., tuple[TrainState, Any]]:
    """Returns the step compiled for these shapes and shardings; notes how long that took and the memory it needs."""
    start = time.perf_counter()
    step: Step = task.step(steps)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
    compiled = jitted.lower(target, *arguments).compile()
    text = f"{task.name}: compiled in {time.perf_counter() - start:.1f} s"
    memory = compiled.memory_analysis()
    if memory is not None:
        argument_mib, temporary_mib = memory.argument_size_in_bytes / MIB, memory.temp_size_in_bytes / MIB
        text += f"; each device needs {argument_mib:.1f} MiB for arguments and {temporary_mib:.1f} MiB for temporaries"
    line.note(text)
    return compiled


class _Placed(NamedTuple):
    """A batch on the devices, its global number of examples, and the loader's position after it (JSON text)."""

    arrays: Any
    examples: int
    position: str


class _Feed:
    """Draws batches and places them on the mesh; `waited` sums the seconds that `next` of the loader took."""

    def __init__(self, loader: Loader, mesh: Mesh, clock: Callable[[], float]) -> None:
        self._loader, self._mesh, self._clock = loader, mesh, clock
        self.waited = 0.0

    @property
    def idle(self) -> float | None:
        """Seconds for which the devices waited for batches that depend on the state; None for others."""
        return self._loader.waited if isinstance(self._loader, Guided) else None

    def follow(self, step: int, state: TrainState, metrics: Mapping[str, Any]) -> None:
        """Shows the state after a step to batches that depend on it."""
        if isinstance(self._loader, Guided):
            with jax.transfer_guard("allow"):
                self._loader.follow(step, state, metrics)

    def draw(self) -> _Placed:
        """Returns the next batch, on its way to the devices."""
        start = self._clock()
        # The loader is the caller's: it may well compute on a device, with transfers of its own.
        with jax.transfer_guard("allow"):
            batch = next(self._loader)
        self.waited += self._clock() - start
        position = json.dumps(self._loader.get_state(), default=int)
        arrays = shard_batch(batch, self._mesh)
        examples = max((leaf.shape[0] for leaf in jax.tree.leaves(arrays) if leaf.ndim), default=1)
        return _Placed(arrays, examples, position)
