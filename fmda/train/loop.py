"""The loop that trains everything: compiles first, never waits for a number, survives being killed."""

import contextlib
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import fmda
from fmda.errors import UserError, did_you_mean
from fmda.mesh import Rule, place, replicate, replicated
from fmda.progress import Line
from fmda.train.batches import Batches, Feed
from fmda.train.checkpoints import Checkpoints, claim
from fmda.train.log import MetricLog
from fmda.train.meter import Meter, status
from fmda.train.signals import Stopped, StopSignals
from fmda.train.start import starting_state
from fmda.train.step import Step, TrainState
from fmda.trees import Tree

MIB = 2**20


def fit(
    step: Step,
    init: Callable[[Any], TrainState],
    frozen: Any,
    batches: Batches,
    *,
    steps: int,
    mesh: Mesh,
    rules: Sequence[Rule],
    folder: str | Path,
    key: Any,
    log_every: int = 50,
    save_steps: int = 1000,
    save_minutes: float = 10.0,
    keep: int = 2,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    evaluate_steps: int | Collection[int] | None = None,
    best: str | None = None,
    best_mode: Literal["max", "min"] = "max",
    weights: Tree | None = None,
    continue_from: str | Path | None = None,
    config: Any = None,
    flops_per_example: float | None = None,
    peak_flops: float | None = None,
    tensorboard: bool = False,
    what: str = "train",
    clock: Callable[[], float] = time.monotonic,
) -> TrainState:
    """Returns the state after `steps` updates in all, those of earlier, interrupted calls on the same folder included.

    Killed at any moment and called again, it ends with the same bits as if it had not been interrupted, on the same
    number of devices of the same kind, as long as the step itself is deterministic there.

    Args:
      step: from `make_step`; jitted here, with the state donated.
      init: random key -> `TrainState`; jitted here, so that the state is born sharded.
      frozen: tree of arrays the step reads without training them; replicated unless already placed on the mesh.
      batches: host batches whose position can be saved; see `Batches`.
      steps: number of updates.
      mesh: from `make_mesh`.
      rules: sharding rules for the state (paths `params/...`, `opt/...`, `teacher/...`); see `place`.
      folder: run folder; gets `metrics.jsonl`, `checkpoints/`, `train.json`. Several processes must share it.
      key: root key of all randomness; the step folds its number in.
      log_every: steps between lines of `metrics.jsonl`.
      save_steps, save_minutes: a checkpoint is written whenever either has passed, and at the end.
      keep: how many of the newest checkpoints stay.
      evaluate: state -> scores, called at the end and every `evaluate_steps` steps, or at those steps (None: at the
        end only); logged as `eval/<name>`.
      best, best_mode: name of the score by which one more checkpoint stays; then each evaluation saves one.
      weights: parameters to begin with, all or some of them.
      continue_from: run folder whose newest checkpoint, step and data position included, this run begins with.
      config: JSON values that identify the run; a folder that holds a run with others is refused.
      flops_per_example, peak_flops: model FLOPs for one example, forward and backward, and what one device can do in a
        second; both together give MFU.
      tensorboard: whether to write event files to `<folder>/tensorboard` too.
      what: name of the task in the progress line.
      clock: seconds, for tests.

    Raises:
      UserError: less than a step between logs or saves, folder of another configuration, full or read-only disk, unfit
        checkpoint or weights, batches that end too early, a loss that is no number.
      Stopped: after SIGTERM or Ctrl-C, when everything is saved.
    """
    if log_every < 1 or save_steps < 1:
        raise UserError(f"log_every, save_steps: {log_every}, {save_steps}; give at least 1")
    folder = Path(folder)
    if config is not None:
        claim(folder, config)
    shapes = jax.eval_shape(init, key)
    shardings = place(shapes, rules, mesh)
    target = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)
    with (
        Line() as line,
        StopSignals() as stop,
        Checkpoints(folder, keep=keep, best=best, best_mode=best_mode) as checkpoints,
    ):
        state, position, origin = starting_state(
            checkpoints, init, key, target, continue_from=continue_from, weights=weights
        )
        begin = int(state.step)
        if begin >= steps:
            return state
        line.note(f"{what}: {origin}")
        if position is not None:
            batches.set_state(position)
        key, frozen = replicate((key, frozen), mesh)
        feed = Feed(batches, mesh, clock)
        batch = feed.draw()
        if batch is None:
            raise _too_short(begin, steps)
        compiled = _compiled(step, target, frozen, batch.arrays, key, mesh, line, what)

        log = MetricLog(folder, begin, tensorboard)
        meter = Meter(flops_per_example, peak_flops and peak_flops * mesh.size, clock)
        requests = _Requests(stop, save_minutes * 60, log_every, clock)
        meta = {"config": config, "versions": {"fmda": fmda.__version__, "jax": jax.__version__}}
        running: Any = None
        reading: dict[str, float] = {}
        with contextlib.closing(log), jax.transfer_guard("disallow"):
            for number in range(begin + 1, steps + 1):
                state, metrics = compiled(state, frozen, batch.arrays, key)
                position, last = batch.position, number == steps
                meter.count(batch.examples)
                following = None if last else feed.draw()
                # One step may be queued behind the running one, not more: each holds a batch on the devices.
                jax.block_until_ready(running)
                running = metrics
                if last or number % log_every == 0:
                    reading = meter.read(feed.waited)
                    log.take(number, metrics, reading)
                line.update(status(what, number, steps, log.loss, reading, meter.seconds_left(steps - number)))

                scores: dict[str, float] | None = None
                if evaluate is not None and (last or _is_due(number, evaluate_steps)):
                    with meter.pause(), jax.transfer_guard("allow"):
                        log.flush()
                        scores = _scores(evaluate, state, best)
                        if scores:
                            log.write(number, {f"eval/{name}": value for name, value in scores.items()})
                signum, due = requests.at(number)
                if last or signum or due or number % save_steps == 0 or (scores and best):
                    with meter.pause():
                        log.flush()
                        log.check(number, metrics)
                        checkpoints.save(number, state, json.loads(position), meta, scores)
                    requests.saved()
                if signum and not last:
                    checkpoints.wait()
                    line.note(f"{what}: stopped and saved at step {number}; the same command goes on from there")
                    raise Stopped(signum)
                if following is None and not last:
                    checkpoints.wait()
                    raise _too_short(number, steps)
                batch = following or batch
        checkpoints.wait()
        line.update(status(what, steps, steps, log.loss, reading, None))
    return state


class _Requests:
    """Whether the loop is asked to stop, or to save because minutes have passed; all processes get the same answer."""

    def __init__(self, stop: StopSignals, seconds: float, every: int, clock: Callable[[], float]) -> None:
        self._stop, self._seconds, self._every, self._clock = stop, seconds, every, clock
        self._saved = clock()

    def saved(self) -> None:
        """Notes that a checkpoint was written now."""
        self._saved = self._clock()

    def at(self, number: int) -> tuple[int, bool]:
        """Returns (signal number or 0, whether a save is due). Several processes ask each other at log steps only."""
        own = (self._stop.received or 0, self._clock() - self._saved >= self._seconds)
        if jax.process_count() == 1:
            return own
        if number % self._every:
            return 0, False
        with jax.transfer_guard("allow"):
            signum, due = multihost_utils.process_allgather(np.asarray(own, np.int32)).max(axis=0)
        return int(signum), bool(due)


def _compiled(
    step: Step, target: TrainState, frozen: Any, arrays: Any, key: Any, mesh: Mesh, line: Line, what: str
) -> Callable[..., tuple[TrainState, Any]]:
    """Returns the step compiled for these shapes and shardings, and notes how long that took and what it needs."""
    start = time.perf_counter()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
    compiled = jitted.lower(target, frozen, arrays, key).compile()
    text = f"{what}: compiled in {time.perf_counter() - start:.1f} s"
    memory = compiled.memory_analysis()
    if memory is not None:
        arguments, temporaries = memory.argument_size_in_bytes / MIB, memory.temp_size_in_bytes / MIB
        text += f"; each device needs {arguments:.1f} MiB for arguments and {temporaries:.1f} MiB for temporaries"
    line.note(text)
    return compiled


def _is_due(number: int, steps: int | Collection[int] | None) -> bool:
    if not steps:
        return False
    return number % steps == 0 if isinstance(steps, int) else number in steps


def _scores(
    evaluate: Callable[[TrainState], Mapping[str, float]], state: TrainState, best: str | None
) -> dict[str, float]:
    scores = {name: float(value) for name, value in evaluate(state).items()}
    if best is not None and best not in scores:
        raise UserError(f"best: the evaluation returns no '{best}'{did_you_mean(best, scores)}")
    return scores


def _too_short(step: int, steps: int) -> UserError:
    return UserError(f"batches: they end after step {step} of {steps}; allow more epochs, or ask for fewer steps")
