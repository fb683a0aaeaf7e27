"""Adapters: where they stand in the real networks, how they begin, and what they add."""

import jax
import numpy as np
import pytest
import small_diffusion as small

from fmda import trees
from fmda.methods.lora import init_adapters, merged, target_kernels
from fmda.models.clip import TextConfig
from fmda.models.sd_unet import UNetConfig
from fmda.weights.checkpoint import network_graph


def test_stable_diffusion_1_has_them_on_every_projection_of_attention():
    unet, text = network_graph("unet", UNetConfig())[1], network_graph("text_encoder", TextConfig())[1]
    # 16 transformers with two attentions of four projections; 12 layers of the text encoder with one
    assert len(target_kernels(unet)) == 16 * 2 * 4 and len(target_kernels(text)) == 12 * 4
    # per transformer of width c: six projections c -> c, two 768 -> c
    widths = [320] * 5 + [640] * 5 + [1280] * 6
    adapters = jax.eval_shape(lambda key: init_adapters(key, unet, 4), jax.random.key(0))
    assert trees.count(adapters) == sum(4 * (6 * 2 * c + 2 * (c + 768)) for c in widths)


def test_fresh_adapters_change_nothing():
    weights = small.unet().params
    adapters = init_adapters(jax.random.key(0), weights, 2)
    assert small.same(merged(weights, adapters, 3.0), weights)
    first = np.concatenate([leaf.ravel() for path, leaf in trees.flatten(adapters).items() if path.endswith("/a")])
    assert np.std(first) == pytest.approx(0.5, rel=0.1)


def test_the_product_is_added_to_its_kernel_and_to_nothing_else():
    weights = small.text_encoder().params
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, init_adapters(jax.random.key(0), weights, 3))
    before, after, added = (trees.flatten(tree) for tree in (weights, merged(weights, adapters, 0.5), adapters))
    for path, leaf in before.items():
        expected = leaf
        if path in {f"{layer}/kernel" for layer in target_kernels(weights)}:
            layer = path.removesuffix("/kernel")
            expected = leaf + 0.5 * np.asarray(added[f"{layer}/a"]) @ np.asarray(added[f"{layer}/b"])
        np.testing.assert_allclose(after[path], expected, atol=1e-6)
    assert after.keys() == before.keys()
