"""Windows, mirror images and the corner of the detail crop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmda.augment.geometry import random_crop, random_flip, windows


def numbered(count: int, height: int, width: int) -> dict[str, jax.Array]:
    """Returns labels with a number per pixel, and images whose three channels repeat it."""
    labels = jnp.arange(count * height * width).reshape(count, height, width)
    return {"image": jnp.stack([labels] * 3, -1).astype(jnp.uint16), "labels": labels}


def test_windows_of_chosen_rows():
    arrays = numbered(3, 4, 5)
    found = windows(arrays, jnp.array([2, 0]), jnp.array([1, 0]), jnp.array([2, 3]), (2, 2))
    assert found["labels"].tolist() == [[[47, 48], [52, 53]], [[3, 4], [8, 9]]]
    np.testing.assert_array_equal(found["image"][..., 1], found["labels"])
    assert found["image"].dtype == jnp.uint16


def test_crops_are_uniform_and_cut_all_arrays_alike():
    arrays = numbered(1, 4, 3)
    crops = jax.vmap(lambda k: random_crop(k, arrays, (2, 2)))(jax.random.split(jax.random.key(0), 3000))
    np.testing.assert_array_equal(crops["image"][..., 0], crops["labels"])
    corners, counts = np.unique(crops["labels"][:, 0, 0, 0], return_counts=True)
    assert corners.tolist() == [0, 1, 3, 4, 6, 7]
    np.testing.assert_allclose(counts / 3000, 1 / 6, atol=0.03)


def test_rows_are_flipped_by_chance_and_alike():
    arrays = numbered(2000, 1, 2)
    found = random_flip(jax.random.key(0), arrays)
    np.testing.assert_array_equal(found["image"][..., 2], found["labels"])
    mirrored = np.asarray(found["labels"][:, 0, 0] > found["labels"][:, 0, 1])
    assert mirrored.mean() == pytest.approx(0.5, abs=0.04)
    np.testing.assert_array_equal(np.sort(found["labels"], axis=2), arrays["labels"])
