"""The loss of a step: its draws, its two halves, what it trains, and that no division of the batch changes it.

The networks here are a few lines each, so that all of it is computed by hand too; the real ones stand in the tests of
parity and of whole runs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fmda import trees
from fmda.diffusion.draw import Graphs
from fmda.diffusion.schedule import ScheduleConfig, alphas_cumprod
from fmda.methods.datum import dreambooth
from fmda.methods.datum.dreambooth import NoiseConfig, make_objective
from fmda.methods.lora import init_adapters, merged
from fmda.models.module import abstract
from fmda.train import create_state, make_step

CHANNELS, WIDTH, SCALE = 2, 3, 0.5
RNG = np.random.default_rng(0)


class Unet(nnx.Module):
    """Latents times a matrix, plus a projection of the mean text state, plus the time."""

    def __init__(self, rngs):
        self.mix = nnx.Linear(CHANNELS, CHANNELS, rngs=rngs)
        self.attention = nnx.Dict(query=nnx.Linear(WIDTH, CHANNELS, use_bias=False, rngs=rngs))

    def __call__(self, latents, times, context):
        words = self.attention["query"](context.mean(axis=1))
        return self.mix(latents) + words[:, None, None] + times[:, None, None, None] / 1000


class Text(nnx.Module):
    """A table of token states."""

    def __init__(self, rngs):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (8, WIDTH)))

    def hidden(self, ids):
        return jnp.tanh(self.table[...][ids])


class Vae(nnx.Module):
    """Means over 2x2 pixels as the mean, a constant as the log-variance."""

    def __init__(self, rngs):
        self.logvar = nnx.Param(jnp.full((CHANNELS,), -1.0))

    def encode(self, images):
        n, height, width, _ = images.shape
        mean = images.reshape(n, height // 2, 2, width // 2, 2, 3).mean(axis=(2, 4))[..., :CHANNELS]
        return mean, jnp.broadcast_to(self.logvar[...][None, None, None], mean.shape)


def drawn(shapes):
    return jax.tree.map(lambda leaf: jnp.asarray(RNG.normal(size=leaf.shape), jnp.float32), shapes)


(UNET, UNET_SHAPES), (TEXT, TEXT_SHAPES), (VAE, VAE_SHAPES) = (
    abstract(lambda rngs, make=make: make(rngs)) for make in (Unet, Text, Vae)
)
PARAMS = {"unet": drawn(UNET_SHAPES), "text_encoder": drawn(TEXT_SHAPES)}
VAE_PARAMS = drawn(VAE_SHAPES)
IDS = np.array([[1, 2, 3], [4, 5, 5]], np.int32)
GRAPHS = Graphs(UNET, VAE, TEXT, ScheduleConfig(), SCALE)
FROZEN = {"vae": VAE_PARAMS, "ids": IDS[:1]}
noised = jax.jit(dreambooth.noised, static_argnums=(0, 4))


@functools.cache
def objective(**options):
    return jax.jit(make_objective(GRAPHS, **options))


def outcome(params, frozen, rows, **options):
    return objective(**options)(params, None, frozen, rows, None)


def batch(rows=4, pictures=1):
    return {
        "pixels": RNG.integers(0, 256, (rows, pictures, 4, 4, 3), np.uint8),
        "seed": RNG.integers(2**32, size=(rows, pictures), dtype=np.uint32),
    }


def moments(pixels):
    mean, logvar = nnx.merge(VAE, VAE_PARAMS).encode(np.asarray(pixels, np.float32) / 127.5 - 1)
    return np.asarray(mean), np.asarray(logvar)


def test_latents_are_drawn_from_the_gaussian_times_from_all_and_noise_by_the_schedule():
    mean, logvar = np.full((4000, 2, 2, 1), 3.0, np.float32), np.full((4000, 2, 2, 1), np.log(4.0), np.float32)
    seeds = RNG.integers(2**32, size=4000, dtype=np.uint32)
    latents, times, target = noised(GRAPHS, mean, logvar, seeds)
    left = alphas_cumprod(GRAPHS.schedule)[times][:, None, None, None]
    clean = (np.asarray(latents) - np.sqrt(1 - left) * np.asarray(target)) / np.sqrt(left)
    assert np.mean(target) == pytest.approx(0, abs=0.03) and np.std(target) == pytest.approx(1, abs=0.03)
    near = left.ravel() > 0.1  # where little is left, rounding is divided by little
    assert np.mean(clean[near]) == pytest.approx(3 * SCALE, abs=0.03)
    assert np.std(clean[near]) == pytest.approx(2 * SCALE, abs=0.03)
    assert times.min() >= 0 and times.max() <= 999 and np.mean(times) == pytest.approx(499.5, abs=15)


def test_a_velocity_is_the_target_where_the_schedule_predicts_one():
    graphs = dataclasses.replace(GRAPHS, schedule=ScheduleConfig(prediction="v_prediction"))
    mean, logvar, seeds = RNG.normal(size=(5, 2, 2, 2)), np.zeros((5, 2, 2, 2)), np.arange(5, dtype=np.uint32)
    mean, logvar = mean.astype(np.float32), logvar.astype(np.float32)
    noise = noised(GRAPHS, mean, logvar, seeds)
    found = noised(graphs, mean, logvar, seeds)
    # two programs
    np.testing.assert_allclose(found.latents, noise.latents, atol=1e-6)
    left = alphas_cumprod(GRAPHS.schedule)[found.times][:, None, None, None]
    clean = (np.asarray(noise.latents) - np.sqrt(1 - left) * noise.target) / np.sqrt(left)
    velocity = np.sqrt(left) * noise.target - np.sqrt(1 - left) * clean
    np.testing.assert_allclose(found.target, velocity, atol=1e-4)


def test_an_offset_moves_the_noise_of_a_channel_as_a_whole():
    n = 500
    mean, seeds = np.zeros((n, 8, 8, CHANNELS), np.float32), np.arange(n, dtype=np.uint32)
    plain = noised(GRAPHS, mean, mean, seeds)
    found = noised(GRAPHS, mean, mean, seeds, NoiseConfig(offset=0.5))
    moved = np.asarray(found.target - plain.target)
    np.testing.assert_allclose(moved, np.broadcast_to(moved[:, :1, :1], moved.shape), atol=1e-6)
    offsets = moved[:, 0, 0]
    assert np.std(offsets, axis=0) == pytest.approx([0.5] * CHANNELS, abs=0.05)
    assert abs(np.corrcoef(offsets.T)[0, 1]) < 0.15
    left = alphas_cumprod(GRAPHS.schedule)[found.times][:, None, None, None]
    np.testing.assert_array_equal(found.times, plain.times)
    np.testing.assert_allclose(found.latents - plain.latents, np.sqrt(1 - left) * moved, atol=1e-5)


def test_no_time_before_the_earliest_is_drawn():
    mean, seeds = np.zeros((2000, 1, 1, CHANNELS), np.float32), np.arange(2000, dtype=np.uint32)
    times = np.asarray(noised(GRAPHS, mean, mean, seeds, NoiseConfig(earliest=0.5)).times)
    assert times.min() >= 500 and times.max() <= 999 and times.mean() == pytest.approx(749.5, abs=10)


def test_what_an_example_draws_does_not_depend_on_the_others():
    mean, logvar = (RNG.normal(size=(6, 2, 2, 2)).astype(np.float32) for _ in range(2))
    seeds = np.arange(6, dtype=np.uint32)
    whole = noised(GRAPHS, mean, logvar, seeds)
    part = noised(GRAPHS, mean[4:], logvar[4:], seeds[4:])
    for ours, theirs in zip(part, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs[4:])


def predicted(params, latents, times, ids):
    """The stand-in UNet in numpy."""
    p = jax.tree.map(np.asarray, params)
    words = np.tanh(p["text_encoder"]["table"][ids]).mean(0) @ p["unet"]["attention"]["query"]["kernel"]
    mixed = np.asarray(latents) @ p["unet"]["mix"]["kernel"] + p["unet"]["mix"]["bias"]
    return mixed + words + np.asarray(times)[:, None, None, None] / 1000


def test_the_loss_is_the_mean_squared_error_of_the_prediction():
    rows = batch(5)
    value, metrics, _ = outcome(PARAMS, FROZEN, rows)
    asked = noised(GRAPHS, *moments(rows["pixels"][:, 0]), rows["seed"][:, 0])
    error = predicted(PARAMS, asked.latents, asked.times, IDS[0]) - asked.target
    assert float(value) == pytest.approx(float((error**2).mean()), rel=1e-5)
    assert metrics == {}


def test_class_pictures_are_the_second_half_of_the_loss():
    rows = batch(4, pictures=2)
    value, metrics, _ = outcome(PARAMS, FROZEN | {"ids": IDS}, rows, prior_weight=0.25)
    halves = []
    for half, name in enumerate(("target_loss", "prior_loss")):
        alone = {key: leaf[:, half : half + 1] for key, leaf in rows.items()}
        halves.append(float(outcome(PARAMS, FROZEN | {"ids": IDS[half : half + 1]}, alone).loss))
        assert float(metrics[name]) == pytest.approx(halves[-1], rel=1e-5)
    assert float(value) == pytest.approx(halves[0] + 0.25 * halves[1], rel=1e-5)


def test_encoded_crops_give_what_the_crops_give():
    rows = batch(3)
    mean, logvar = moments(rows["pixels"][:, 0])
    bank = {"moments": np.concatenate([mean, logvar], -1)[:, None], "seed": rows["seed"]}
    ours, theirs = (float(outcome(PARAMS, FROZEN, given).loss) for given in (bank, rows))
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_a_text_encoder_that_does_not_train_is_read_once():
    rows = batch(3)
    context = nnx.merge(TEXT, PARAMS["text_encoder"]).hidden(IDS[:1])
    alone = {"unet": PARAMS["unet"]}
    frozen = {"vae": VAE_PARAMS, "context": context}
    ours = float(outcome(alone, frozen, rows).loss)
    assert ours == pytest.approx(float(outcome(PARAMS, FROZEN, rows).loss), rel=1e-6)


def trained(params, frozen, rows, accumulate=1):
    """The parameters after one step of plain gradient descent, which hides no factor."""
    tx = optax.sgd(0.1)
    step = jax.jit(make_step(objective(lora_scale=2.0), tx, accumulate=accumulate))
    state, metrics = step(create_state(params, tx, teacher=False), frozen, rows, jax.random.key(0))
    return state.params, metrics


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_is_the_batch(parts):
    rows = batch(8)
    (whole, first), (split, second) = trained(PARAMS, FROZEN, rows), trained(PARAMS, FROZEN, rows, parts)
    for ours, theirs in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert float(second["loss"]) == pytest.approx(float(first["loss"]), rel=1e-5)


def moved(before, after):
    return {
        path for path, leaf in trees.flatten(before).items() if not np.array_equal(leaf, trees.flatten(after)[path])
    }


def test_all_that_is_given_to_train_moves():
    after, _ = trained(PARAMS, FROZEN, batch())
    assert moved(PARAMS, after) == set(trees.flatten(PARAMS))


def test_adapters_begin_as_nothing_and_move_alone():
    adapters = {"unet": init_adapters(jax.random.key(1), PARAMS["unet"], 2)}
    frozen = {"vae": VAE_PARAMS, "unet": PARAMS["unet"], "text_encoder": PARAMS["text_encoder"], "ids": IDS[:1]}
    rows = batch()
    assert float(outcome(adapters, frozen, rows).loss) == pytest.approx(
        float(outcome(PARAMS, FROZEN, rows).loss), rel=1e-6
    )
    # a has no gradient while b is zero
    after, _ = trained(adapters, frozen, rows)
    assert moved(adapters, after) == {"unet/attention/query/b"}
    again, _ = trained(after, frozen, rows)
    assert moved(after, again) == {"unet/attention/query/a", "unet/attention/query/b"}
    whole = {"unet": merged(PARAMS["unet"], again["unet"], 2.0), "text_encoder": PARAMS["text_encoder"]}
    ours = float(outcome(again, frozen, rows, lora_scale=2.0).loss)
    assert ours == pytest.approx(float(outcome(whole, FROZEN, rows).loss), rel=1e-6)
