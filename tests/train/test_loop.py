"""The loop: resuming, saving by the clock, evaluation, starting points, bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import regression
from regression import RULES, parts

from fmda.data.dataset import Example
from fmda.data.streams import Stream, batches
from fmda.errors import UserError
from fmda.mesh import make_mesh
from fmda.train import NumberedBatches, Outcome, create_state, fit, make_step


def run(folder, steps=10, **changes):
    arguments = {**parts(10), "mesh": make_mesh(devices=jax.devices()[:1]), "rules": RULES, "key": jax.random.key(0)}
    return fit(**{**arguments, "steps": steps, "folder": folder, "log_every": 2, **changes})


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
    assert set(lines[0]) == {"step", "loss", "error", "grad_norm"}
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_two_halves_make_the_whole_bit_for_bit(tmp_path, unbroken):
    run(tmp_path, steps=5)
    state = run(tmp_path)
    assert equal(state, unbroken[0])
    # The first half ends with a log line of its own.
    assert [line for line in records(tmp_path) if line["step"] != 5] == records(unbroken[1])


def test_a_finished_run_returns_at_once_without_drawing_a_batch(unbroken):
    def never(number):
        raise AssertionError(number)

    assert equal(run(unbroken[1], batches=NumberedBatches(never)), unbroken[0])


def test_saves_by_the_clock_and_at_the_end(tmp_path):
    now = [0.0]

    def make_batch(number):
        now[0] += 60.0
        return regression.batch(number)

    run(
        tmp_path,
        steps=12,
        batches=NumberedBatches(make_batch),
        clock=lambda: now[0],
        save_steps=1000,
        save_minutes=5.0,
        keep=100,
    )
    assert kept(tmp_path) == [5, 10, 12]


def test_saves_by_steps_begin_the_minutes_anew(tmp_path):
    now = [0.0]

    def make_batch(number):
        now[0] += 60.0
        return regression.batch(number)

    source = NumberedBatches(make_batch)
    run(tmp_path, steps=9, batches=source, clock=lambda: now[0], save_steps=3, save_minutes=4.0, keep=100)
    assert kept(tmp_path) == [3, 6, 9]


def test_evaluation_is_logged_and_its_best_checkpoint_kept(tmp_path):
    scores = {3: 0.2, 6: 0.8, 9: 0.5, 10: 0.1}

    def evaluate(state):
        # Transfers are an evaluation's own affair.
        assert jnp.isfinite(state.teacher["up"]["kernel"]).all()
        return {"miou": scores[int(state.step)]}

    run(tmp_path, evaluate=evaluate, evaluate_steps=3, best="miou", keep=1)
    logged = [line for line in records(tmp_path) if "eval/miou" in line]
    assert logged == [{"step": step, "eval/miou": score} for step, score in scores.items()]
    assert kept(tmp_path) == [6, 10]


def test_evaluation_at_named_steps_and_scores_that_are_none(tmp_path):
    seen = []
    run(tmp_path, evaluate=lambda state: seen.append(int(state.step)) or {}, evaluate_steps=(2, 7))
    assert seen == [2, 7, 10]
    assert all(len(line) > 1 for line in records(tmp_path))


@pytest.mark.parametrize("name", ["log_every", "save_steps"])
def test_less_than_a_step_between_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="log_every, save_steps: .*0.*; give at least 1"):
        run(tmp_path / "new", **{name: 0})
    assert not (tmp_path / "new").exists()


def test_best_must_be_a_score(tmp_path):
    with pytest.raises(UserError, match="best: the evaluation returns no 'mio'; did you mean 'miou'"):
        run(tmp_path, steps=1, evaluate=lambda state: {"miou": 1.0}, best="mio")


def test_own_run_comes_before_another_and_before_weights(tmp_path, unbroken):
    run(tmp_path, steps=5)
    weights = {"up": {"bias": np.ones(16, np.float32)}}
    assert equal(run(tmp_path, continue_from=tmp_path / "nothing", weights=weights), unbroken[0])


def test_continues_another_run_with_its_data_position(tmp_path, unbroken):
    run(tmp_path / "first", steps=5)
    state = run(tmp_path / "second", continue_from=tmp_path / "first")
    assert equal(state, unbroken[0])
    assert records(tmp_path / "second")[0]["step"] == 6


def test_another_run_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match="first: holds no checkpoint to continue from"):
        run(tmp_path / "second", continue_from=tmp_path / "first")


def test_weights_replace_parameters_and_average_and_are_not_donated(tmp_path):
    elsewhere = jax.device_put(jnp.full((16,), 0.5), jax.devices()[3])
    weights = {"up": {"bias": elsewhere}, "down": {"bias": np.full((4,), 2.0)}}

    def still(params, state, frozen, batch, key):
        return Outcome(jnp.sum(params["up"]["bias"]) * 0.0, {}, {})

    tx = optax.sgd(1.0)
    state = run(
        tmp_path,
        steps=2,
        step=make_step(still, tx, teacher_decay=0.5),
        init=lambda key: regression.init(key, tx),
        weights=weights,
    )
    for tree in (state.params, state.teacher):
        np.testing.assert_array_equal(tree["up"]["bias"], np.full(16, 0.5, np.float32))
        np.testing.assert_array_equal(tree["down"]["bias"], np.full(4, 2.0, np.float32))
    np.testing.assert_array_equal(weights["up"]["bias"], np.full(16, 0.5))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"up": {"kernal": np.zeros((8, 16))}}, "'up/kernal' is no parameter of the model; did you mean 'up/kernel'"),
        ({"up": {"kernel": np.zeros((8, 15))}}, "'up/kernel' has shape .8, 15., the model wants .8, 16."),
    ],
)
def test_unfit_weights_are_named(tmp_path, weights, words):
    with pytest.raises(UserError, match=f"initial weights: {words}"):
        run(tmp_path, weights=weights)


def test_folder_of_another_configuration_is_refused_untouched(tmp_path):
    run(tmp_path, steps=2, config={"seed": 1, "optim": {"learning_rate": 0.1}})
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"another configuration \(seed: 1 -> 2\); choose another work_dir="):
        run(tmp_path, steps=4, config={"seed": 2, "optim": {"learning_rate": 0.1}})
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert kept(tmp_path) == [2]


def test_batches_that_end_early_keep_what_was_done(tmp_path):
    class Four(NumberedBatches):
        def __next__(self):
            if self.get_state()["next"] == 4:
                raise StopIteration
            return super().__next__()

    with pytest.raises(UserError, match="batches: they end after step 4 of 10; allow more epochs"):
        run(tmp_path, batches=Four(regression.batch), save_steps=2)
    assert kept(tmp_path) == [2, 4]


def test_a_loss_that_is_no_number_is_not_saved(tmp_path):
    def poisoned(number):
        batch = regression.batch(number)
        return {**batch, "inputs": batch["inputs"] * np.float32(np.nan if number == 6 else 1.0)}

    with pytest.raises(UserError, match="loss is nan at step 7; lower the learning rate"):
        run(tmp_path, batches=NumberedBatches(poisoned), save_steps=1, log_every=100)
    assert kept(tmp_path) == [5, 6]


def test_batches_may_compute_on_a_device(tmp_path, unbroken):
    source = NumberedBatches(
        lambda number: jax.tree.map(lambda leaf: jnp.asarray(leaf) * 1.0, regression.batch(number))
    )
    assert equal(run(tmp_path, batches=source), unbroken[0])


def test_frozen_trees_are_arguments_and_survive(tmp_path, unbroken):
    frozen = {"scale": jnp.float32(1.5)}
    assert equal(run(tmp_path, frozen=frozen), unbroken[0])
    assert frozen["scale"] == 1.5


def test_progress_says_where_it_begins_and_what_it_costs(tmp_path, capsys):
    run(tmp_path, steps=4, flops_per_example=100.0, peak_flops=1e9, what="clip")
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert lines[0] == "clip: starting from random parameters"
    assert lines[1].startswith("clip: compiled in ") and "MiB for temporaries" in lines[1]
    assert lines[-1].startswith("clip: step 4/4, loss ") and "MFU" in lines[-1] and "images/s" in lines[-1]


def test_resumes_a_grain_loader_with_the_batches_it_drew_ahead(tmp_path):
    def loader():
        examples = [Example(np.zeros((2, 2, 3), np.uint8), None, str(number)) for number in range(24)]
        return batches(Stream(examples, numbered, 4), 3)

    def numbered(example, generator):
        number = int(example.name)
        return {name: leaf[number % 16] for name, leaf in regression.batch(number).items()}

    whole = run(tmp_path / "whole", batches=loader())
    run(tmp_path / "parts", steps=4, batches=loader())
    assert equal(run(tmp_path / "parts", batches=loader()), whole)


def test_tensorboard_on_request(tmp_path):
    run(tmp_path, steps=2, tensorboard=True)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_state_without_average(tmp_path):
    tx = optax.sgd(0.01)

    def init(key):
        return create_state(regression.init(key, tx).params, tx, teacher=False)

    step = make_step(regression.objective, tx)
    rules = (("*", RULES[2][1]),)
    run(tmp_path, steps=2, step=step, init=init, rules=rules)
    assert run(tmp_path, steps=4, step=step, init=init, rules=rules).teacher == {}
