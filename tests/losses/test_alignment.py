"""The contrastive loss by hand and over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fmda.losses.alignment import contrastive_loss


def embeddings(seed: int, rows: int = 8, width: int = 5) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (rows, width))


def test_two_orthogonal_pairs_by_hand():
    loss, metrics = contrastive_loss(2 * jnp.eye(2), 3 * jnp.eye(2), jnp.float32(1.0))
    assert float(loss) == pytest.approx(np.log1p(np.exp(-1.0)), rel=1e-6)
    assert float(metrics["accuracy"]) == 1.0 and float(metrics["positives"]) == pytest.approx(1.0)


def test_equals_cross_entropy_in_both_directions():
    a, b, scale = embeddings(0), embeddings(1), jnp.float32(7.0)
    unit = lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    logits = scale * unit(a) @ unit(b).T
    rows = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(8)).mean()
    columns = optax.softmax_cross_entropy_with_integer_labels(logits.T, jnp.arange(8)).mean()
    assert float(contrastive_loss(a, b, scale)[0]) == pytest.approx(float(rows + columns) / 2, rel=1e-5)


def test_true_pairs_are_no_negatives():
    a, b, scale = embeddings(0, 3), embeddings(1, 3), jnp.float32(4.0)
    everything = jnp.ones((3, 3), bool)
    loss, metrics = contrastive_loss(a, b, scale, everything)
    assert float(loss) == 0.0 and float(metrics["accuracy"]) == 1.0
    gradient = jax.grad(lambda x: contrastive_loss(x, b, scale, everything)[0])(a)
    assert np.isfinite(np.asarray(gradient)).all()
    assert float(contrastive_loss(a, b, scale, jnp.eye(3, dtype=bool))[0]) == pytest.approx(
        float(contrastive_loss(a, b, scale)[0])
    )


def test_eight_devices_give_the_loss_and_gradient_of_one():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    a, b, scale = embeddings(0, 16), embeddings(1, 16), jnp.float32(10.0)
    value = jax.jit(jax.value_and_grad(lambda x, y: contrastive_loss(x, y, scale)[0], argnums=(0, 1)))
    split = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (a, b)]
    one, eight = value(a, b), value(*split)
    np.testing.assert_allclose(one[0], eight[0], rtol=1e-5)
    for left, right in zip(one[1], eight[1], strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6)
