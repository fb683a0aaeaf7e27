"""Weighted cross-entropy, pseudo-labels and entropy by hand, and over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fmda.losses.pixelwise import entropy_loss, pseudo_labels, weighted_cross_entropy


def logits_of(*probabilities: list[float]) -> jax.Array:
    """Returns logits [1, 1, n, k] of n pixels with these probabilities."""
    return jnp.log(jnp.array(probabilities))[None, None]


def test_the_mean_is_over_all_pixels():
    logits = logits_of([0.5, 0.5], [0.25, 0.75], [0.1, 0.9], [0.1, 0.9])
    labels = jnp.array([[[0, 0, 255, 255]]])
    assert float(weighted_cross_entropy(logits, labels)) == pytest.approx((np.log(2) + np.log(4)) / 4, rel=1e-6)
    weights = jnp.array([[[1.0, 0.5, 1.0, 1.0]]])
    expected = (np.log(2) + 0.5 * np.log(4)) / 4
    assert float(weighted_cross_entropy(logits, labels, weights)) == pytest.approx(expected, rel=1e-6)
    ignored = jnp.full((1, 1, 4), 255)
    value, gradient = jax.value_and_grad(weighted_cross_entropy)(logits, ignored)
    assert float(value) == 0.0 and not np.asarray(gradient).any()


def test_the_weight_is_a_share_of_the_whole_batch():
    # three confident pixels of four in one image, none in the other
    logits = jnp.concatenate(
        [
            logits_of([0.968, 0.032], [0.01, 0.99], [0.98, 0.02], [0.5, 0.5]),
            logits_of([0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.967, 0.033]),
        ]
    )
    labels, share = pseudo_labels(logits + 1e-6 * jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2))
    assert labels.tolist() == [[[0, 1, 0, 0]], [[0, 0, 1, 0]]]
    assert share.shape == () and float(share) == 3 / 8
    assert not np.asarray(jax.grad(lambda x: pseudo_labels(x)[1])(logits)).any()


@pytest.mark.parametrize("power", [1.0, 4.0])
def test_entropy_of_known_distributions(power):
    mixed = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(2)
    logits = logits_of([0.5, 0.5], [0.75, 0.25])
    assert float(entropy_loss(logits, power)) == pytest.approx((1 + mixed**power) / 2, rel=1e-5)
    sure = jnp.array([0.0, 1000.0]).reshape(1, 1, 1, 2)
    value, gradient = jax.value_and_grad(entropy_loss)(sure, power)
    assert float(value) == 0.0 and np.isfinite(np.asarray(gradient)).all()


def objective(logits: jax.Array, labels: jax.Array) -> jax.Array:
    pseudo, share = pseudo_labels(logits, 0.5)
    weights = jnp.broadcast_to(share, labels.shape)
    mixed = weighted_cross_entropy(logits, jnp.where(labels == 0, pseudo, labels), weights)
    return mixed + entropy_loss(logits)


def test_eight_devices_give_the_loss_and_gradient_of_one():
    logits = 3 * jax.random.normal(jax.random.key(0), (8, 3, 4, 5))
    labels = jax.random.randint(jax.random.key(1), (8, 3, 4), 0, 5).at[0].set(255)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (logits, labels)]
    value = jax.jit(jax.value_and_grad(objective))
    for one, eight in zip(value(logits, labels), value(*split), strict=True):
        np.testing.assert_allclose(one, eight, rtol=1e-5, atol=1e-7)
