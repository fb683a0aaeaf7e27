"""Self-distillation losses against plain NumPy, and over eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fmda.losses.self_distillation import (
    koleo_loss,
    masked_patch_loss,
    perplexity,
    teacher_distribution,
    updated_centre,
    view_loss,
)

RNG = np.random.default_rng(0)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_teacher_is_centred_then_sharpened_and_has_no_gradient():
    logits, centre = RNG.normal(size=(3, 2, 5)), RNG.normal(size=5)
    found = teacher_distribution(jnp.float32(logits), jnp.float32(centre), 0.05)
    np.testing.assert_allclose(found, softmax((logits - centre) / 0.05), rtol=1e-4, atol=1e-6)
    gradient = jax.grad(lambda x: teacher_distribution(x, jnp.float32(centre), 0.05)[..., 0].sum())(jnp.float32(logits))
    assert not np.asarray(gradient).any()


def test_centre_moves_towards_the_mean_of_all_logits():
    logits, centre = RNG.normal(size=(4, 3, 5)), RNG.normal(size=5)
    found = updated_centre(jnp.float32(centre), jnp.float32(logits), 0.9)
    np.testing.assert_allclose(found, 0.9 * centre + 0.1 * logits.mean((0, 1)), rtol=1e-5)


def test_views_are_compared_with_all_others_but_not_with_themselves():
    targets, logits = softmax(RNG.normal(size=(3, 2, 5))), RNG.normal(size=(3, 4, 5))
    told = np.log(softmax(logits / 0.1))
    pairs = [(t, s) for t in range(2) for s in range(4) if t != s]
    expected = np.mean([-(targets[b, t] * told[b, s]).sum() for b in range(3) for t, s in pairs])
    assert float(view_loss(jnp.float32(targets), jnp.float32(logits), 0.1)) == pytest.approx(expected, rel=1e-5)


def test_masked_patches_count_by_view():
    targets, logits = softmax(RNG.normal(size=(3, 4, 5))), RNG.normal(size=(3, 4, 5))
    masked = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]], bool)
    each = -(targets * np.log(softmax(logits / 0.1))).sum(-1)
    expected = (each[0, [0, 3]].mean() + each[2, :3].mean()) / 2
    found = masked_patch_loss(jnp.float32(targets), jnp.float32(logits), jnp.asarray(masked), 0.1)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_nothing_masked_costs_nothing():
    x = jnp.ones((2, 3, 4))
    value, gradient = jax.value_and_grad(lambda y: masked_patch_loss(x / 4, y, jnp.zeros((2, 3), bool), 0.1))(x)
    assert float(value) == 0.0 and not np.asarray(gradient).any()


def test_koleo_is_the_log_distance_to_the_nearest_other():
    x = RNG.normal(size=(5, 3))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    apart = np.linalg.norm(unit[:, None] - unit[None], axis=-1) + 9 * np.eye(5)
    assert float(koleo_loss(jnp.float32(x))) == pytest.approx(-np.log(apart.min(1)).mean(), rel=1e-4)


def test_koleo_of_equal_rows_has_a_finite_gradient():
    gradient = jax.grad(lambda x: koleo_loss(x))(jnp.ones((4, 3)))
    assert np.isfinite(np.asarray(gradient)).all()


def test_perplexity_counts_what_is_used():
    assert float(perplexity(jnp.eye(6)[:3])) == pytest.approx(3.0, rel=1e-5)
    assert float(perplexity(jnp.tile(jnp.eye(6)[:1], (7, 1)))) == pytest.approx(1.0)


def test_eight_devices_give_the_values_of_one():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    logits, centre = jnp.float32(RNG.normal(size=(16, 3, 5))), jnp.zeros(5)

    @jax.jit
    def everything(x):
        targets = teacher_distribution(x[:, :2], centre, 0.05)
        masked = x[..., 0] > 0
        part = masked_patch_loss(jax.nn.softmax(x), x, masked, 0.1)
        return view_loss(targets, x, 0.1), part, updated_centre(centre, x, 0.9), koleo_loss(x[:, 0])

    one = everything(logits)
    eight = everything(jax.device_put(logits, NamedSharding(mesh, P("data"))))
    for left, right in zip(one, eight, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
