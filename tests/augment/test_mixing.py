"""ClassMix and patch masks by definition and by counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmda.augment.mixing import class_masks, mixed, patch_masked

# Class 7 is in the first image alone, class 3 in the second alone; 5 classes in the batch, 255 among them.
LABELS = jnp.array([[[0, 0, 1, 7]], [[0, 1, 3, 255]]])


def chosen(mask: np.ndarray, labels: np.ndarray) -> set[int]:
    """Returns the classes inside the mask; none may lie on both sides."""
    inside, outside = set(labels[mask].tolist()), set(labels[~mask].tolist())
    assert not inside & outside
    return inside


def test_half_of_the_classes_of_the_batch():
    labels = jnp.array([[[0, 1, 2, 255, 0]], [[0, 1, 2, 255, 0]], [[255, 2, 1, 0, 0]]])
    masks = np.asarray(jax.jit(class_masks, static_argnums=2)(jax.random.key(0), labels, 19))
    assert [len(chosen(*pair)) for pair in zip(masks, np.asarray(labels), strict=True)] == [2, 2, 2]
    sets = {
        frozenset(chosen(mask, np.asarray(labels[0])))
        for mask in jax.vmap(lambda k: class_masks(k, labels, 19)[0])(jax.random.split(jax.random.key(1), 100))
    }
    assert len(sets) == 6  # all pairs of four classes


def test_the_class_list_is_that_of_the_batch_or_of_the_image():
    keys = jax.random.split(jax.random.key(0), 2000)
    counts = {}
    for per_image in (False, True):
        masks = jax.vmap(lambda k, p=per_image: class_masks(k, LABELS, 19, per_image=p))(keys)
        counts[per_image] = np.array(
            [[len(chosen(*one)) for one in zip(pair, np.asarray(LABELS), strict=True)] for pair in np.asarray(masks)]
        )
    # 3 of the 5 of the batch, of which the first image shows 3 and the second 4
    assert set(counts[False][:, 0]) == {1, 2, 3} and set(counts[False][:, 1]) == {2, 3}
    np.testing.assert_allclose(counts[False].mean(0), [3 * 3 / 5, 3 * 4 / 5], atol=0.05)
    # ceil(3 / 2) and ceil(4 / 2) of the image's own
    assert (counts[True] == 2).all()


@pytest.mark.parametrize(("per_image", "share"), [(False, 3 / 5), (True, 1 / 2)])
def test_each_class_is_as_likely_as_any_other(per_image, share):
    masks = jax.vmap(lambda k: class_masks(k, LABELS, 19, per_image=per_image)[1, 0])(
        jax.random.split(jax.random.key(2), 4000)
    )
    np.testing.assert_allclose(np.asarray(masks).mean(0), [share] * 4, atol=0.03)


def test_images_draw_independently():
    labels = jnp.broadcast_to(jnp.arange(4).reshape(1, 1, 4), (2, 1, 4))
    masks = jax.vmap(lambda k: class_masks(k, labels, 19)[:, 0])(jax.random.split(jax.random.key(3), 1000))
    assert np.asarray((masks[:, 0] == masks[:, 1]).all(1)).mean() == pytest.approx(1 / 6, abs=0.05)


def test_images_labels_and_weights_are_mixed_alike():
    mask = jnp.array([[[True, False]]])
    source = {"image": jnp.full((1, 1, 2, 3), 9.0), "labels": jnp.full((1, 1, 2), 4), "weight": jnp.ones((1, 1, 2))}
    target = {"image": jnp.zeros((1, 1, 2, 3)), "labels": jnp.full((1, 1, 2), 2), "weight": jnp.full((1, 1, 2), 0.25)}
    found = mixed(mask, source, target)
    assert found["image"].ravel().tolist() == [9, 9, 9, 0, 0, 0]
    assert found["labels"].ravel().tolist() == [4, 2] and found["weight"].ravel().tolist() == [1, 0.25]


def test_patches_are_hidden_whole_and_as_often_as_said():
    found = np.asarray(jax.jit(lambda k: patch_masked(k, jnp.ones((16, 128, 96, 3)), patch=8))(jax.random.key(0)))
    patches = found.reshape(16, 16, 8, 12, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 8 * 8 * 3)
    assert set(patches.mean(1)) == {0.0, 1.0}
    assert (patches[:, 0] == 0).mean() == pytest.approx(0.7, abs=0.03)
    assert len(np.unique(found.reshape(16, -1), axis=0)) == 16
    assert patch_masked(jax.random.key(0), jnp.ones((1, 10, 9, 1)), patch=4, ratio=0.0).sum() == 90


def test_eight_devices_draw_from_the_classes_of_all():
    labels = jnp.arange(8).reshape(8, 1, 1) + jnp.array([0, 5]).reshape(1, 1, 2)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(labels, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    run = jax.jit(lambda x: class_masks(jax.random.key(4), x, 19))
    np.testing.assert_array_equal(run(split), run(labels))
