"""Schedules and optimizers against numbers worked out by hand."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmda.errors import UserError
from fmda.train import OptimConfig, make_optimizer, make_schedule


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("constant", {0: 0.25, 3: 1.0, 4: 1.0, 8: 1.0, 12: 1.0, 99: 1.0}),
        ("linear", {0: 0.25, 3: 1.0, 4: 1.0, 8: 0.55, 12: 0.1, 99: 0.1}),
        ("cosine", {0: 0.25, 3: 1.0, 4: 1.0, 8: 0.55, 10: 0.1 + 0.9 * 0.5 * (1 - np.sqrt(0.5)), 12: 0.1}),
        # as mmcv: counted from step 0, times the warm-up factor
        ("poly", {0: 1e-6, 3: 0.75 * 0.60625, 4: 0.1 + 0.9 * 4 / 9, 8: 0.1 + 0.9 / 9, 12: 0.1}),
        ("step", {0: 1e-6, 4: 1.0, 7: 1.0, 8: 0.1 + 0.9 * 0.1, 9: 0.1 + 0.9 * 0.01}),
    ],
)
def test_schedule_values(schedule, values):
    config = OptimConfig(learning_rate=2.0, schedule=schedule, warmup_steps=4, end_factor=0.1, power=2.0, drops=(8, 9))
    rate = make_schedule(config, steps=12)
    for step, value in values.items():
        np.testing.assert_allclose(rate(step), 2.0 * value, rtol=1e-6, err_msg=f"step {step}")


def test_schedule_without_warmup_begins_at_the_full_rate():
    assert make_schedule(OptimConfig(learning_rate=0.5), steps=10)(0) == 0.5


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="optim.warmup_steps: 11 does not fit into a run of 10"):
        make_schedule(OptimConfig(warmup_steps=11), steps=10)


PARAMS = {
    "layer": {"kernel": jnp.full((2,), 2.0), "bias": jnp.full((2,), 2.0)},
    "norm": {"scale": jnp.full((2,), 2.0)},
}


def one_update(config, gradient=0.5, params=PARAMS):
    tx = make_optimizer(config, steps=10)
    grads = {name: {k: jnp.full_like(v, gradient) for k, v in leaves.items()} for name, leaves in params.items()}
    updates, _ = tx.update(grads, tx.init(params), params, position=0)
    return {k: float(v[0]) for leaves in updates.values() for k, v in leaves.items()}


def test_adamw_first_update_is_the_sign_plus_decay_where_it_applies():
    updates = one_update(OptimConfig(learning_rate=0.1, schedule="constant", weight_decay=0.3))
    np.testing.assert_allclose(updates["kernel"], -0.1 * (1.0 + 0.3 * 2.0), rtol=1e-5)
    np.testing.assert_allclose([updates["bias"], updates["scale"]], -0.1, rtol=1e-5)


def test_sgd_adds_the_decay_before_the_momentum():
    config = OptimConfig(
        method="sgd", learning_rate=0.1, schedule="constant", weight_decay=0.3, momentum=0.5, no_decay=()
    )
    tx = make_optimizer(config, steps=10)
    params, grads = {"w": jnp.full((1,), 2.0)}, {"w": jnp.full((1,), 0.5)}
    state = tx.init(params)
    first, state = tx.update(grads, state, params, position=0)
    params = optax.apply_updates(params, first)
    second, _ = tx.update(grads, state, params, position=0)
    trace = 0.5 + 0.3 * 2.0
    np.testing.assert_allclose(first["w"], -0.1 * trace, rtol=1e-6)
    np.testing.assert_allclose(second["w"], -0.1 * (0.5 + 0.3 * (2.0 - 0.1 * trace) + 0.5 * trace), rtol=1e-6)


def test_multipliers_scale_the_learning_rate_and_the_first_match_counts():
    config = OptimConfig(
        method="sgd", learning_rate=0.1, schedule="constant", multipliers={"*/bias": 0.0, "layer/*": 10.0}
    )
    updates = one_update(config)
    np.testing.assert_allclose([updates["kernel"], updates["bias"], updates["scale"]], [-0.5, 0.0, -0.05], rtol=1e-6)


def test_multiplier_that_matches_nothing_is_named():
    with pytest.raises(UserError, match="optim.multipliers: 'layer/kernle' matches no parameter; did you mean 'layer"):
        one_update(OptimConfig(multipliers={"layer/kernle": 0.1}))


def test_clip_scales_to_the_global_norm():
    config = OptimConfig(method="sgd", learning_rate=1.0, schedule="constant", clip_norm=1.0)
    updates = one_update(config, gradient=3.0)
    np.testing.assert_allclose(list(updates.values()), -1.0 / np.sqrt(6.0), rtol=1e-6)
