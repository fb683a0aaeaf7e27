"""Jitter against colorsys, blur against SciPy, probabilities by counting."""

import colorsys
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import correlate1d

from fmda.augment.photometric import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    colour_jitter,
    gaussian_blur,
    jittered,
    kernel_size,
    strong_augmentation,
)


def photographs(count: int = 2, height: int = 6, width: int = 5) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    images[0, 0, :5] = [[0, 0, 0], [255, 255, 255], [90, 90, 90], [200, 200, 10], [0, 30, 30]]
    return images


def by_colorsys(image: np.ndarray, order, amounts) -> np.ndarray:
    """Renders the definition pixel by pixel in float64."""
    out = np.empty(image.shape)
    for place in np.ndindex(image.shape[:2]):
        rgb = image[place] / 255
        for change in order:
            if change == BRIGHTNESS:
                rgb = np.clip(rgb + amounts[BRIGHTNESS], 0, 1)
            elif change == CONTRAST:
                rgb = np.clip(rgb * (1 + amounts[CONTRAST]), 0, 1)
            else:
                h, s, v = colorsys.rgb_to_hsv(*rgb)
                if change == SATURATION:
                    s = min(1, max(0, s * (1 + amounts[SATURATION])))
                else:
                    h = (h + amounts[HUE]) % 1
                rgb = np.array(colorsys.hsv_to_rgb(h, s, v))
        out[place] = 255 * rgb
    return out


def test_jitter_by_definition_in_every_order():
    orders = np.array(list(itertools.permutations(range(4))))
    images = np.concatenate([photographs()] * 12)
    amounts = np.random.default_rng(1).uniform(-0.2, 0.2, (24, 4)).astype(np.float32)
    found = jittered(jnp.asarray(images), jnp.asarray(orders), jnp.asarray(amounts))
    expected = [by_colorsys(*row) for row in zip(images, orders, amounts, strict=True)]
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize(
    ("change", "amount", "expected"),
    [
        (BRIGHTNESS, 0.2, [151, 255, 51]),
        (CONTRAST, -0.2, [80, 200, 0]),
        (SATURATION, -0.2, [130, 250, 50]),
        (HUE, 1 / 3, [0, 100, 250]),
        (HUE, -1 / 6, [250, 150, 0]),
    ],
)
def test_one_change_by_hand(change, amount, expected):
    amounts = jnp.zeros((1, 4)).at[0, change].set(amount)
    pixel = jnp.array([100, 250, 0], jnp.uint8).reshape(1, 1, 1, 3)
    found = jittered(pixel, jnp.arange(4)[None], amounts)
    np.testing.assert_allclose(found.ravel(), expected, atol=1e-3)


def test_amounts_and_orders_differ_between_images():
    same = jnp.asarray(np.repeat(photographs(1), 8, axis=0))
    found = np.asarray(jax.jit(colour_jitter)(jax.random.key(0), same))
    assert len(np.unique(found.reshape(8, -1), axis=0)) == 8
    np.testing.assert_array_equal(colour_jitter(jax.random.key(0), same, 0.0).round(), same)


@pytest.mark.parametrize("sigma", [0.15, 0.7, 1.15])
def test_blur_is_that_of_the_whole_kernel(sigma):
    images = photographs(2, 70, 90).astype(np.float32)
    found = gaussian_blur(jax.random.key(0), jnp.asarray(images), (sigma, sigma))
    for axis in (1, 2):
        taps = np.arange(kernel_size(images.shape[axis])) - kernel_size(images.shape[axis]) // 2
        weights = np.exp(-0.5 * (taps / sigma) ** 2)
        images = correlate1d(images, weights / weights.sum(), axis=axis, mode="mirror")
    np.testing.assert_allclose(found, images, atol=1e-3)


def test_taps_beyond_the_kept_ones_weigh_nothing():
    taps = np.arange(-25, 26)
    weights = np.exp(-0.5 * (taps / 1.15) ** 2)
    assert weights[np.abs(taps) > 6].sum() / weights.sum() < 1e-6


def test_kernel_sizes_of_the_published_crops():
    assert [kernel_size(side) for side in (512, 1024, 64)] == [51, 103, 7]


@pytest.mark.parametrize(("jitter", "blur", "share"), [(0.8, 0.0, 0.8), (0.0, 0.5, 0.5)])
def test_on_and_off_are_drawn_for_the_batch(jitter, blur, share):
    images = jnp.asarray(photographs(4, 24, 24))
    run = jax.jit(jax.vmap(lambda key: strong_augmentation(key, images, jitter=jitter, blur=blur)))
    found = np.asarray(run(jax.random.split(jax.random.key(0), 400)))
    changed = (np.abs(found - np.asarray(images)[None]) > 1e-3).any((2, 3, 4))
    on = changed.any(1)
    assert on.mean() == pytest.approx(share, abs=0.06)
    # the smallest deviations of the blur change nothing that one can see
    assert changed[on].mean() > 0.9


def test_devices_do_not_change_the_draws():
    images = jnp.asarray(photographs(8, 16, 16))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(images, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    run = jax.jit(lambda x: strong_augmentation(jax.random.key(3), x, jitter=1.0, blur=1.0))
    np.testing.assert_allclose(run(images), run(split), atol=1e-3)
