"""Classifier-free guidance: values by hand, and one call of the network for both halves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmda.diffusion.guidance import guided
from fmda.diffusion.samplers import sample
from fmda.diffusion.schedule import ScheduleConfig

RNG = np.random.default_rng(0)
LATENTS = jnp.asarray(RNG.normal(size=(3, 2, 2, 4)).astype(np.float32))
CONTEXT = jnp.asarray(RNG.normal(size=(3, 5, 6)).astype(np.float32))
EMPTY = jnp.asarray(RNG.normal(size=(5, 6)).astype(np.float32))


def network(latents, timesteps, context):
    """A prediction in which every input shows."""
    told = jnp.mean(context, axis=(1, 2)) + timesteps / 1000
    return latents * 0.5 + told[:, None, None, None]


def by_hand(scale, empty):
    with_caption = 0.5 * LATENTS + jnp.mean(CONTEXT, axis=(1, 2))[:, None, None, None] + 0.7
    without = 0.5 * LATENTS + jnp.broadcast_to(jnp.mean(empty, axis=(-2, -1)), 3)[:, None, None, None] + 0.7
    return without + scale * (with_caption - without)


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_values(scale):
    found = guided(network, CONTEXT, EMPTY, scale)(LATENTS, jnp.float32(700))
    np.testing.assert_allclose(found, by_hand(scale, EMPTY), atol=1e-5)


def test_one_empty_caption_for_each():
    empty = jnp.stack([EMPTY, 2 * EMPTY, 3 * EMPTY])
    found = guided(network, CONTEXT, empty, 2.0)(LATENTS, jnp.float32(700))
    np.testing.assert_allclose(found, by_hand(2.0, empty), atol=1e-5)


def test_one_call_with_both_halves_the_empty_one_first():
    calls = []

    def spy(latents, timesteps, context):
        calls.append((latents, timesteps, context))
        return network(latents, timesteps, context)

    guided(spy, CONTEXT, EMPTY, 7.5)(LATENTS, jnp.float32(700))
    ((latents, timesteps, context),) = calls
    assert latents.shape == (6, 2, 2, 4) and timesteps.tolist() == [700.0] * 6
    np.testing.assert_array_equal(context[2], EMPTY)
    np.testing.assert_array_equal(context[3:], CONTEXT)


def test_guidance_inside_a_sampler_with_the_scale_as_an_argument():
    @jax.jit
    def draw(start, context, scale):
        denoise = guided(network, context, EMPTY, scale)
        return sample(denoise, start, ScheduleConfig(), sampler="ddim", steps=4)

    captioned = sample(
        lambda x, t: network(x, jnp.broadcast_to(t, 3), CONTEXT), LATENTS, ScheduleConfig(), sampler="ddim", steps=4
    )
    np.testing.assert_allclose(draw(LATENTS, CONTEXT, 1.0), captioned, rtol=1e-5, atol=1e-5)
    assert not np.allclose(draw(LATENTS, CONTEXT, 7.5), captioned)


def test_bfloat16_network_gives_float32():
    def half(latents, timesteps, context):
        return network(latents, timesteps, context).astype(jnp.bfloat16)

    found = guided(half, CONTEXT.astype(jnp.bfloat16), EMPTY, 7.5)(LATENTS, jnp.float32(700))
    assert found.dtype == jnp.float32
