"""The loop: resuming, saving by the clock, evaluation, starting points, bad input."""

import dataclasses
import json
import signal
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import regression
from regression import RULES, NumberedBatches, run, stopping, take_row

from fmda.atomic import write_atomic
from fmda.data.streams import Stream
from fmda.errors import UserError
from fmda.methods import kinds
from fmda.methods.trainer import trainer_stages
from fmda.runs.stages import Stage
from fmda.train import OptimConfig, Outcome, Snapshot, Stopped, TrainerConfig, loop, run_task


def interrupted(folder, step, **changes):
    """Runs until a signal in a step, which is saved."""
    with pytest.raises(Stopped):
        run(folder, loader=stopping(step), **changes)
    assert kept(folder)[-1] == step


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("time", None)
    return lines


def equal(first, second):
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(np.array_equal(one, other) for one, other in leaves)


def kept(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Returns (state, folder) of a run of ten steps in one go."""
    folder = tmp_path_factory.mktemp("unbroken")
    return run(folder), folder


def test_loss_falls_and_every_log_step_is_written(unbroken):
    lines = records(unbroken[1])
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
    assert set(lines[0]) == {"step", "loss", "error", "grad_norm", "learning_rate"}
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_two_halves_make_the_whole_bit_for_bit(tmp_path, unbroken):
    interrupted(tmp_path, 5)
    state = run(tmp_path)
    assert equal(state, unbroken[0])
    assert records(tmp_path) == records(unbroken[1])


def test_a_finished_run_returns_at_once_without_drawing_a_batch(unbroken):
    def never(number):
        raise AssertionError(number)

    assert equal(run(unbroken[1], loader=NumberedBatches(never)), unbroken[0])


def test_saves_by_the_clock_and_at_the_end(tmp_path):
    now = [0.0]

    def make_batch(number):
        now[0] += 60.0
        return regression.batch(number)

    run(
        tmp_path,
        steps=12,
        loader=NumberedBatches(make_batch),
        clock=lambda: now[0],
        save_steps=1000,
        save_minutes=5.0,
    )
    assert kept(tmp_path) == [10, 12]


def test_saves_by_steps_begin_the_minutes_anew(tmp_path):
    now = [0.0]

    def make_batch(number):
        now[0] += 60.0
        return regression.batch(number)

    source = NumberedBatches(make_batch)
    run(tmp_path, steps=9, loader=source, clock=lambda: now[0], save_steps=3, save_minutes=4.0)
    assert kept(tmp_path) == [6, 9]


class Scored(NamedTuple):
    name: str
    every: int
    run: Any


def evaluator(name, every, scores):
    def scores_of(state):
        # Transfers are an evaluation's own affair.
        assert jnp.isfinite(state.teacher["up"]["kernel"]).all()
        yield "miou", scores[int(state.step)]
        yield "accuracy", 0.5

    return Scored(name, every, scores_of)


def test_evaluations_are_logged_and_the_best_checkpoint_is_kept(tmp_path):
    night, day = {3: 0.2, 6: 0.8, 9: 0.5, 10: 0.1}, {5: 0.9, 10: 0.3}
    evaluators = (evaluator("night", 3, night), evaluator("day", 5, day))
    run(tmp_path, evaluators=evaluators, best="night/miou", save_steps=1)
    logged = {line["step"]: line for line in records(tmp_path) if "loss" not in line}
    assert sorted(logged) == [3, 5, 6, 9, 10]
    assert logged[6] == {"step": 6, "night/miou": 0.8, "night/accuracy": 0.5}
    assert set(logged[10]) == {
        "step",
        *(f"{name}/{score}" for name in ("night", "day") for score in ("miou", "accuracy")),
    }
    assert kept(tmp_path) == [6, 9, 10]


def test_the_best_may_be_the_smallest(tmp_path):
    scores = {3: 0.2, 6: 0.8, 9: 0.5, 10: 0.4}
    run(tmp_path, evaluators=[evaluator("val", 3, scores)], best="val/miou", best_mode="min")
    assert kept(tmp_path) == [3, 9, 10]


def test_an_evaluation_without_steps_is_made_at_the_end(tmp_path):
    run(tmp_path, steps=3, evaluators=[evaluator("val", 0, {3: 0.2})])
    assert [line["step"] for line in records(tmp_path) if "val/miou" in line] == [3]


@pytest.mark.parametrize(
    ("best", "words"),
    [
        ("val/mio", "the evaluation returns no 'val/mio'; did you mean 'val/miou'"),
        ("miou", "'miou' is not a score of an evaluation; give <evaluation>/<score> with one of: val"),
    ],
)
def test_best_must_be_a_score(tmp_path, best, words):
    with pytest.raises(UserError, match=f"best: {words}"):
        run(tmp_path, steps=2, evaluators=[evaluator("val", 2, {2: 1.0})], best=best)


def test_snapshots_are_written_at_their_steps_before_the_checkpoint(tmp_path):
    steps = []

    def write(state):
        steps.append(int(state.step))
        assert not (tmp_path / "checkpoints" / str(int(state.step))).exists()

    run(tmp_path, snapshots=Snapshot((2, 7), write), save_steps=1)
    assert steps == [2, 7]
    assert all("loss" in line for line in records(tmp_path))


def test_a_time_limit_ends_the_run_and_the_schedule_with_it(tmp_path):
    now = [0.0]

    def make_batch(number):
        now[0] += 30.0
        return regression.batch(number)

    def limited(loader):
        linear = OptimConfig(method="sgd", learning_rate=1.0, schedule="linear")
        options = {"steps": 1000, "minutes": 4.0, "optim": linear, "rules": RULES[2:], "log_every": 1, "save_steps": 2}
        return run(tmp_path, loader=loader, clock=lambda: now[0], **options)

    class Broken(NumberedBatches):
        def __next__(self):
            if self._next == 5:
                raise UserError("the power fails")
            return super().__next__()

    with pytest.raises(UserError, match="the power fails"):
        limited(Broken(make_batch))
    # two of the eight half minutes were used at the last checkpoint, that of step 2 or 4
    resumed = kept(tmp_path)[-1]
    now[0] += 5000.0
    state = limited(NumberedBatches(make_batch))
    rates = {line["step"]: line["learning_rate"] for line in records(tmp_path)}
    assert int(state.step) == max(rates) <= 10 and resumed in (2, 4)
    # the share of the time, not of the steps, decides; no recompilation is needed for it
    steps = sorted(rates)
    assert rates[steps[-1]] == 0.0 and rates[1] == 1.0
    assert all(rates[a] > rates[b] for a, b in zip(steps, steps[1:], strict=False))
    assert rates[steps[-2]] == pytest.approx(0.125, abs=0.01)
    # the limit is used up: nothing is left to do
    assert int(limited(NumberedBatches(make_batch)).step) == int(state.step)


def test_own_checkpoint_comes_before_weights(tmp_path, unbroken):
    interrupted(tmp_path, 5)
    weights = {"up": {"bias": np.ones(16, np.float32)}}
    assert equal(run(tmp_path, weights=weights), unbroken[0])


def test_weights_replace_parameters_and_teacher_and_are_not_donated(tmp_path):
    elsewhere = jax.device_put(jnp.full((16,), 0.5), jax.devices()[3])
    weights = {"up": {"bias": elsewhere}, "down": {"bias": np.full((4,), 2.0)}}

    def still(params, state, frozen, batch, key):
        return Outcome(jnp.sum(params["up"]["bias"]) * 0.0, {}, {})

    optim = OptimConfig(method="sgd", learning_rate=1.0)
    state = run(tmp_path, steps=2, objective=still, optim=optim, teacher_decay=0.5, weights=weights)
    for tree in (state.params, state.teacher):
        np.testing.assert_array_equal(tree["up"]["bias"], np.full(16, 0.5, np.float32))
        np.testing.assert_array_equal(tree["down"]["bias"], np.full(4, 2.0, np.float32))
    np.testing.assert_array_equal(weights["up"]["bias"], np.full(16, 0.5))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (
            {"up": {"kernal": np.zeros((8, 16))}},
            "'up/kernal' is not a parameter of the model; did you mean 'up/kernel'",
        ),
        ({"up": {"kernel": np.zeros((8, 15))}}, "'up/kernel' has shape .8, 15., the model .8, 16."),
    ],
)
def test_unfit_weights_are_named(tmp_path, weights, words):
    with pytest.raises(UserError, match=f"initial weights: {words}"):
        run(tmp_path, weights=weights)


def test_folder_of_another_run_is_refused_untouched(tmp_path):
    run(tmp_path, steps=2, facts={"weights": "ab12"})
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"another configuration \(config.seed: 0 -> 2.*; choose another work_dir="):
        run(tmp_path, steps=2, facts={"weights": "ab12"}, seed=2)
    with pytest.raises(UserError, match=r"weights: .*ab12.* -> .*cd34"):
        run(tmp_path, steps=2, facts={"weights": "cd34"})
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert kept(tmp_path) == [2]
    # how often to log and save does not change what is made
    run(tmp_path, steps=2, facts={"weights": "ab12"}, log_every=1, save_steps=1, best=None)


def test_a_loss_that_is_no_number_is_not_saved(tmp_path):
    def poisoned(number):
        batch = regression.batch(number)
        return {**batch, "inputs": batch["inputs"] * np.float32(np.nan if number == 6 else 1.0)}

    with pytest.raises(UserError, match="loss is nan at step 7; lower the learning rate"):
        run(tmp_path, loader=NumberedBatches(poisoned), save_steps=1, log_every=100)
    assert kept(tmp_path) == [5, 6]


def test_batches_may_compute_on_a_device(tmp_path, unbroken):
    source = NumberedBatches(
        lambda number: jax.tree.map(lambda leaf: jnp.asarray(leaf) * 1.0, regression.batch(number))
    )
    assert equal(run(tmp_path, loader=source), unbroken[0])


def test_frozen_trees_are_arguments_and_survive(tmp_path, unbroken):
    frozen = {"scale": jnp.float32(1.5)}
    assert equal(run(tmp_path, frozen=frozen), unbroken[0])
    assert frozen["scale"] == 1.5


def test_progress_says_where_it_begins_and_what_it_costs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "peak_flops", lambda dtype: 1e9)
    run(tmp_path, steps=4, name="clip")
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert lines[0] == "clip: starting from random parameters"
    assert lines[1] == "clip: compiling the training step ..."
    assert lines[2].startswith("clip: compiled in ") and "MiB for temporaries" in lines[2]
    assert lines[-1].startswith("clip: step 4/4, loss ") and "MFU" in lines[-1] and "images/s" in lines[-1]


def test_streams_resume_to_the_same_bits(tmp_path, streamed):
    rows = [take_row(regression.batch(number, 1), None) for number in range(16)]
    task = regression.task(streams=Stream(rows, None, 8))
    settings = regression.settings(6, batch=8, save_steps=2, mesh=(4, 2))

    def stop(state):
        if not (tmp_path / "once").exists():
            (tmp_path / "once").touch()
            raise UserError("stopped")

    with pytest.raises(UserError, match="stopped"):
        run_task(dataclasses.replace(task, snapshots=Snapshot((3,), stop)), settings, tmp_path)
    assert equal(run_task(task, settings, tmp_path), streamed)


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """Returns the state of an unbroken run on a stream."""
    rows = [take_row(regression.batch(number, 1), None) for number in range(16)]
    task = regression.task(streams=Stream(rows, None, 8))
    return run_task(task, regression.settings(6, batch=8, mesh=(4, 2)), tmp_path_factory.mktemp("streamed"))


def test_joined_streams_reach_the_objective_by_name(tmp_path):
    rows = [take_row(regression.batch(number, 1), None) for number in range(16)]

    def both(params, state, frozen, batch, key):
        parts = [regression.objective(params, state, frozen, batch[name], key).loss for name in ("source", "target")]
        return Outcome(parts[0] + parts[1], {"source": parts[0]}, {})

    streams = {"source": Stream(rows, None, 8), "target": Stream(rows[:4], None, 4)}
    task = regression.task(streams=streams, objective=both)
    run_task(task, regression.settings(4, mesh=(4, 1)), tmp_path)
    assert all(line["loss"] > line["source"] > 0 for line in records(tmp_path))


def test_tensorboard_on_request(tmp_path):
    run(tmp_path, steps=2, tensorboard=True)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_state_without_teacher(tmp_path):
    options = {"optim": OptimConfig(method="sgd", learning_rate=0.01), "teacher_decay": None}
    assert run(tmp_path, steps=2, **options).teacher == {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled(TrainerConfig):
    """A kind of run that trains the small task at a scale from a file."""

    scale: Path


def test_a_moved_pipeline_resumes_its_training(tmp_path, monkeypatch, capfd):
    def write(config):
        return [Stage("file", lambda folder, _: write_atomic(folder / "scale.txt", "1.5"))]

    def stages(config):
        def task(_):
            steps = Snapshot((3,), lambda state: signal.raise_signal(signal.SIGTERM)) if stopped else None
            frozen = {"scale": np.float32(config.scale.read_text())}
            return regression.task(frozen=frozen, snapshots=steps)

        return trainer_stages(config, task, lambda *_: None)

    for kind, module in (
        ("write", types.SimpleNamespace(Config=regression.OptimConfig, stages=write)),
        ("scaled", types.SimpleNamespace(Config=Scaled, stages=stages)),
    ):
        monkeypatch.setitem(sys.modules, kind, module)
        monkeypatch.setitem(kinds.KINDS, kind, (kind, kind))
    recipe = tmp_path / "two.yaml"
    recipe.write_text(
        "kind: pipeline\nruns:\n  first: {kind: write}\n"
        "  second: {kind: scaled, steps: 6, batch: 8, scale: '@first/file/scale.txt'}\n"
    )
    stopped = True
    with pytest.raises(Stopped):
        kinds.open_run(recipe, [f"work_dir={tmp_path / 'out'}"]).execute(print)
    (tmp_path / "out").rename(tmp_path / "moved")
    stopped = False
    kinds.open_run(recipe, [f"work_dir={tmp_path / 'moved'}"]).execute(print)
    assert "resuming at step 3" in capfd.readouterr().err and not (tmp_path / "out").exists()
