"""Batch normalisation by the batch: values by hand, statistics as plain trees, torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fmda.models.module import abstract, assembled, init, separated, statistics_of
from fmda.nn.norm import BatchNorm


def make(rngs):
    return BatchNorm(2, rngs=rngs)


def test_statistics_go_in_and_out_as_trees():
    graphdef, _ = abstract(make)
    params, statistics = separated(graphdef, init(make, jax.random.key(0)))
    assert set(params) == {"scale", "bias"} and set(statistics) == {"mean", "var"}
    x = jnp.array([[1.0, 0.0], [3.0, 4.0]])

    @jax.jit
    def step(params, statistics):
        def loss(params):
            module = assembled(graphdef, params, statistics, batch_statistics=True)
            y = module(x)
            return y[0, 0], (y, statistics_of(module))

        return jax.grad(loss, has_aux=True)(params)

    grads, (y, moved) = step(params, statistics)
    # means 2 and 2, biased variances 1 and 4, unbiased ones 2 and 8
    np.testing.assert_allclose(y, [[-1, -1], [1, 1]], rtol=1e-5)
    np.testing.assert_allclose(moved["mean"], [0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(moved["var"], [0.9 + 0.2, 0.9 + 0.8], rtol=1e-6)
    np.testing.assert_allclose(grads["scale"], [-1, 0], atol=1e-5)
    # stored statistics normalise unless the batch's are asked for, and stay as they are
    module = assembled(graphdef, params, statistics)
    np.testing.assert_allclose(module(x), x, rtol=1e-5)
    np.testing.assert_array_equal(statistics_of(module)["var"], [1, 1])


def test_a_network_without_batch_normalisation_has_no_statistics():
    def linear(rngs):
        return nnx.Linear(2, 3, rngs=rngs)

    graphdef, _ = abstract(linear)
    params, statistics = separated(graphdef, init(linear, jax.random.key(0)))
    assert set(params) == {"kernel", "bias"} and statistics == {}
    assert statistics_of(assembled(graphdef, params, statistics, batch_statistics=True)) == {}


@pytest.mark.parity
def test_equals_torch_in_training():
    import torch

    x = np.random.default_rng(0).normal(3, 2, size=(2, 5, 4, 3)).astype(np.float32)
    theirs = torch.nn.BatchNorm2d(3).train()
    inputs = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    out = theirs(inputs)
    (out**3).sum().backward()
    graphdef, _ = abstract(lambda rngs: BatchNorm(3, rngs=rngs))
    tree = separated(graphdef, init(lambda rngs: BatchNorm(3, rngs=rngs), jax.random.key(0)))
    y, back = jax.vjp(lambda x: assembled(graphdef, *tree, batch_statistics=True)(x), x)
    np.testing.assert_allclose(y, out.detach().numpy().transpose(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(back(3 * y**2)[0], inputs.grad.numpy().transpose(0, 2, 3, 1), atol=1e-4)
