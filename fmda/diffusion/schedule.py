"""The noise schedule of a diffusion model: how much of an image is left at each timestep, and what is predicted.

Everything follows from alpha-bar, the share of the image's variance that is left at timestep t:
noisy = sqrt(alpha-bar) clean + sqrt(1 - alpha-bar) noise. A network predicts the noise ("epsilon"), the velocity
("v_prediction", Salimans & Ho 2022) or the clean image ("sample").
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fmda.errors import UserError, did_you_mean
from fmda.weights.reader import Fields, Keys, written

SAMPLERS = ("ddim", "plms", "euler", "dpm++2m")
CLASSES = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "plms",
    "EulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpm++2m",
}
"""Class names in scheduler_config.json -> our samplers."""

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "linspace", "trailing")
FINAL_SIGMAS = ("zero", "sigma_min")


def _word(choices: tuple[str, ...]) -> Callable[[Fields, str, Any], Any]:
    return lambda fields, key, default: fields.word(key, default, choices)


# The default is diffusers' for an absent key; None: each sampler has its own.
_KEYS: Keys = {
    "train_steps": ("num_train_timesteps", Fields.size, 1000),
    "beta_start": ("beta_start", Fields.number, 0.0001),
    "beta_end": ("beta_end", Fields.number, 0.02),
    "beta_schedule": ("beta_schedule", _word(BETA_SCHEDULES), "linear"),
    "prediction": ("prediction_type", _word(PREDICTIONS), "epsilon"),
    "set_alpha_to_one": ("set_alpha_to_one", Fields.flag, None),
    "spacing": ("timestep_spacing", _word(SPACINGS), None),
    "zero_terminal_snr": ("rescale_betas_zero_snr", Fields.flag, False),
    "final_sigma": ("final_sigmas_type", _word(FINAL_SIGMAS), "zero"),
    "euler_at_final": ("euler_at_final", Fields.flag, False),
}
# Options that change what the network was trained on; only one setting of each exists here.
_ONLY: dict[str, Any] = {
    "trained_betas": (None,),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "timestep_type": ("discrete",),
}
# Options of the samplers themselves, of which only one setting exists here: another one rules out that sampler.
_SAMPLER_ONLY: dict[str, Any] = {
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "interpolation_type": "linear",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "lambda_min_clipped": -math.inf,
    "variance_type": None,
}


@dataclass(frozen=True)
class ScheduleConfig:
    """Noise schedule, kind of prediction and the places of sampling steps; the defaults are Stable Diffusion 1's.

    Attributes:
        train_steps: timesteps of the schedule; a timestep lies in [0, train_steps).
        beta_start, beta_end: first and last share of variance that one step replaces by noise, in (0, 1).
        beta_schedule: "linear" between them, "scaled_linear" (linear in the root), or "squaredcos_cap_v2", which
            needs neither (Nichol & Dhariwal 2021).
        prediction: what the network predicts: "epsilon", "v_prediction" or "sample" (the clean image).
        steps_offset: added to the timesteps of "leading" spacing.
        set_alpha_to_one: whether the last step of ddim and plms ends without noise, else with that of timestep 0.
            None: ddim does, plms does not.
        spacing: places of the sampling steps, "leading", "linspace" or "trailing" (Lin et al. 2024, table 2).
            None: "leading" for ddim and plms, "linspace" for euler and dpm++2m.
        zero_terminal_snr: whether the schedule is stretched so that nothing of the image is left at the last
            timestep (Lin et al. 2024, algorithm 1).
        final_sigma: whether euler and dpm++2m end without noise, "zero", or with that of timestep 0, "sigma_min".
        euler_at_final: whether the last step of dpm++2m is of first order whatever it ends with.
        clip: bound on the size of the clean estimate in ddim; None for none, as latents need it.
        sampler: the sampler that the checkpoint names, one of SAMPLERS, or None for one that does not exist here.
        unsupported: (key, JSON value) of the sampler class or sampler options in the checkpoint's file that do not
            exist here. Training and other samplers do not need them; they are kept for saving.
    """

    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction: str = "epsilon"
    steps_offset: int = 1
    set_alpha_to_one: bool | None = False
    spacing: str | None = None
    zero_terminal_snr: bool = False
    final_sigma: str = "zero"
    euler_at_final: bool = False
    clip: float | None = None
    sampler: str | None = "plms"
    unsupported: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str | Path = "scheduler_config.json") -> "ScheduleConfig":
        """Returns the schedule that a diffusers scheduler_config.json, already parsed, describes.

        Absent and null keys mean what diffusers' Stable Diffusion pipeline makes of them: the scheduler class's own
        default, but no clipping and a steps_offset of 1. Keys without influence on the result are ignored. A scheduler
        class or option that does not exist here is recorded in `unsupported`, provided that the file holds the betas.
        Raises UserError, naming `where`, for anything else that cannot be represented.
        """
        present = {key: value for key, value in values.items() if value is not None}
        fields = Fields(present, Path(where), "correct the file")
        name = str(present.get("_class_name", "")).removeprefix("Flax")
        if name not in CLASSES and not {"beta_start", "beta_end", "beta_schedule"} <= present.keys():
            raise UserError(
                f"{where}: _class_name: '{name}' is not supported, and the file holds no beta_start, beta_end and "
                f"beta_schedule{did_you_mean(name, CLASSES)}"
            )
        fields.only(_ONLY)
        config = cls(**fields.of(_KEYS), sampler=CLASSES.get(name))
        if not config.beta_start <= config.beta_end < 1:
            raise fields.fault("beta_end", f"a number from beta_start, {config.beta_start}, to below 1")
        if config.train_steps < 2:
            raise fields.fault("num_train_timesteps", "a whole number above 1")
        options = {key: present[key] for key, only in _SAMPLER_ONLY.items() if present.get(key, only) != only}
        if name == "PNDMScheduler" and present.get("skip_prk_steps") is not True:
            options["skip_prk_steps"] = False
        if name not in CLASSES:
            options["_class_name"] = name
        return replace(
            config,
            steps_offset=fields.index("steps_offset", 1, config.train_steps),
            clip=fields.number("clip_sample_range", 1.0) if fields.flag("clip_sample", False) else None,
            unsupported=tuple((key, json.dumps(value)) for key, value in options.items()),
        )

    def in_stable_diffusion(self) -> "ScheduleConfig":
        """Returns the schedule as diffusers' StableDiffusionPipeline runs it: a steps_offset of 1, no clipping.

        Early checkpoints' files hold other values, with which those were not meant to be run.
        """
        return replace(self, steps_offset=1, clip=None)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of a scheduler_config.json that diffusers and `from_json` read."""
        kept = {key: value for key, value in written(self, _KEYS, {}).items() if value is not None}
        clip = {"clip_sample": False} if self.clip is None else {"clip_sample": True, "clip_sample_range": self.clip}
        name = next((name for name, sampler in CLASSES.items() if sampler == self.sampler), None)
        unsupported = {key: json.loads(value) for key, value in self.unsupported}
        more = {"steps_offset": self.steps_offset, **clip, "skip_prk_steps": True}
        return {"_class_name": name, **kept, **more, **unsupported}


@functools.lru_cache(maxsize=16)
def alphas_cumprod(config: ScheduleConfig) -> Float[np.ndarray, " t"]:
    """Returns alpha-bar of every timestep, falling in [0, 1], float32 [train_steps]; not to be written to.

    Rounded where diffusers rounds: its values but for the last bit, which depends on the processor there. The
    stretching of `zero_terminal_snr` is done in float64 here, which moves the smallest values by 1e-5 of themselves.
    """
    left = np.cumprod(1 - _betas(config), dtype=np.float64)
    if config.zero_terminal_snr:
        root = np.sqrt(left)
        left = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    out = left.astype(np.float32)
    out.flags.writeable = False
    return out


def _betas(config: ScheduleConfig) -> Float[np.ndarray, " t"]:
    """Returns the share of variance that each step replaces by noise, float32 [train_steps]."""
    n = config.train_steps
    if config.beta_schedule == "squaredcos_cap_v2":
        angle = (np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2
        left = np.cos(angle) ** 2
        return np.minimum(1 - left[1:] / left[:-1], 0.999).astype(np.float32)
    if config.beta_schedule == "linear":
        return _ramp(config.beta_start, config.beta_end, n)
    return _ramp(config.beta_start**0.5, config.beta_end**0.5, n) ** 2


def _ramp(first: float, last: float, n: int) -> Float[np.ndarray, " t"]:
    """Returns n equally spaced float32 numbers, rounded as torch.linspace rounds: each half from its own end."""
    start, end, i = np.float32(first), np.float32(last), np.arange(n, dtype=np.float32)
    step = (end - start) / np.float32(n - 1)
    return np.where(i < n // 2, start + step * i, end - step * (n - 1 - i))


def _shares(
    config: ScheduleConfig, timesteps: Int[Array, " b"], like: Float[Array, "b ..."]
) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """Returns the amplitudes (of the image, of the noise) per example, float32, shaped to multiply `like`."""
    left = jnp.asarray(alphas_cumprod(config))[timesteps].reshape(-1, *[1] * (like.ndim - 1))
    return jnp.sqrt(left), jnp.sqrt(1 - left)


def add_noise(
    config: ScheduleConfig, clean: Float[Array, "b ..."], noise: Float[Array, "b ..."], timesteps: Int[Array, " b"]
) -> Float[Array, "b ..."]:
    """Returns the noisy image of each timestep in [0, train_steps), float32 (Ho et al. 2020, eq. 4).

    `noise` is standard normal, of the shape of `clean`.
    """
    signal, rest = _shares(config, timesteps, clean)
    return signal * clean + rest * noise


def velocity(
    config: ScheduleConfig, clean: Float[Array, "b ..."], noise: Float[Array, "b ..."], timesteps: Int[Array, " b"]
) -> Float[Array, "b ..."]:
    """Returns sqrt(alpha-bar) noise - sqrt(1 - alpha-bar) clean, float32 (Salimans & Ho 2022, appendix D)."""
    signal, rest = _shares(config, timesteps, clean)
    return signal * noise - rest * clean


def training_target(
    config: ScheduleConfig, clean: Float[Array, "b ..."], noise: Float[Array, "b ..."], timesteps: Int[Array, " b"]
) -> Float[Array, "b ..."]:
    """Returns what the network should predict from the noisy image, by `config.prediction`."""
    if config.prediction == "epsilon":
        return noise
    return velocity(config, clean, noise, timesteps) if config.prediction == "v_prediction" else clean


def estimates(prediction: str, signal: Any, rest: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Returns ((i, j), (k, l)): clean = i noisy + j prediction and noise = k noisy + l prediction.

    `signal` and `rest` are the amplitudes sqrt(alpha-bar) and sqrt(1 - alpha-bar), numbers or arrays.
    """
    if prediction == "epsilon":
        return (1 / signal, -rest / signal), (0.0, 1.0)
    if prediction == "v_prediction":
        return (signal, -rest), (rest, signal)
    return (0.0, 1.0), (1 / rest, -signal / rest)
