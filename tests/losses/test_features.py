"""Feature distance on things, MMD and gradient reversal by hand, their gradients at the traps, and over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fmda.losses.features import (
    class_mmd,
    coarse_labels,
    feature_distance,
    mmd,
    reversal_scale,
    reverse_gradient,
)


def cell(*counts: tuple[int, int]) -> np.ndarray:
    """Returns labels [32, 32] with so many pixels of each class."""
    return np.repeat(*np.array(counts).T).reshape(32, 32)


CELLS = [cell((13, 768), (0, 256)), cell((13, 767), (0, 257)), cell((255, 900), (13, 124)), cell((0, 1024))]
LABELS = jnp.asarray(np.concatenate(CELLS, axis=1))[None]


def test_a_cell_has_a_label_where_three_quarters_agree():
    assert coarse_labels(LABELS, (1, 4), 19).tolist() == [[[13, 255, 255, 0]]]
    both = jnp.concatenate([LABELS, LABELS[:, ::-1, ::-1]], axis=1)
    assert coarse_labels(both, (2, 4), 19).tolist() == [[[13, 255, 255, 0], [0, 255, 255, 13]]]


def test_distance_over_cells_that_show_a_thing():
    features = jnp.array([[3.0, 4.0], [9.0, 9.0], [9.0, 9.0], [9.0, 9.0]])[None, None]
    assert float(feature_distance(features, jnp.zeros_like(features), LABELS, 19)) == pytest.approx(5.0)
    two = feature_distance(features, jnp.zeros_like(features), LABELS, 19, things=(0, 13))
    assert float(two) == pytest.approx((5 + 9 * np.sqrt(2)) / 2)


@pytest.mark.parametrize("labels", [LABELS, jnp.zeros_like(LABELS), jnp.full_like(LABELS, 255)])
def test_gradients_are_finite_at_distance_zero_and_without_things(labels):
    same = jnp.ones((1, 1, 4, 2))
    value, (ours, theirs) = jax.value_and_grad(feature_distance, (0, 1))(same, same, labels, 19)
    assert float(value) == pytest.approx(0, abs=1e-5)
    assert np.isfinite(np.asarray(ours)).all() and not np.asarray(theirs).any()


def kernel(a: np.ndarray, b: np.ndarray, mean: float) -> float:
    return sum(np.exp(-np.square(a - b).sum() / (2 * 2.0**k * mean)) for k in range(-3, 2))


def test_mmd_by_definition():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(4, 3)), random.normal(size=(5, 3)) + 1
    everything = np.concatenate([x, y])
    mean = np.square(everything[:, None] - everything[None]).sum(-1).mean()
    within = [
        sum(kernel(a, b, mean) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / (len(z) * (len(z) - 1))
        for z in (x, y)
    ]
    between = np.mean([kernel(a, b, mean) for a in x for b in y])
    assert float(mmd(jnp.asarray(x), jnp.asarray(y))) == pytest.approx(sum(within) - 2 * between, abs=1e-5)


def test_mmd_of_two_points_each_by_hand():
    # distances 0 within and 1 between: the mean over all 16 pairs is 8 / 16
    x, y = jnp.zeros((2, 1)), jnp.ones((2, 1))
    expected = 10 - 2 * sum(np.exp(-1 / (2.0**k)) for k in range(-3, 2))
    assert float(mmd(x, y)) == pytest.approx(expected, rel=1e-6)


def test_mmd_of_classes_by_hand():
    # 3 rows at 0 and 6 at 1: 36 of 81 ordered pairs have distance 1, the others 0
    x, y = (jnp.asarray(rows)[:, None] for rows in ([0.0, 0, 1, 1], [1.0, 1, 1, 1, 0]))
    apart = sum(np.exp(-1 / (2 * 2.0**k * 36 / 81)) for k in range(-3, 2))
    # class 0 is apart, class 1 at one place, class 2 has one row in one sample alone
    value = class_mmd(x, y, jnp.array([0, 0, 1, 1]), jnp.array([0, 0, 1, 1, 2]), 3)
    assert float(value) == pytest.approx((10 - 2 * apart + 0) / 2, rel=1e-6)
    without = class_mmd(x, y, jnp.array([0, 0, 1, 255]), jnp.array([0, 0, 1, 1, 255]), 3)
    assert float(without) == pytest.approx(10 - 2 * apart, rel=1e-6)


def test_mmd_of_classes_without_a_common_one_is_0_with_finite_gradients():
    x, y = jnp.ones((3, 2)), jnp.zeros((3, 2))
    value, gradients = jax.value_and_grad(class_mmd, (0, 1))(x, y, jnp.array([0, 0, 1]), jnp.array([1, 1, 0]), 2)
    assert float(value) == 0 and np.isfinite(np.concatenate(gradients)).all()


def test_mmd_has_finite_gradients_where_all_features_are_equal():
    value, gradients = jax.value_and_grad(mmd, (0, 1))(jnp.ones((3, 2)), jnp.ones((4, 2)))
    assert float(value) == pytest.approx(0, abs=1e-6) and np.isfinite(np.concatenate(gradients)).all()


def test_reversed_gradients():
    x = jnp.array([1.0, -2.0])

    def loss(x, scale):
        return (jnp.square(reverse_gradient(x, scale))).sum()

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, jnp.float32(0.25))
    assert float(value) == 5.0 and gradients[0].tolist() == [-0.5, 1.0] and float(gradients[1]) == 0.0
    scales = [float(reversal_scale(jnp.float32(p))) for p in (0.0, 0.1, 1.0)]
    np.testing.assert_allclose(scales, [0, 2 / (1 + np.exp(-1)) - 1, 2 / (1 + np.exp(-10)) - 1], atol=1e-6)


def test_eight_devices_give_the_losses_and_gradients_of_one():
    def losses(features, reference, labels):
        flat = [x.reshape(-1, x.shape[-1]) for x in (features, reference)]
        return feature_distance(features, reference, labels, 19) + mmd(*flat)

    features, reference = (jax.random.normal(jax.random.key(i), (8, 2, 2, 3)) for i in (0, 1))
    labels = jnp.asarray(np.random.default_rng(0).choice([0, 13, 255], (8, 2, 2)).repeat(4, 1).repeat(4, 2))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (features, reference, labels)]
    value = jax.jit(jax.value_and_grad(losses))
    for one, eight in zip(value(features, reference, labels), value(*split), strict=True):
        np.testing.assert_allclose(one, eight, rtol=1e-5, atol=1e-6)
