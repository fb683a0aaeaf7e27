"""From noise to an image: DDIM, PLMS, Euler and DPM-Solver++ (2M) as one scan over a table of numbers.

Every sampler here is a linear multistep method. With the noisy image x and the network's prediction p, a step
remembers one quantity, r = a x + b p, and goes to x' = c x + d p + sum of weights x (r, and those of the steps
before). The numbers depend on the schedule alone, so they are computed beforehand, on the host, in float64.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from fmda.diffusion.schedule import SAMPLERS, ScheduleConfig, alphas_cumprod, estimates
from fmda.errors import UserError, did_you_mean

__all__ = ["SAMPLERS", "Denoise", "make_table", "sample", "timesteps"]

Denoise = Callable[[Float[Array, "b h w c"], Float[Array, ""]], Float[Array, "b h w c"]]
"""(latents of unit variance, timestep as a float32 scalar) -> the network's prediction."""

# Weights of the newest predictions, newest first: Adams-Bashforth of order 1 to 4.
_ADAMS = np.array([[1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23, -16, 5, 0], [55, -59, 37, -9]]) / [[1], [1], [12], [24]]


class Table(NamedTuple):
    """The numbers of a sampler, float64, one row a call of the network."""

    timesteps: Float[np.ndarray, " n"]
    noisy: Float[np.ndarray, " n"]
    """c: share of x in x'."""
    prediction: Float[np.ndarray, " n"]
    """d: share of p in x'."""
    memory: Float[np.ndarray, "n 2"]
    """a, b: what is remembered, of x and of p."""
    weights: Float[np.ndarray, "n k"]
    """Shares in x' of what is remembered, newest first."""
    keep: Float[np.ndarray, " n"]
    """1 where later steps remember this one, else 0."""
    start: float = 1.0
    """Size of the first x as a multiple of the standard normal start."""


def sample(
    denoise: Denoise, start: Float[Array, "b h w c"], config: ScheduleConfig, *, sampler: str, steps: int
) -> Float[Array, "b h w c"]:
    """Returns the latents that `steps` steps make of noise, float32, unscaled by anything of the VAE.

    Pure, and to be called under jit: the whole is one scan, with `denoise` traced once.

    Args:
        denoise: (latents [b, h, w, c], timestep) -> prediction of the kind that `config.prediction` names. The
            timestep is a float32 scalar, fractional for euler with "linspace" spacing; the latents have unit variance
            in every sampler, so euler's division by sqrt(sigma^2 + 1) is already done. See `guidance.guided`.
        start: standard normal noise.
        config: the schedule that the network was trained with.
        sampler: "ddim" (eta 0; Song et al. 2021), "plms" (Liu et al. 2022 without Runge-Kutta steps: steps + 1
            calls), "euler" (Karras et al. 2022, algorithm 2 without churn) or "dpm++2m" (Lu et al. 2022, midpoint).
        steps: calls of the network, one more for plms; from 1 to `config.train_steps`, for some spacings one less.

    Raises:
        UserError: the sampler does not exist, or the schedule has no such steps.
    """
    table = make_table(config, sampler, steps)
    deep = (table.weights.shape[1], *[1] * start.ndim)

    def step(carry: tuple[Array, Array], row: tuple[Array, ...]) -> tuple[tuple[Array, Array], None]:
        x, past = carry
        time, of_noisy, of_prediction, memory, weights, keep = row
        prediction = denoise(x, time).astype(jnp.float32)
        remembered = memory[0] * x + memory[1] * prediction
        if config.clip is not None and sampler == "ddim":
            remembered = jnp.clip(remembered, -config.clip, config.clip)
        recent = jnp.concatenate([remembered[None], past])
        x = of_noisy * x + of_prediction * prediction + jnp.sum(weights.reshape(deep) * recent, axis=0)
        return (x, jnp.where(keep > 0, recent[:-1], past)), None

    rows = tuple(jnp.asarray(column, jnp.float32) for column in table[:-1])
    x = start.astype(jnp.float32) * np.float32(table.start)
    past = jnp.zeros((deep[0] - 1, *start.shape), jnp.float32)
    (x, _), _ = jax.lax.scan(step, (x, past), rows)
    return x


def timesteps(config: ScheduleConfig, sampler: str, steps: int) -> Num[np.ndarray, " n"]:
    """Returns the timestep of each call of the network, falling, as diffusers gives them.

    int32, or float32 for euler, where "linspace" is not rounded; plms has steps + 1, the second of them twice.
    Raises UserError where the sampler does not exist or the schedule has no such steps.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"sampler: '{sampler}' does not exist{did_you_mean(str(sampler), SAMPLERS)}")
    if config.unsupported and sampler == config.sampler:
        options = ", ".join(f"{key}={value}" for key, value in config.unsupported)
        others = ", ".join(name for name in SAMPLERS if name != sampler)
        raise UserError(
            f"sampler: the checkpoint's scheduler_config.json has {options}, which {sampler} does not support here; "
            f"choose {others}, or remove the line"
        )
    n, spacing = config.train_steps, config.spacing or ("leading" if sampler in ("ddim", "plms") else "linspace")
    # dpm++2m leaves out the last point of a grid with one more
    points = steps + (sampler == "dpm++2m")
    if not 1 <= steps <= n:
        raise UserError(f"steps: {steps} do not fit into {n} timesteps; take from 1 to {n}")
    grid: np.ndarray
    if spacing == "linspace":
        grid = np.linspace(0, n - 1, points)[::-1]
        grid = grid if sampler == "euler" else grid.round()
    elif spacing == "leading":
        grid = (np.arange(points) * (n // points) + config.steps_offset)[::-1]
    else:
        # rounding may add a point, at -1, which the cut below takes away
        grid = np.arange(n, 0, -n / steps).round() - 1
    grid = grid[:steps]
    if grid[0] >= n or np.any(np.diff(grid) >= 0):
        raise UserError(f"steps: {steps} with '{spacing}' spacing do not fit into {n} timesteps; take fewer")
    if sampler == "plms" and steps > 1:
        grid = np.insert(grid, 1, grid[1])
    return grid.astype(np.float32 if sampler == "euler" else np.int32)


def make_table(config: ScheduleConfig, sampler: str, steps: int) -> Table:
    """Returns the numbers of a sampler. Raises UserError like `timesteps`, and where a number is not finite."""
    times = timesteps(config, sampler, steps)
    make = {"ddim": _ddim, "plms": _plms, "euler": _euler, "dpm++2m": _dpm}[sampler]
    with np.errstate(divide="ignore", invalid="ignore"):
        table = make(config, times, config.train_steps // steps)
    if not all(np.isfinite(column).all() for column in table):
        raise UserError(
            f"{sampler}: '{config.prediction}' prediction is undefined at timestep {times[0]:g}, where the signal is "
            "zero; take euler or dpm++2m, or 'leading' spacing"
        )
    return table


class _Level(NamedTuple):
    """Noise levels: amplitudes of the image and of the noise."""

    signal: np.ndarray
    rest: np.ndarray


def _at(config: ScheduleConfig, times: np.ndarray, to_one: bool = False) -> _Level:
    """Returns the levels of timesteps; below 0 lies the image itself (`to_one`), or the level of timestep 0."""
    left = alphas_cumprod(config).astype(np.float64)
    left = np.where(times < 0, 1.0 if to_one else left[0], left[np.maximum(times, 0)])
    return _Level(np.sqrt(left), np.sqrt(1 - left))


def _transfer(config: ScheduleConfig, source: _Level, target: _Level) -> tuple[np.ndarray, np.ndarray]:
    """Returns (c, d): c x + d p mixes the estimates of image and noise, made at one level, as at another."""
    (i, j), (k, m) = estimates(config.prediction, *source)
    return target.signal * i + target.rest * k, target.signal * j + target.rest * m


def _columns(pair: tuple[Any, Any], n: int) -> np.ndarray:
    """Returns two numbers or vectors as the columns of [n, 2]."""
    return np.stack([np.broadcast_to(x, n) for x in pair], axis=1)


def _ddim(config: ScheduleConfig, times: np.ndarray, stride: int) -> Table:
    """Song et al. 2021, eq. 12 with sigma 0. Remembers the clean estimate, which may be clipped."""
    to_one = config.set_alpha_to_one is not False
    source, target = _at(config, times), _at(config, times - stride, to_one)
    clean, noise = estimates(config.prediction, *source)
    along = target.rest[:, None] * _columns(noise, len(times))
    memory = _columns(clean, len(times))
    return Table(times, along[:, 0], along[:, 1], memory, target.signal[:, None], np.ones(len(times)))


def _plms(config: ScheduleConfig, times: np.ndarray, stride: int) -> Table:
    """Liu et al. 2022, eq. 11 and 12, begun with a step that is taken twice. Remembers predictions.

    The second call stands where the first step led, and its average with the first prediction steps once more from
    the start. With x and p of the first step, the start is (x' - d p) / c: the second row holds that undoing, so that
    no start need be kept. The second prediction is then dropped.
    """
    n = len(times)
    order = np.minimum(np.maximum(np.arange(n) - 1, 0), 3)
    weights, keep = _ADAMS[order], np.ones(n)
    source, target = times.copy(), times - stride
    if n > 1:
        source[1], target[1] = times[1] + stride, times[1]
        weights[1], keep[1] = (0.5, 0.5, 0, 0), 0
    c, d = _transfer(config, _at(config, source), _at(config, target, config.set_alpha_to_one is True))
    weights = weights * d[:, None]
    if n > 1:
        c[1] /= c[0]
        weights[1, 1] -= c[1] * d[0]
    return Table(times, c, np.zeros(n), _columns((0.0, 1.0), n), weights, keep)


def _sigmas(config: ScheduleConfig, times: np.ndarray) -> np.ndarray:
    """Returns noise over image at the timesteps, interpolated between whole ones, and at the end; [n + 1]."""
    left = alphas_cumprod(config).astype(np.float64)
    if config.zero_terminal_snr:
        left[-1] = 2.0**-24  # as in diffusers: a sigma of 4096 where it would be infinite
    table = np.sqrt((1 - left) / left)
    return np.append(np.interp(times, np.arange(len(table)), table), 0.0 if config.final_sigma == "zero" else table[0])


def _euler(config: ScheduleConfig, times: np.ndarray, stride: int) -> Table:
    """Karras et al. 2022. On latents of unit variance the step is that of ddim; the result is scaled as theirs."""
    sigmas = _sigmas(config, times)
    size = np.hypot(1, sigmas)
    size[-1] = 1
    levels = _Level(1 / size, sigmas / size)
    c, d = _transfer(config, _Level(*(x[:-1] for x in levels)), _Level(*(x[1:] for x in levels)))
    n = len(times)
    start = 1.0 if config.spacing == "leading" else levels.rest[0]
    return Table(times, c, np.zeros(n), _columns((0.0, 1.0), n), d[:, None], np.ones(n), float(start))


def _dpm(config: ScheduleConfig, times: np.ndarray, stride: int) -> Table:
    """Lu et al. 2022 (DPM-Solver++), algorithm 2 with the midpoint rule. Remembers clean estimates.

    The first step is of first order, and so is the last if it ends without noise, is one of fewer than 15, or where
    `euler_at_final` asks for it.
    """
    sigmas, n = _sigmas(config, times), len(times)
    signal = 1 / np.hypot(1, sigmas)
    levels = _Level(signal, sigmas * signal)
    clean, _ = estimates(config.prediction, levels.signal[:-1], levels.rest[:-1])
    towards = signal[1:] * (1 - sigmas[1:] / sigmas[:-1])
    size = np.log(sigmas[:-1]) - np.log(sigmas[1:])  # steps of the logarithm of image over noise
    ahead = np.zeros(n)
    ahead[1:] = size[1:] / size[:-1] / 2
    if n < 15 or sigmas[-1] == 0 or config.euler_at_final:
        ahead[-1] = 0
    weights = np.stack([towards * (1 + ahead), -towards * ahead], 1)
    return Table(times, levels.rest[1:] / levels.rest[:-1], np.zeros(n), _columns(clean, n), weights, np.ones(n))
