"""Schedule values by hand and by recorded Flax schedulers; scheduler_config.json in both directions."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from fmda.diffusion.samplers import SAMPLERS, timesteps
from fmda.diffusion.schedule import (
    BETA_SCHEDULES,
    PREDICTIONS,
    ScheduleConfig,
    add_noise,
    alphas_cumprod,
    training_target,
    velocity,
)
from fmda.errors import UserError

FIXTURES = Path(__file__).parent.parent / "fixtures"
SD1 = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.7.0.dev0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
}  # fmt: skip
SD2 = SD1 | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}


def test_alphas_of_stable_diffusion():
    left = alphas_cumprod(ScheduleConfig())
    np.testing.assert_allclose(left[[0, 1, -1]], [0.99915, 0.998296, 0.0046601], atol=5e-7)
    assert left.shape == (1000,) and left.dtype == np.float32 and (np.diff(left) < 0).all()


def test_linear_alphas_are_a_running_product():
    left = alphas_cumprod(ScheduleConfig(train_steps=3, beta_start=0.1, beta_end=0.3, beta_schedule="linear"))
    np.testing.assert_allclose(left, [0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7], rtol=1e-6)


def test_cosine_alphas_follow_their_curve():
    left = alphas_cumprod(ScheduleConfig(train_steps=100, beta_schedule="squaredcos_cap_v2"))
    curve = np.cos((np.array([0.5, 0.0]) + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(left[49], curve[0] / curve[1], rtol=1e-5)


@pytest.mark.parametrize("betas", BETA_SCHEDULES)
def test_zero_terminal_snr_stretches_the_schedule(betas):
    plain = alphas_cumprod(ScheduleConfig(beta_schedule=betas)).astype(np.float64)
    left = alphas_cumprod(ScheduleConfig(beta_schedule=betas, zero_terminal_snr=True))
    assert left[-1] == 0 and left[-2] > 0
    root = np.sqrt(plain)
    expected = (root[500] - root[-1]) * root[0] / (root[0] - root[-1])
    np.testing.assert_allclose([left[0], left[500]], [plain[0], expected**2], rtol=1e-6)


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_noising_equals_flax_schedulers(name):
    io = np.load(FIXTURES / f"flax-hf-{name}" / "schedulers.npz")
    given = (ScheduleConfig(), io["latents"], io["noise"], io["ddpm_t"])
    np.testing.assert_allclose(add_noise(*given), io["ddpm_noisy"], atol=2e-6)
    np.testing.assert_allclose(velocity(*given), io["ddpm_velocity"], atol=2e-6)


@pytest.fixture
def pictures():
    clean, noise = np.random.default_rng(0).normal(size=(2, 4, 3, 3, 2)).astype(np.float32)
    return jnp.asarray(clean), jnp.asarray(noise), jnp.array([0, 1, 500, 999])


def test_training_targets(pictures):
    clean, noise, times = pictures
    targets = {p: training_target(ScheduleConfig(prediction=p), clean, noise, times) for p in PREDICTIONS}
    left = alphas_cumprod(ScheduleConfig())[500]
    np.testing.assert_array_equal(targets["epsilon"], noise)
    np.testing.assert_array_equal(targets["sample"], clean)
    expected = np.sqrt(left) * noise[2] - np.sqrt(1 - left) * clean[2]
    np.testing.assert_allclose(targets["v_prediction"][2], expected, atol=1e-6)


def test_noising_is_float32_whatever_comes_in(pictures):
    clean, noise, times = pictures
    noisy = add_noise(ScheduleConfig(), clean.astype(jnp.bfloat16), noise.astype(jnp.bfloat16), times)
    assert noisy.dtype == jnp.float32


def test_config_of_stable_diffusion_1_is_the_default():
    assert ScheduleConfig.from_json(SD1) == ScheduleConfig()


def test_config_of_stable_diffusion_2():
    assert ScheduleConfig.from_json(SD2) == ScheduleConfig(prediction="v_prediction", sampler="ddim")


def test_absent_keys_mean_what_the_pipeline_makes_of_them():
    expected = ScheduleConfig(
        beta_start=0.0001, beta_end=0.02, beta_schedule="linear", set_alpha_to_one=None, steps_offset=1, sampler="euler"
    )
    assert ScheduleConfig.from_json({"_class_name": "EulerDiscreteScheduler"}) == expected


def test_flax_class_names_are_known():
    assert ScheduleConfig.from_json(SD1 | {"_class_name": "FlaxPNDMScheduler"}).sampler == "plms"


def test_keys_without_influence_are_ignored():
    more = {"sample_max_value": 1.0, "dynamic_thresholding_ratio": 0.995, "sigma_min": None, "use_karras_sigmas": False}
    assert ScheduleConfig.from_json(SD1 | more) == ScheduleConfig()


def test_clipping_is_read_with_its_range():
    assert ScheduleConfig.from_json(SD2 | {"clip_sample": True}).clip == 1.0
    assert ScheduleConfig.from_json(SD2 | {"clip_sample": True, "clip_sample_range": 3.0}).clip == 3.0


def test_stable_diffusion_runs_without_clipping_from_step_1_whatever_the_file_says():
    old = ScheduleConfig.from_json(SD2 | {"clip_sample": True, "steps_offset": 0})
    assert (old.clip, old.steps_offset) == (1.0, 0)
    assert (
        old.in_stable_diffusion()
        == ScheduleConfig.from_json(SD2)
        == ScheduleConfig.from_json(SD2).in_stable_diffusion()
    )


@pytest.mark.parametrize(
    "config",
    [
        ScheduleConfig(),
        ScheduleConfig(prediction="v_prediction", sampler="ddim", clip=2.0, zero_terminal_snr=True, spacing="trailing"),
        ScheduleConfig(sampler="euler", final_sigma="sigma_min", set_alpha_to_one=None, beta_schedule="linear"),
        ScheduleConfig(train_steps=400, steps_offset=0, sampler="dpm++2m", prediction="sample", set_alpha_to_one=True),
    ],
)
def test_config_survives_the_file(config):
    assert ScheduleConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_class_name": "PNDMSchedular", "beta_start": None},
            "_class_name: 'PNDMSchedular' is not supported, and the file holds no beta_start, beta_end and beta_s",
        ),
        ({"_class_name": "KarrasVeScheduler", "beta_end": None}, "_class_name: 'KarrasVeScheduler' is not supported"),
        ({"_class_name": None, "beta_schedule": None}, "_class_name: '' is not supported"),
        ({"beta_schedule": "scaled_liner"}, "beta_schedule is 'scaled_liner', not a known word; did you mean 'scaled_"),
        ({"beta_schedule": ["linear"]}, "beta_schedule is ['linear'], not a known word; known: linear, scaled_"),
        ({"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction', not a known word; did you"),
        ({"timestep_spacing": "even"}, "timestep_spacing is 'even'"),
        ({"final_sigmas_type": 0}, "final_sigmas_type is 0"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas is [0.1, 0.2], not None, which alone can be built; correct"),
        ({"timestep_type": "continuous"}, "timestep_type is 'continuous', not 'discrete', which alone can be built"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas is True, not False, which alone can be built; correct the file"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps is '1000', not one whole number above 0; correct"),
        ({"num_train_timesteps": True}, "num_train_timesteps is True, not one whole number"),
        ({"num_train_timesteps": 1}, "num_train_timesteps is 1, not a whole number above 1"),
        ({"steps_offset": 1000}, "steps_offset is 1000, not one whole number from 0 to 999"),
        ({"set_alpha_to_one": 1}, "set_alpha_to_one is 1, not true or false"),
        ({"beta_start": 0.5}, "beta_end is 0.012, not a number from beta_start, 0.5, to below 1"),
        ({"beta_end": float("nan")}, "beta_end is nan, not one finite number above 0"),
        ({"clip_sample": True, "clip_sample_range": 0}, "clip_sample_range is 0, not one finite number above 0"),
        ({"clip_sample": True, "clip_sample_range": "1"}, "clip_sample_range is '1', not one finite number above 0"),
        ({"clip_sample": "no"}, "clip_sample is 'no', not true or false"),
    ],
)
def test_unusable_file_is_one_line_with_the_mend(change, message):
    with pytest.raises(UserError) as caught:
        ScheduleConfig.from_json(SD1 | change, "model/scheduler/scheduler_config.json")
    assert str(caught.value).startswith("model/scheduler/scheduler_config.json: ")
    assert message in str(caught.value) and "\n" not in str(caught.value)


FOREIGN = (
    "DDPMScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler", "LMSDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler",
)  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_betas_and_prediction_come_from_any_discrete_scheduler(name):
    values = SD2 | {"_class_name": name, "beta_end": 0.013}
    config = ScheduleConfig.from_json(values)
    assert (config.beta_end, config.prediction, config.sampler) == (0.013, "v_prediction", None)
    assert [len(timesteps(config, sampler, 4)) for sampler in SAMPLERS] == [4, 5, 4, 4]
    with pytest.raises(UserError, match="sampler: 'None' does not exist"):
        timesteps(config, config.sampler, 4)
    saved = json.loads(json.dumps(config.to_json()))
    assert saved["_class_name"] == name and ScheduleConfig.from_json(saved) == config


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ({"use_karras_sigmas": True}, "use_karras_sigmas=true, which dpm..2m does not support here"),
        ({"algorithm_type": "sde-dpmsolver++"}, 'algorithm_type="sde-dpmsolver..", which dpm..2m does not'),
        ({"lambda_min_clipped": -5.1}, "lambda_min_clipped=-5.1"),
        ({"solver_order": 3}, "solver_order=3"),
    ],
)
def test_an_unsupported_option_rules_out_the_named_sampler_alone(option, line):
    config = ScheduleConfig.from_json(SD1 | {"_class_name": "DPMSolverMultistepScheduler"} | option)
    assert config.sampler == "dpm++2m" and len(timesteps(config, "plms", 5)) == 6
    with pytest.raises(UserError, match=line):
        timesteps(config, "dpm++2m", 5)
    assert ScheduleConfig.from_json(config.to_json()) == config


def test_runge_kutta_steps_rule_out_plms_alone():
    for values in (SD1 | {"skip_prk_steps": False}, {k: v for k, v in SD1.items() if k != "skip_prk_steps"}):
        config = ScheduleConfig.from_json(values)
        assert len(timesteps(config, "ddim", 5)) == 5
        with pytest.raises(UserError, match="has skip_prk_steps=false, which plms does not support here; choose ddim"):
            timesteps(config, "plms", 5)
