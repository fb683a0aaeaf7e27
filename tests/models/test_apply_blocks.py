"""Blocks that are computed again for the backward pass, or run in a loop: the same gradients."""

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
from fmda.models.module import abstract, with_blocks
from fmda.weights.checkpoint import network_graph
from fmda.weights.network import save

MIT = MitConfig((8, 8, 8, 8), (3, 1, 1, 1), (1, 1, 2, 2), drop_path=0.9)
DINOV2 = Dinov2Config(width=8, layers=4, heads=2, maps=(1, 4), drop_path=0.5)
MAKES = {
    "mit": lambda rngs: Stage(MIT, 0, dtype=jnp.float32, rngs=rngs),
    "dinov2": lambda rngs: Dinov2(DINOV2, rngs=rngs),
}


def gradient(name, graphdef):
    pixels = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)

    def loss(params):
        module = nnx.merge(graphdef, params)
        run = module if name == "mit" else module.stages
        return sum((x**2).mean() for x in jax.tree.leaves(run(pixels, jax.random.key(0))))

    return jax.grad(loss)


def equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in pairs)


@pytest.mark.parametrize("how", [{"remat": True}, {"scan": True}, {"remat": True, "scan": True}])
@pytest.mark.parametrize("name", MAKES)
def test_gradients_stay_the_same(name, how):
    graphdef, shapes = abstract(MAKES[name])
    params = drawn(shapes)
    ours = gradient(name, with_blocks(graphdef, shapes, **how))
    program = str(jax.make_jaxpr(ours)(params))
    assert all({"remat": "remat", "scan": "scan["}[setting] in program for setting in how)
    assert equal(jax.jit(gradient(name, graphdef))(params), jax.jit(ours)(params))


def test_each_block_of_a_loop_has_its_own_key_and_rate(monkeypatch):
    graphdef, shapes = abstract(MAKES["mit"])
    params = drawn(shapes)
    plain = jax.jit(gradient("mit", graphdef))(params)
    looped = with_blocks(graphdef, shapes, scan=True)
    # faulty twins: one rate for all blocks; keys counted from another block
    asarray, fold_in = jnp.asarray, jax.random.fold_in
    with monkeypatch.context() as patch:
        patch.setattr(jnp, "asarray", lambda a, *rest: asarray([a[0]] * 3 if isinstance(a, tuple) else a, *rest))
        assert not equal(plain, jax.jit(gradient("mit", looped))(params))
    with monkeypatch.context() as patch:
        patch.setattr(jax.random, "fold_in", lambda key, index: fold_in(key, index + 1))
        assert not equal(plain, jax.jit(gradient("mit", looped))(params))


@pytest.mark.parametrize("setting", ["remat", "scan"])
def test_a_network_without_blocks_is_refused(tmp_path, setting):
    config = LiteSegmenterConfig(width=8)
    save("lite_segmenter", tmp_path, config, drawn(network_graph("lite_segmenter", config)[1]))
    with pytest.raises(UserError, match=f"network.{setting}: 'lite_segmenter' has no blocks"):
        Network(NetworkConfig(start=str(tmp_path), **{setting: True}), 19)
