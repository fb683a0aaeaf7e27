"""Whole trajectories of diffusers' torch schedulers, under a network that bends: tanh of mixed channels plus the time.

Tolerances are of the largest value of a trajectory's end, 1e-5; found were at most 2e-6.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmda.diffusion.samplers import SAMPLERS, sample, timesteps
from fmda.diffusion.schedule import BETA_SCHEDULES, CLASSES, SPACINGS, ScheduleConfig, add_noise, alphas_cumprod

pytestmark = pytest.mark.parity

RNG = np.random.default_rng(0)
MIX = (RNG.normal(size=(4, 4)) / 2).astype(np.float32)
START = RNG.normal(size=(2, 3, 3, 4)).astype(np.float32)
SD1 = ScheduleConfig()
SD2 = ScheduleConfig(prediction="v_prediction", steps_offset=1)


def scheduler_of(config, sampler):
    """Returns diffusers' scheduler for our configuration, by way of the file."""
    import diffusers

    name = next(name for name, ours in CLASSES.items() if ours == sampler)
    return getattr(diffusers, name).from_config(config.to_json())


def theirs(config, sampler, steps):
    import torch

    scheduler, mix = scheduler_of(config, sampler), torch.tensor(MIX)
    scheduler.set_timesteps(steps)
    x = torch.tensor(START) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        prediction = torch.tanh(scheduler.scale_model_input(x, t) @ mix + float(t) / 1000)
        x = scheduler.step(prediction, t, x).prev_sample
    return x.numpy(), scheduler.timesteps.numpy()


def ours(config, sampler, steps):
    def network(x, t):
        return jnp.tanh(jnp.matmul(x, MIX, precision="highest") + t / 1000)

    return np.asarray(jax.jit(lambda x: sample(network, x, config, sampler=sampler, steps=steps))(START))


def error(config, sampler, steps):
    """Returns the largest difference of the last latents over their largest value; the timesteps are the same."""
    expected, times = theirs(config, sampler, steps)
    np.testing.assert_array_equal(timesteps(config, sampler, steps), times)
    return np.abs(ours(config, sampler, steps) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("config", [SD1, SD2], ids=["sd1", "sd2"])
def test_trajectory(config, sampler, steps):
    assert error(config, sampler, steps) < 1e-5


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_trajectory_on_every_grid(sampler, spacing):
    assert error(ScheduleConfig(prediction="v_prediction", spacing=spacing), sampler, 15) < 1e-5


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("ddim", {"set_alpha_to_one": True}),
        ("ddim", {"set_alpha_to_one": None}),
        ("ddim", {"prediction": "sample", "steps_offset": 0}),
        ("plms", {"set_alpha_to_one": True}),
        ("plms", {"set_alpha_to_one": None}),
        ("euler", {"final_sigma": "sigma_min"}),
        ("euler", {"prediction": "sample"}),
        ("dpm++2m", {"final_sigma": "sigma_min"}),
        ("dpm++2m", {"final_sigma": "sigma_min", "euler_at_final": True}),
        ("dpm++2m", {"prediction": "sample"}),
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 17])
def test_trajectory_with_options(sampler, options, steps):
    assert error(ScheduleConfig(**options), sampler, steps) < 1e-5


def test_trajectory_with_clipping():
    # their clean estimate is rounded in float32 before it is clipped
    assert error(ScheduleConfig(clip=0.9), "ddim", 20) < 5e-5


@pytest.mark.parametrize(
    ("sampler", "tolerance"),
    # they run euler at sigmas up to 4096 in float32, where we keep to unit variance
    [("ddim", 2e-5), ("euler", 1e-3), ("dpm++2m", 2e-5)],
)
def test_trajectory_from_pure_noise(sampler, tolerance):
    config = ScheduleConfig(prediction="v_prediction", zero_terminal_snr=True, spacing="trailing")
    assert error(config, sampler, 20) < tolerance


@pytest.mark.parametrize("betas", BETA_SCHEDULES)
def test_alphas(betas):
    config = ScheduleConfig(beta_schedule=betas)
    expected = scheduler_of(config, "ddim").alphas_cumprod.numpy()
    np.testing.assert_allclose(alphas_cumprod(config), expected, rtol=2.4e-7)  # two units of the last place


@pytest.mark.parametrize("betas", BETA_SCHEDULES)
def test_alphas_of_zero_terminal_snr(betas):
    config = ScheduleConfig(beta_schedule=betas, zero_terminal_snr=True)
    expected = scheduler_of(config, "ddim").alphas_cumprod.numpy()
    np.testing.assert_allclose(alphas_cumprod(config), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noising(sampler):
    import diffusers
    import torch

    config, times = ScheduleConfig(sampler=sampler), np.array([3, 800])
    clean, noise = np.random.default_rng(2).normal(size=(2, *START.shape)).astype(np.float32)
    scheduler = diffusers.DDPMScheduler.from_config(config.to_json())
    expected = scheduler.add_noise(torch.tensor(clean), torch.tensor(noise), torch.tensor(times))
    np.testing.assert_allclose(add_noise(config, clean, noise, times), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_our_file_opens_in_diffusers_and_theirs_here(sampler, tmp_path):
    import json

    config = ScheduleConfig(prediction="v_prediction", train_steps=500, spacing="leading", sampler=sampler)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config.to_json()))
    scheduler = type(scheduler_of(config, sampler)).from_pretrained(tmp_path)
    assert scheduler.config.prediction_type == "v_prediction" and len(scheduler.betas) == 500
    scheduler.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "scheduler_config.json").read_text())
    assert ScheduleConfig.from_json(again) == config
