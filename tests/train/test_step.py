"""The state and the step: values by hand, the average, donation, accumulation, keys."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmda.errors import UserError
from fmda.train import Outcome, create_state, make_step
from fmda.train.step import rising


def objective(params, state, frozen, batch, key):
    """Mean of w * x * scale: the gradient is mean(x) * scale."""
    loss = jnp.mean(params["w"][None] * batch["x"]) * frozen
    return Outcome(loss, {"noise": jax.random.uniform(key)}, {})


def start(teacher=True):
    return create_state({"w": jnp.asarray([4.0])}, optax.sgd(0.5), teacher=teacher)


BATCH = {"x": jnp.asarray([[1.0], [2.0], [3.0], [6.0]])}


def test_one_step_by_hand():
    step = make_step(objective, optax.sgd(0.5), teacher_decay=0.75, schedule=lambda count: 0.5 + count)
    state, metrics = step(start(), 2.0, BATCH, jax.random.key(0))
    assert state.step == 1
    # Gradient 3 * 2 = 6; 4 - 0.5 * 6 = 1; average 0.75 * 4 + 0.25 * 1.
    np.testing.assert_allclose(state.params["w"], [1.0])
    np.testing.assert_allclose(state.teacher["w"], [3.25])
    assert (metrics["loss"], metrics["grad_norm"], metrics["learning_rate"]) == (24.0, 6.0, 0.5)


def test_average_with_a_decay_that_depends_on_the_step():
    step = make_step(objective, optax.sgd(0.5), teacher_decay=lambda count: 1 - 1 / (count + 1.0))
    state, _ = step(start(), 2.0, BATCH, jax.random.key(0))
    np.testing.assert_allclose(state.teacher["w"], state.params["w"])
    state, _ = step(state, 2.0, BATCH, jax.random.key(0))
    np.testing.assert_allclose(state.teacher["w"], [(1.0 - 2.0) / 2])


def test_a_rising_average_forgets_the_first_parameters():
    keep = rising(0.99)
    assert [float(keep(step)) for step in (0, 1, 90)] == pytest.approx([0.1, 2 / 11, 0.91])
    assert float(keep(10_000)) == pytest.approx(0.99)
    assert float(jnp.prod(keep(jnp.arange(100)))) < 1e-9


def test_no_average_unless_asked():
    step = make_step(objective, optax.sgd(0.5))
    state, _ = step(start(teacher=False), 2.0, BATCH, jax.random.key(0))
    assert state.teacher == {}


def test_average_starts_as_a_copy_so_that_the_state_can_be_donated():
    step = jax.jit(make_step(objective, optax.sgd(0.5), teacher_decay=0.75), donate_argnums=0)
    state = jax.jit(start)()
    assert state.teacher["w"].unsafe_buffer_pointer() != state.params["w"].unsafe_buffer_pointer()
    before = state
    state, _ = step(state, jnp.float32(2.0), BATCH, jax.random.key(0))
    assert before.params["w"].is_deleted() and before.teacher["w"].is_deleted()
    state, _ = step(state, jnp.float32(2.0), BATCH, jax.random.key(0))
    np.testing.assert_allclose(state.params["w"], [-2.0])


def test_key_is_folded_with_the_step():
    step = make_step(objective, optax.sgd(0.5))
    key = jax.random.key(5)
    state, first = step(start(teacher=False), 2.0, BATCH, key)
    _, second = step(state, 2.0, BATCH, key)
    assert first["noise"] == jax.random.uniform(jax.random.fold_in(key, 0))
    assert second["noise"] == jax.random.uniform(jax.random.fold_in(key, 1))


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_whole_batch(parts):
    whole, whole_metrics = make_step(objective, optax.sgd(0.5), teacher_decay=0.75)(
        start(), 2.0, BATCH, jax.random.key(0)
    )
    step = jax.jit(make_step(objective, optax.sgd(0.5), teacher_decay=0.75, accumulate=parts))
    state, metrics = step(start(), 2.0, BATCH, jax.random.key(0))
    np.testing.assert_allclose(state.params["w"], whole.params["w"], rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], whole_metrics["loss"], rtol=1e-6)
    assert metrics["grad_norm"].dtype == jnp.float32


def test_accumulation_takes_every_nth_example_with_its_own_key():
    def first_example(params, state, frozen, batch, key):
        first = batch["x"][0, 0] * jax.random.uniform(key)
        return Outcome(jnp.sum(params["w"]) * 0.0, {"first": first}, {})

    key = jax.random.key(1)
    _, metrics = make_step(first_example, optax.sgd(0.5), accumulate=2)(start(teacher=False), None, BATCH, key)
    folded = jax.random.fold_in(key, 0)
    values = [jax.random.uniform(jax.random.fold_in(folded, part)) for part in range(2)]
    np.testing.assert_allclose(metrics["first"], (1.0 * values[0] + 2.0 * values[1]) / 2, rtol=1e-6)


def test_accumulation_refuses_a_batch_that_does_not_divide():
    with pytest.raises(UserError, match="accumulate: a batch of 4 does not divide into 3 parts"):
        make_step(objective, optax.sgd(0.5), accumulate=3)(start(), 2.0, BATCH, jax.random.key(0))


def counting(params, state, frozen, batch, key):
    """Carries a mean of the inputs and a count of examples; reads the teacher."""
    mean = 0.5 * state.aux["mean"] + 0.5 * jnp.mean(batch["x"])
    aux = {"mean": mean, "count": state.aux["count"] + len(batch["x"])}
    return Outcome(jnp.sum(params["w"]), {"teacher": state.teacher["w"][0]}, aux)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_auxiliary_state_is_carried_and_does_not_depend_on_the_parts(parts):
    state = create_state({"w": jnp.ones(1)}, optax.sgd(1.0), aux={"mean": jnp.float32(1.0), "count": jnp.int32(7)})
    step = jax.jit(make_step(counting, optax.sgd(1.0), accumulate=parts))
    for count in (11, 15):
        state, _ = step(state, None, BATCH, jax.random.key(0))
        assert state.aux["count"] == count and state.aux["count"].dtype == jnp.int32
    # 0.5 * (0.5 * 1 + 0.5 * 3) + 0.5 * 3
    np.testing.assert_allclose(state.aux["mean"], 2.5, rtol=1e-6)


@pytest.mark.parametrize(("when", "kept"), [("after", 3.5), ("before", 4.0)])
def test_the_objective_reads_the_teacher(when, kept):
    aux = {"mean": jnp.float32(0.0), "count": jnp.int32(0)}
    state = create_state({"w": jnp.asarray([4.0])}, optax.sgd(1.0), aux=aux)
    step = make_step(counting, optax.sgd(1.0), teacher_decay=0.5, teacher_when=when)
    state, metrics = step(state, None, BATCH, jax.random.key(0))
    # "before" averages the parameters of the step's beginning in, "after" those of its end
    np.testing.assert_allclose([metrics["teacher"], *state.teacher["w"]], [4.0, kept])
    _, metrics = step(state, None, BATCH, jax.random.key(0))
    np.testing.assert_allclose(metrics["teacher"], 3.5)
