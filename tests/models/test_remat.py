"""Blocks that are computed again for the backward pass: the same gradients, from less that is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_diffusion import drawn

from fmda.errors import UserError
from fmda.methods.uda.network import Network, NetworkConfig
from fmda.models.dinov2 import Dinov2, Dinov2Config
from fmda.models.lite_segmenter import LiteSegmenterConfig
from fmda.models.mit import MitConfig, Stage
from fmda.models.module import abstract, with_remat
from fmda.weights.checkpoint import network_graph
from fmda.weights.network import save

MIT = MitConfig((8, 8, 8, 8), (1, 1, 1, 1), (1, 1, 2, 2), drop_path=0.5)
DINOV2 = Dinov2Config(width=8, layers=1, heads=2, maps=(1,))
MAKES = {
    "mit": lambda rngs: Stage(MIT, 0, dtype=jnp.float32, rngs=rngs),
    "dinov2": lambda rngs: Dinov2(DINOV2, rngs=rngs),
}


@pytest.mark.parametrize("name", MAKES)
def test_gradients_stay_the_same(name):
    graphdef, shapes = abstract(MAKES[name])
    params = drawn(shapes)
    pixels = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)

    def gradient(graphdef):
        def loss(params):
            module = nnx.merge(graphdef, params)
            run = module if name == "mit" else module.stages
            return (jnp.stack(run(pixels, jax.random.key(0))) ** 2).mean()

        return jax.grad(loss)

    again = gradient(with_remat(graphdef, shapes))
    assert "remat" in str(jax.make_jaxpr(again)(params))
    plain, ours = jax.jit(lambda params: (gradient(graphdef)(params), again(params)))(params)
    for one, two in zip(jax.tree.leaves(plain), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6)


def test_a_network_without_blocks_is_refused(tmp_path):
    config = LiteSegmenterConfig(width=8)
    save("lite_segmenter", tmp_path, config, drawn(network_graph("lite_segmenter", config)[1]))
    with pytest.raises(UserError, match="network.remat: 'lite_segmenter' has no blocks"):
        Network(NetworkConfig(start=str(tmp_path), remat=True), 19)
