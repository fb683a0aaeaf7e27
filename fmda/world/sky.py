"""The sky: gradient, clouds, the sun's glow, and the far skyline of trees or houses."""

import jax.numpy as jnp
from jaxtyping import Array

from fmda.world.looks import Look
from fmda.world.noise import fractal, lattice, value_noise
from fmda.world.shading import Rgb, ramp, rgb


def sky_gradient(up: Array, toward_sun: Array, look: Look, night: Array) -> Rgb:
    """Returns the cloudless light of the sky in directions of height `up` (sine) and cosine `toward_sun`."""
    height = jnp.clip(up, 0.0, 1.0)
    fade = (1.0 - height) ** 3
    grey = ramp(look.clouds, 0.5, 0.9)
    warm = look.warmth * (1.0 - 0.7 * grey)
    low = 1.0 - ramp(look.elevation, 5.0, 30.0)
    zenith = rgb(0.16, 0.33, 0.68).mix(rgb(0.58, 0.60, 0.63), jnp.maximum(grey, 0.8 * (1.0 - look.blue)))
    horizon = rgb(0.72, 0.80, 0.88).mix(rgb(0.80, 0.80, 0.80), grey)
    horizon = horizon.mix(rgb(1.15, 0.62, 0.32), 0.75 * warm * low * ramp(toward_sun, -0.6, 0.9))
    zenith = zenith.mix(rgb(0.25, 0.25, 0.48), 0.6 * warm * low)
    zenith = zenith.mix(rgb(0.25, 0.30, 0.55), night)
    horizon = horizon.mix(rgb(0.95, 0.62, 0.38), night)
    sky = zenith.mix(horizon, fade)
    glow = look.sun * (1.0 - grey) * jnp.maximum(toward_sun, 0.0) ** 24 * 0.9
    return sky.times(look.sky).plus(rgb(1.0, 0.9 - 0.3 * look.warmth, 0.75 - 0.5 * look.warmth).times(glow))


def sky_color(x: Array, y: Array, z: Array, toward_sun: Array, look: Look, night: Array, seed: Array) -> Rgb:
    """Returns the light of the sky in unit directions (x, y, z), with clouds."""
    base = sky_gradient(y, toward_sun, look, night)
    lift = 1.0 / (jnp.maximum(y, 0.0) + 0.12)
    u, v = x * lift * 1.3, z * lift * 1.3
    puff = fractal(u, v, seed, 3)
    cover = ramp(puff, 0.78 - 0.5 * look.clouds, 0.95 - 0.42 * look.clouds) * ramp(look.clouds, 0.0, 0.25)
    shade = 0.7 + 0.4 * value_noise(1.7 * u + 3.0, 1.7 * v, seed + 7)
    low = 1.0 - ramp(look.elevation, 5.0, 25.0)
    tint = rgb(0.86, 0.87, 0.90).mix(rgb(0.95, 0.62, 0.50), 0.5 * look.warmth * low)
    tint = tint.mix(rgb(0.40, 0.33, 0.30), night)
    return base.mix(tint.times(look.sky * shade), cover * 0.85)


def skyline(azimuth: Array, town: Array, seed: Array) -> tuple[Array, Array]:
    """Returns the height (tangent) of the far skyline at an azimuth in radians, and whether it is houses there."""
    grove = 0.02 + 0.06 * fractal(azimuth * 9.0, jnp.zeros_like(azimuth), seed, 3)
    block = jnp.floor(azimuth * 26.0)
    flat = lattice(block, jnp.zeros_like(block), seed + 3)
    houses = jnp.where(town, flat > 0.3, flat > 0.93)
    return jnp.where(houses, 0.03 + 0.08 * lattice(block, jnp.ones_like(block), seed), grove), houses
