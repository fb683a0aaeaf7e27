"""Styles: the same street as a painting, a drawing, a bad photo. Each works on a finished picture in [0, 1]."""

from collections.abc import Callable
from functools import reduce

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fmda.world.names import STYLES
from fmda.world.noise import fractal, lattice, pixel_noise, value_noise

_GREY = (0.30, 0.59, 0.11)


def _grids(image: Array) -> tuple[Array, Array]:
    height, width, _ = image.shape
    rows = jnp.broadcast_to(jnp.arange(height, dtype=jnp.float32)[:, None], (height, width))
    return rows, jnp.broadcast_to(jnp.arange(width, dtype=jnp.float32)[None], (height, width))


def _grey(image: Array) -> Array:
    return (image * jnp.asarray([[_GREY]])).sum(-1, keepdims=True)


def _shifted(image: Array, rows: int, columns: int) -> Array:
    return jnp.roll(image, (rows, columns), (0, 1))


def _smooth(image: Array, times: int) -> Array:
    for _ in range(times):
        image = 0.25 * (_shifted(image, 1, 0) + _shifted(image, -1, 0) + _shifted(image, 0, 1) + _shifted(image, 0, -1))
    return image


def _edges(image: Array, labels: Array) -> Array:
    """Returns how strongly outlines and tone edges pass through each pixel, [H, W] in [0, 1]."""
    grey = _grey(image)[..., 0]
    tone = jnp.abs(grey - _shifted(grey, 0, 1)) + jnp.abs(grey - _shifted(grey, 1, 0))
    outline = (labels != _shifted(labels, 0, 1)) | (labels != _shifted(labels, 1, 0))
    return jnp.clip(jnp.clip(tone * 2.2 - 0.12, 0.0, 1.0) + 0.8 * outline, 0.0, 1.0)


def _kuwahara(image: Array, reach: int) -> Array:
    """Returns the mean of the calmest of four quadrants: oil paint."""
    best, least = image, jnp.full(image.shape[:2], jnp.inf)
    for dy in (-reach, reach):
        for dx in (-reach, reach):
            near = [_shifted(image, dy * k // 2, dx * m // 2) for k in (0, 1, 2) for m in (0, 1, 2)]
            mean = reduce(jnp.add, near) / 9.0
            spread = (reduce(jnp.add, [n * n for n in near]) / 9.0 - mean * mean).sum(-1)
            calmer = spread < least
            best, least = jnp.where(calmer[..., None], mean, best), jnp.minimum(spread, least)
    return best


def _painting(image: Array, labels: Array, depth: Array, seed: Array) -> Array:
    rows, columns = _grids(image)
    stroke = value_noise(rows * 0.5 + columns * 0.2, columns * 0.15 - rows * 0.1, seed) - 0.5
    image = _kuwahara(_kuwahara(image, 2), 2)
    grey = _grey(image)
    image = grey + (image - grey) * 1.35
    return image * (1.0 + 0.22 * stroke[..., None])


def _watercolor(image: Array, labels: Array, depth: Array, seed: Array) -> Array:
    rows, columns = _grids(image)
    wash = fractal(rows * 0.04, columns * 0.04, seed, 3)[..., None]
    paper = (value_noise(rows * 0.9, columns * 0.9, seed + 1) - 0.5)[..., None]
    soft = _kuwahara(_smooth(image, 2), 2)
    soft = 1.0 - (1.0 - soft) * (0.55 + 0.5 * wash)
    return soft + 0.04 * paper - 0.12 * _edges(soft, labels)[..., None]


def _drawing(image: Array, labels: Array, depth: Array, seed: Array) -> Array:
    rows, columns = _grids(image)
    hatch = value_noise((rows + columns) * 0.7, (rows - columns) * 0.06, seed)[..., None]
    flat = _kuwahara(image, 2)
    crayon = 0.93 - (0.93 - flat) * (0.45 + 0.5 * hatch)
    return crayon * (1.0 - 0.8 * _edges(image, labels)[..., None])


def _sketch(image: Array, labels: Array, depth: Array, seed: Array) -> Array:
    rows, columns = _grids(image)
    grey = _grey(_smooth(image, 1))[..., 0]
    hatch = value_noise((rows + columns) * 0.55, (rows - columns) * 0.05, seed)
    cross = value_noise((rows - columns) * 0.55, (rows + columns) * 0.05, seed + 1)
    pencil = (
        0.95 - 0.4 * jnp.clip(0.65 - grey, 0.0, 1.0) * 2.0 * hatch - 0.5 * jnp.clip(0.35 - grey, 0.0, 1.0) * 2.0 * cross
    )
    return jnp.repeat((pencil * (1.0 - 0.75 * _edges(image, labels)))[..., None], 3, -1)


def _cartoon(image: Array, labels: Array, depth: Array, seed: Array) -> Array:
    flat = _kuwahara(_smooth(image, 1), 2)
    grey = _grey(flat)
    flat = grey + (flat - grey) * 1.6
    flat = (jnp.floor(jnp.clip(flat, 0.0, 1.0) * 5.0) + 0.5) / 5.0
    outline = (labels != _shifted(labels, 0, 1)) | (labels != _shifted(labels, 1, 0))
    return flat * (1.0 - 0.85 * outline[..., None])


def _black_and_white(image: Array, labels: Array, depth: Array, seed: Array) -> Array:
    return jnp.repeat(jnp.clip(0.5 + (_grey(image) - 0.5) * (1.0 + 0.4 * lattice(seed, 1)), 0.0, 1.0), 3, -1)


def _sepia(image: Array, labels: Array, depth: Array, seed: Array) -> Array:
    rows, columns = _grids(image)
    grain = 0.05 * pixel_noise(rows, columns, seed)[..., None]
    return (_grey(image) + grain) * jnp.asarray([[[1.05, 0.88, 0.66]]]) * 0.92 + 0.05


def _coarse(image: Array, block: int, smooth: bool) -> Array:
    height, width, _ = image.shape
    rows, columns = -(-height // block), -(-width // block)
    padded = jnp.pad(image, ((0, rows * block - height), (0, columns * block - width), (0, 0)), mode="edge")
    small = padded.reshape(rows, block, columns, block, 3).mean((1, 3))
    if smooth:
        return jax.image.resize(small, padded.shape, "linear", antialias=False)[:height, :width]
    return jnp.repeat(jnp.repeat(small, block, 0), block, 1)[:height, :width]


def _low_resolution(image: Array, labels: Array, depth: Array, seed: Array) -> Array:
    return _coarse(image, max(image.shape[0] * 3 // 128, 2), smooth=True)


def _pixelated(image: Array, labels: Array, depth: Array, seed: Array) -> Array:
    return _coarse(image, max(image.shape[0] * 4 // 128, 2), smooth=False)


def _blurry(image: Array, labels: Array, depth: Array, seed: Array) -> Array:
    return _smooth(image, max(image.shape[0] * 4 // 128, 1) + 2)


def _jpeg(image: Array, labels: Array, depth: Array, seed: Array) -> Array:
    """Keeps the mean and a coarse gradient of each 8x8 block."""
    block = _coarse(image, 8, smooth=False)
    rest = image - block
    kept = jnp.round(rest * 8.0) / 8.0
    rows, columns = _grids(image)
    ring = (lattice(jnp.floor(rows / 8), jnp.floor(columns / 8), seed) < 0.25)[..., None]
    wave = 0.06 * jnp.cos(columns * 2.2)[..., None] * ring
    return jnp.round(block * 26.0) / 26.0 + kept + wave * jnp.abs(rest) * 8.0


def _bad(image: Array, labels: Array, depth: Array, seed: Array) -> Array:
    rows, columns = _grids(image)
    noise = jnp.stack([pixel_noise(rows, columns, seed + 5 * k) for k in range(3)], -1)
    smear = (image + _shifted(image, 0, 1) + _shifted(image, 0, 2) + _shifted(image, 1, 3)) / 4.0
    return 0.5 + (smear - 0.5) * 0.7 + 0.09 * noise + 0.1 * (lattice(seed, 2) - 0.5)


def _dark(image: Array, labels: Array, depth: Array, seed: Array) -> Array:
    return jnp.clip(image, 0.0, 1.0) ** 1.5 * (0.3 + 0.25 * lattice(seed, 3))


def _bright(image: Array, labels: Array, depth: Array, seed: Array) -> Array:
    return 1.0 - (1.0 - jnp.clip(image, 0.0, 1.0)) ** (1.7 + 0.8 * lattice(seed, 3))


def _clay(image: Array, labels: Array, depth: Array, seed: Array) -> Array:
    """Takes the colour away and keeps the light: a model of clay or stone."""
    light = _grey(_smooth(image, 1))
    stone = jnp.stack([0.80 + 0.2 * lattice(seed, 1), jnp.float32(0.82), 0.66 + 0.3 * lattice(seed, 2)])[None, None]
    return jnp.clip(0.18 + 0.8 * light**0.8, 0.0, 1.0) * stone


def _toy(image: Array, labels: Array, depth: Array, seed: Array) -> Array:
    flat = _kuwahara(_smooth(image, 1), 2)
    grey = _grey(flat)
    color = jnp.clip(grey + (flat - grey) * 2.2, 0.0, 1.0)
    shine = jnp.clip((grey - 0.6) * 2.5, 0.0, 1.0) ** 2
    return color * 0.92 + 0.06 + 0.3 * shine


def _embroidery(image: Array, labels: Array, depth: Array, seed: Array) -> Array:
    rows, columns = _grids(image)
    turn = jnp.where(labels % 2 == 0, 1.0, -1.0)
    thread = 0.5 + 0.5 * jnp.cos((rows + turn * columns) * 2.1)
    flat = _kuwahara(_smooth(image, 1), 2)
    flat = (jnp.floor(flat * 7.0) + 0.5) / 7.0
    return flat * (0.72 + 0.36 * thread[..., None])


def _negative(image: Array, labels: Array, depth: Array, seed: Array) -> Array:
    return 1.0 - image


def _kept(image: Array, labels: Array, depth: Array, seed: Array) -> Array:
    return image


_MAKERS: dict[str, Callable[[Array, Array, Array, Array], Array]] = {
    "photo": _kept,
    "video game": _kept,
    "painting": _painting,
    "watercolor": _watercolor,
    "drawing": _drawing,
    "sketch": _sketch,
    "cartoon": _cartoon,
    "black and white photo": _black_and_white,
    "sepia photo": _sepia,
    "low resolution photo": _low_resolution,
    "pixelated photo": _pixelated,
    "blurry photo": _blurry,
    "jpeg corrupted photo": _jpeg,
    "bad photo": _bad,
    "dark photo": _dark,
    "bright photo": _bright,
    "clay": _clay,
    "plastic toy": _toy,
    "embroidery": _embroidery,
    "negative": _negative,
}


def apply_style(
    style: Int[Array, ""], image: Float[Array, "h w 3"], labels: Array, depth: Array, seed: Array
) -> Float[Array, "h w 3"]:
    """Returns the picture in the style (index into `STYLES`)."""
    makers = [_MAKERS[name] for name in STYLES]
    return jax.lax.switch(style, makers, image, labels, depth, seed)
