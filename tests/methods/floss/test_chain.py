"""Geometry, windows, and the chain as matrices against the chain step by step."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from floss_small import CONFIG

from fmda.evaluate import Protocol
from fmda.methods.floss import chain
from fmda.methods.floss.hosts import HOSTS, host_for, normalised, window_pixels


def test_windows_of_the_published_settings():
    maskclip = host_for("maskclip", "cityscapes").patch_grid((1024, 2048), 16)
    assert maskclip.network == (448, 896)
    assert maskclip.rows.starts == (0,) and maskclip.columns.starts == (0, 224, 448)
    coco = host_for("maskclip", "coco-stuff").patch_grid((480, 640), 16)
    assert coco.network == (448, 597) and coco.columns.starts == (0, 149)
    naclip = host_for("naclip", "cityscapes").patch_grid((1024, 2048), 16)
    assert naclip.network == (560, 1120)
    assert naclip.columns.starts == tuple(range(0, 897, 112)) and naclip.rows.starts == (0, 112, 224, 336)
    assert host_for("naclip", "ade20k").patch_grid((480, 640), 16).shape == (2, 3)
    assert host_for("naclip", "voc20").patch_grid((375, 500), 16).shape == (1, 1)
    assert host_for("maskclip", "bdd10k").long_max == 1280 and host_for("maskclip", "acdc").long_max == 796


def test_remainder_is_padded_or_stretched():
    padded = chain.patch_grid((90, 90), Protocol((90, 90)), 16, "pad").rows
    assert (padded.patches, padded.covered, padded.window) == (6, 96, 90)
    dropped = chain.patch_grid((90, 90), Protocol((90, 90)), 16, "drop").rows
    assert (dropped.patches, dropped.covered) == (5, 90)


def test_taps_equal_the_plain_formula():
    taps = chain.linear_taps(3, 12)
    x = np.asarray([0.0, 4.0, 8.0], np.float32)
    places = np.clip((np.arange(12) + 0.5) / 4 - 0.5, 0, 2)
    values = x[taps.low] + taps.fraction * (x[taps.high] - x[taps.low])
    np.testing.assert_allclose(values, 4 * places, atol=1e-6)


def test_taps_of_a_padded_window_are_the_leading_ones():
    whole, kept = chain.linear_taps(6, 96), chain.linear_taps(6, 96, 90)
    np.testing.assert_array_equal(kept.fraction, whole.fraction[:90])
    assert kept.padded(96).low.shape == (96,)


@pytest.mark.parametrize("name", sorted(HOSTS))
def test_matrices_equal_the_chain_step_by_step(name):
    host = host_for({"name": name, "crop": 32, "stride": 16, "long_max": 80, "short_max": 40})
    where = host.patch_grid((60, 90), 8)
    rng = np.random.default_rng(0)
    down, across = where.shape
    maps = rng.normal(size=(down * across, where.rows.patches, where.columns.patches, 3)).astype(np.float32)
    total = np.zeros((*where.network, 3), np.float32)
    counts = np.zeros((*where.network, 1), np.float32)
    for (y, x), patch in zip(where.corners(), maps, strict=True):
        big = chain.interpolate(jnp.asarray(patch), where.rows.window_taps, where.columns.window_taps)
        total[y : y + where.rows.window, x : x + where.columns.window] += np.asarray(big)
        counts[y : y + where.rows.window, x : x + where.columns.window] += 1
    steps = chain.interpolate(jnp.asarray(total / counts), where.rows.resize_taps, where.columns.resize_taps)
    joined = np.asarray(chain.side_by_side(jnp.asarray(maps), where.shape))
    matrices = np.einsum("yh,hwk,xw->yxk", where.rows.matrix(), joined, where.columns.matrix())
    np.testing.assert_allclose(matrices, steps, atol=2e-6)
    np.testing.assert_allclose(where.rows.matrix().sum(1), 1, atol=1e-6)


def test_windows_are_cut_at_their_corners_and_padded_with_black():
    host = replace(host_for("clip-dinoiser"), long_max=12, short_max=6, crop=6, stride=3)
    image = np.arange(6 * 9 * 3, dtype=np.uint8).reshape(6, 9, 3)
    windows = window_pixels(image, host.patch_grid((6, 9), 4), host, CONFIG)
    assert windows.shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(windows[1, :6, :6], normalised(image[:, 3:], host, CONFIG))
    np.testing.assert_array_equal(windows[0, 7, 7], normalised(np.zeros(3, np.uint8), host, CONFIG))


def test_synonyms_take_the_largest_score():
    x = jnp.asarray([[0.1, 0.5, 0.3, 0.2]])
    np.testing.assert_allclose(chain.merge_queries(x, (0, 1, 1, 2)), [[0.1, 0.5, 0.2]])
    assert chain.merge_queries(x, (0, 1, 2, 3)) is x


def test_bands_join_to_the_whole():
    x = jnp.arange(32.0).reshape(16, 2)
    total, largest = chain.in_bands(lambda a: (a * 2, a.max(-1)), 16, 4, x)
    np.testing.assert_array_equal(total, 2 * x)
    np.testing.assert_array_equal(largest, x[:, 1])
