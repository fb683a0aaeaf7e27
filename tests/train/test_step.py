"""The state and the step: values by hand, the average, donation, accumulation, keys."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmda.errors import UserError
from fmda.train import create_state, make_step
from fmda.train.step import rising


def loss_fn(params, frozen, batch, key):
    """Mean of w * x * scale: the gradient is mean(x) * scale."""
    loss = jnp.mean(params["w"][None] * batch["x"]) * frozen
    return loss, {"noise": jax.random.uniform(key)}


def start(ema=True):
    return create_state({"w": jnp.asarray([4.0])}, optax.sgd(0.5), ema=ema)


BATCH = {"x": jnp.asarray([[1.0], [2.0], [3.0], [6.0]])}


def test_one_step_by_hand():
    step = make_step(loss_fn, optax.sgd(0.5), 0.75, schedule=lambda count: 0.5 + count)
    state, metrics = step(start(), 2.0, BATCH, jax.random.key(0))
    assert state.step == 1
    # Gradient 3 * 2 = 6; 4 - 0.5 * 6 = 1; average 0.75 * 4 + 0.25 * 1.
    np.testing.assert_allclose(state.params["w"], [1.0])
    np.testing.assert_allclose(state.ema["w"], [3.25])
    assert (metrics["loss"], metrics["grad_norm"], metrics["learning_rate"]) == (24.0, 6.0, 0.5)


def test_average_with_a_decay_that_depends_on_the_step():
    step = make_step(loss_fn, optax.sgd(0.5), lambda count: 1 - 1 / (count + 1.0))
    state, _ = step(start(), 2.0, BATCH, jax.random.key(0))
    np.testing.assert_allclose(state.ema["w"], state.params["w"])
    state, _ = step(state, 2.0, BATCH, jax.random.key(0))
    np.testing.assert_allclose(state.ema["w"], [(1.0 - 2.0) / 2])


def test_a_rising_average_forgets_the_first_parameters():
    keep = rising(0.99)
    assert [float(keep(step)) for step in (0, 1, 90)] == pytest.approx([0.1, 2 / 11, 0.91])
    assert float(keep(10_000)) == pytest.approx(0.99)
    assert float(jnp.prod(keep(jnp.arange(100)))) < 1e-9


def test_no_average_unless_asked():
    step = make_step(loss_fn, optax.sgd(0.5))
    state, _ = step(start(ema=False), 2.0, BATCH, jax.random.key(0))
    assert state.ema == {}


def test_average_starts_as_a_copy_so_that_the_state_can_be_donated():
    step = jax.jit(make_step(loss_fn, optax.sgd(0.5), 0.75), donate_argnums=0)
    state = jax.jit(start)()
    assert state.ema["w"].unsafe_buffer_pointer() != state.params["w"].unsafe_buffer_pointer()
    before = state
    state, _ = step(state, jnp.float32(2.0), BATCH, jax.random.key(0))
    assert before.params["w"].is_deleted() and before.ema["w"].is_deleted()
    state, _ = step(state, jnp.float32(2.0), BATCH, jax.random.key(0))
    np.testing.assert_allclose(state.params["w"], [-2.0])


def test_key_is_folded_with_the_step():
    step = make_step(loss_fn, optax.sgd(0.5))
    key = jax.random.key(5)
    state, first = step(start(ema=False), 2.0, BATCH, key)
    _, second = step(state, 2.0, BATCH, key)
    assert first["noise"] == jax.random.uniform(jax.random.fold_in(key, 0))
    assert second["noise"] == jax.random.uniform(jax.random.fold_in(key, 1))


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_whole_batch(parts):
    whole, whole_metrics = make_step(loss_fn, optax.sgd(0.5), 0.75)(start(), 2.0, BATCH, jax.random.key(0))
    step = jax.jit(make_step(loss_fn, optax.sgd(0.5), 0.75, accumulate=parts))
    state, metrics = step(start(), 2.0, BATCH, jax.random.key(0))
    np.testing.assert_allclose(state.params["w"], whole.params["w"], rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], whole_metrics["loss"], rtol=1e-6)
    assert metrics["grad_norm"].dtype == jnp.float32


def test_accumulation_takes_every_nth_example_with_its_own_key():
    def seen(params, frozen, batch, key):
        first = batch["x"][0, 0] * jax.random.uniform(key)
        return jnp.sum(params["w"]) * 0.0, {"first": first}

    key = jax.random.key(1)
    _, metrics = make_step(seen, optax.sgd(0.5), accumulate=2)(start(ema=False), None, BATCH, key)
    folded = jax.random.fold_in(key, 0)
    values = [jax.random.uniform(jax.random.fold_in(folded, part)) for part in range(2)]
    np.testing.assert_allclose(metrics["first"], (1.0 * values[0] + 2.0 * values[1]) / 2, rtol=1e-6)


def test_accumulation_refuses_a_batch_that_does_not_divide():
    with pytest.raises(UserError, match="accumulate: a batch of 4 does not divide into 3 parts"):
        make_step(loss_fn, optax.sgd(0.5), accumulate=3)(start(), 2.0, BATCH, jax.random.key(0))
