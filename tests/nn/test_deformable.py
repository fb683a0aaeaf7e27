"""Deformable attention: four gathers per sample against one packed gather, gradients too; where heads look at first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fmda.nn import deformable as module
from fmda.nn.deformable import DeformableAttention, centres, deformable_attention

SIZES = ((2, 3), (4, 5), (7, 9))
PLACES = sum(h * w for h, w in SIZES)


def four_gathers(value, sizes, locations, weights):
    """The plain form: one gather per corner of a sample, corners outside the level weigh nothing."""
    total, start = 0.0, 0
    image, head = np.arange(2).reshape(-1, 1, 1, 1), np.arange(2).reshape(1, 1, -1, 1)
    for level, (h, w) in enumerate(sizes):
        table = value[:, start : start + h * w]
        start += h * w
        x, y = locations[:, :, :, level, :, 0] * w - 0.5, locations[:, :, :, level, :, 1] * h - 0.5
        for dy in (0, 1):
            for dx in (0, 1):
                row, column = jnp.floor(y) + dy, jnp.floor(x) + dx
                share = (1 - abs(y - row)) * (1 - abs(x - column)) * weights[:, :, :, level]
                share = jnp.where((row >= 0) & (row < h) & (column >= 0) & (column < w), share, 0)
                index = (jnp.clip(row, 0, h - 1) * w + jnp.clip(column, 0, w - 1)).astype(int)
                total += (table[image, index, head] * share[..., None]).sum(3)
    return total


def arrays():
    rng = np.random.default_rng(0)
    value = rng.normal(size=(2, PLACES, 2, 4))
    locations = rng.uniform(-0.3, 1.3, size=(2, 6, 2, 3, 4, 2))
    locations[0, 0] = -5  # far outside
    weights = rng.uniform(size=(2, 6, 2, 3, 4))
    return tuple(jnp.asarray(x, jnp.float32) for x in (value, locations, weights))


def with_gradients(form):
    def loss(value, locations, weights):
        out = form(value, SIZES, locations, weights)
        return jnp.sin(out).sum(), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


def test_one_packed_gather_is_four_gathers_with_gradients():
    (_, expected), slopes = with_gradients(four_gathers)(*arrays())
    (_, out), ours = with_gradients(deformable_attention)(*arrays())
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for x, y in zip(ours, slopes, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)
    assert not out[0, 0].any()
    # half precision is for values alone, places stay exact
    value, *places = arrays()
    half = jax.jit(lambda *given: deformable_attention(given[0], SIZES, *given[1:]))(
        value.astype(jnp.bfloat16), *places
    )
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), expected, atol=0.03)
    # what a CPU computes map by map, other devices compute at once
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_each", lambda function, *arrays: jax.vmap(function)(*arrays))
        _, at_once = with_gradients(lambda *given: deformable_attention(*given))(*arrays())
    for x, y in zip(at_once, slopes, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_heads_look_in_their_own_directions():
    layer = DeformableAttention(8, 4, 1, 2, rngs=nnx.Rngs(0))
    offsets = layer.offsets.bias[...].reshape(4, 2, 2)
    np.testing.assert_allclose(offsets[:, 0], [[1, 0], [0, 1], [-1, 0], [0, -1]], atol=1e-6)
    np.testing.assert_allclose(offsets[:, 1], 2 * offsets[:, 0], atol=1e-6)
    np.testing.assert_allclose(centres([(1, 2)]), [[0.25, 0.5], [0.75, 0.5]])
