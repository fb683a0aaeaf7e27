"""The camera after the lens: weather before the lens, glow, exposure, tone, colour, noise, and the styles."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8

from fmda.world.noise import lattice, pixel_noise, value_noise
from fmda.world.scene import Scene
from fmda.world.shading import Rgb, ramp
from fmda.world.styles import apply_style


def blurred(image: Array, radius: Array | float) -> Array:
    """Returns the image [H, W, C] under a 3x3 binomial blend of the given strength, 0 none to 1 full."""
    for axis in (0, 1):
        before, after = jnp.roll(image, 1, axis), jnp.roll(image, -1, axis)
        edge = [slice(None)] * image.ndim
        edge[axis] = slice(0, 1)
        before = before.at[tuple(edge)].set(image[tuple(edge)])
        edge[axis] = slice(-1, None)
        after = after.at[tuple(edge)].set(image[tuple(edge)])
        image = image + radius * 0.25 * (before - 2.0 * image + after)
    return image


def glow(image: Array, strength: Array) -> Array:
    """Returns the image [H, W, 3] with light spread around whatever is brighter than 1."""
    height, width, _ = image.shape
    block = max(height // 32, 1)
    rows, columns = height // block, width // block
    bright = jnp.maximum(image - 0.9, 0.0)[: rows * block, : columns * block]
    small = jnp.minimum(bright, 4.0).reshape(rows, block, columns, block, 3).mean((1, 3))
    wide = small
    for _ in range(3):
        wide = blurred(wide, 1.0)
    spread = 0.6 * blurred(small, 1.0) + 0.4 * wide
    return image + strength * jax.image.resize(spread, image.shape, "linear", antialias=False)


def fallen(color: Array, scene: Scene, depth: Array) -> Array:
    """Returns the image [H, W, 3] with rain streaks and snow flakes in the air."""
    look = scene.look
    height, width, _ = color.shape
    seed = scene.seed.astype(jnp.int32)
    scale = 128.0 / height
    v = jnp.broadcast_to(jnp.arange(height, dtype=jnp.float32)[:, None] * scale, (height, width))
    u = jnp.broadcast_to(jnp.arange(width, dtype=jnp.float32)[None] * scale, (height, width))
    slant = 0.25 * (scene.seed / 15000.0 - 1.0)
    streaks = jnp.zeros((height, width))
    flakes = jnp.zeros((height, width))
    for layer in range(2):
        fine = 1.0 + 0.8 * layer
        s = (u + slant * v) * (0.55 * fine)
        column = jnp.floor(s)
        drop = value_noise(column * 7.7, v * 0.055 * fine + lattice(column, layer, seed) * 90.0, seed + layer)
        streaks += ramp(drop, 0.74, 0.95) * ramp(jnp.abs(s - column - 0.5), 0.5, 0.1)
        cell = (7.0 - 2.5 * layer) * (1.0 + 0.0 * scale)
        i, j = jnp.floor(v / cell), jnp.floor(u / cell)
        a, b = lattice(i, j, seed + 20 + layer), lattice(i, j, seed + 40 + layer)
        size = (0.06 + 0.12 * lattice(i, j, seed + 60 + layer)) * (1.0 - 0.25 * layer)
        away = jnp.hypot(v / cell - i - 0.2 - 0.6 * a, u / cell - j - 0.2 - 0.6 * b)
        there = lattice(i, j, seed + 80 + layer) < 0.75 * look.snowfall
        flakes += ramp(away, size + 0.1, size) * there
    light = jnp.minimum(look.sky, 1.1) * 0.8
    color = color + (0.16 * look.rainfall * light * streaks)[..., None]
    alpha = (0.75 * jnp.clip(flakes, 0.0, 1.0) * ramp(depth, 2.0, 8.0))[..., None]
    return color + (0.95 * light - color) * alpha


def wet_road(color: Array, labels: Array, horizon: Array, wet: Array, seed: Array) -> Array:
    """Returns the image with the scene above the horizon mirrored in the wet ground below it."""
    height, width, _ = color.shape
    row = jnp.arange(height, dtype=jnp.float32)
    ripple = (lattice(jnp.arange(height), 1, seed) - 0.5) * 2.0
    source = jnp.clip(2.0 * horizon - row - 3.0 + ripple, 0.0, height - 1.0).astype(jnp.int32)
    mirrored = blurred(color, 1.0)[source]
    ground = ((labels == 0) | (labels == 1)) & (row[:, None] > horizon)
    strength = wet * 0.42 * ramp(row, horizon + 0.5 * height, horizon + 4.0)[:, None]
    return jnp.where(ground[..., None], color + (mirrored - color) * strength[..., None], color)


def develop(
    color: Rgb, labels: Array, depth: Array, horizon: Array, scene: Scene, reduce: int
) -> UInt8[Array, "h w 3"]:
    """Returns the finished picture, averaged over blocks of `reduce` pixels, from linear light."""
    look = scene.look
    seed = scene.seed.astype(jnp.int32)
    image = color.stack()
    image = jax.lax.cond(look.wet > 0.05, lambda i: wet_road(i, labels, horizon, look.wet, seed), lambda i: i, image)
    if reduce > 1:
        height, width, _ = image.shape
        image = image.reshape(height // reduce, reduce, width // reduce, reduce, 3).mean((1, 3))
        middle = slice(reduce // 2, None, reduce)
        labels, depth = labels[middle, middle], depth[middle, middle]
    height, width, _ = image.shape
    image = jax.lax.cond(look.rainfall + look.snowfall > 0.0, lambda i: fallen(i, scene, depth), lambda i: i, image)
    image = glow(image, look.bloom)
    image = blurred(image, jnp.clip(look.blur * (height / 128.0) ** 0.5, 0.0, 1.0))
    v = jnp.linspace(-1.0, 1.0, height)[:, None]
    u = jnp.linspace(-1.0, 1.0, width)[None]
    fall = 1.0 - look.vignette * 0.35 * (u * u + v * v)
    balance = jnp.stack([look.warm, look.green, 2.0 - look.warm])[None, None]
    image = image * (0.62 * look.exposure * fall)[..., None] * balance
    image = tone(image)
    grey = (image * jnp.asarray([[[0.30, 0.59, 0.11]]])).sum(-1, keepdims=True)
    image = grey + (image - grey) * look.saturation
    image = 0.45 + (image - 0.45) * look.contrast
    rows = jnp.broadcast_to(jnp.arange(height)[:, None], (height, width))
    columns = jnp.broadcast_to(jnp.arange(width)[None], (height, width))
    grain = jnp.stack([pixel_noise(rows, columns, seed + 300 + 3 * k) for k in range(3)], -1)
    luma = pixel_noise(rows, columns, seed + 400)[..., None]
    image = image + look.noise * (0.6 * luma + 0.6 * grain)
    image = jnp.clip(image, 0.0, 1.0)
    image = apply_style(scene.setting.style, image, labels, depth, seed)
    return (jnp.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(jnp.uint8)


def tone(light: Array) -> Array:
    """Returns display values in [0, 1] of linear light: a filmic curve with toe and shoulder, and the usual gamma.

    The rational curve is Narkowicz's fit of the ACES film curve.
    """
    light = jnp.maximum(light, 0.0)
    curve = light * (2.51 * light + 0.03) / (light * (2.43 * light + 0.59) + 0.14)
    return jnp.minimum(curve, 1.0) ** (1.0 / 2.2)
