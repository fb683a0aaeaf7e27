"""Mask2Former's loss: what it is made of, pixels and images without labels, fixed assignment, broken logits."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmda.losses.masks import MaskLossConfig, mask_loss

CONFIG = MaskLossConfig(points=48)
LABELS = np.full((2, 16, 24), 255)
LABELS[0, 4:12, :12] = 2
LABELS[0, :4] = 0


@partial(jax.jit, static_argnums=3, compiler_options={"xla_backend_optimization_level": 0})
def slopes(classes, masks, labels, config=CONFIG):
    """((loss, metrics), gradients of both logits)."""
    loss = lambda classes, masks: mask_loss(classes, masks, labels, jax.random.key(0), config)  # noqa: E731
    return jax.value_and_grad(loss, (0, 1), has_aux=True)(classes, masks)


def logits(queries=5):
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 2, queries, 4)), 2 * rng.normal(size=(2, 2, queries, 4, 6))


def finite(result):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))


def test_right_predictions_cost_less_than_wrong_ones():
    classes, masks = logits()
    (loss, metrics), (to_classes, to_masks) = result = slopes(classes, masks, LABELS)
    assert finite(result) and metrics["non_finite"] == 0
    # both predictions learn, masks of two matched queries each, none in the image without labels
    assert (np.abs(to_masks).sum((2, 3, 4)) > 0).tolist() == [[True, False]] * 2
    assert (np.abs(to_masks).sum((3, 4)) > 0).sum() == 4 and np.abs(to_classes).all()
    right = -8.0 * np.ones_like(masks)
    right[:, 0, 3, :1], right[:, 0, 1, 1:3, :3] = 8, 8
    known = np.zeros_like(classes)
    known[..., 3] = 8
    known[:, 0, 3], known[:, 0, 1] = 8 * np.eye(4)[0], 8 * np.eye(4)[2]
    (best, metrics), _ = slopes(known, right, LABELS)
    assert best < loss / 4 and metrics["class"] < 0.01


def test_pixels_without_label_are_left_out_or_negative():
    classes, masks = logits()
    elsewhere = np.array(masks)
    elsewhere[:, 0, :, 3, 4:] += 5  # more than half a place away from every labelled pixel
    here, there = (float(slopes(classes, x, LABELS)[0][0]) for x in (masks, elsewhere))
    assert here == pytest.approx(there, abs=1e-5)
    config = replace(CONFIG, ignore="negative")
    here, there = (float(slopes(classes, x, LABELS, config)[0][0]) for x in (masks, elsewhere))
    assert there > here + 0.1


def test_batches_without_labels_and_broken_logits_have_a_finite_loss():
    classes, masks = logits()
    (loss, metrics), (to_classes, to_masks) = result = slopes(classes, masks, np.full_like(LABELS, 255))
    assert finite(result) and loss > 0 and metrics["mask"] == 0 and not to_masks.any() and to_classes.any()
    # a number that is no class counts as ignored
    np.testing.assert_array_equal(slopes(classes, masks, np.full_like(LABELS, 77))[0][0], loss)
    classes[0, 0, 1], masks[1, 0, 2], masks[0, 0, 0, 0, 0] = np.nan, np.inf, np.nan
    (_, metrics), _ = result = slopes(classes, masks, LABELS)
    assert finite(result) and metrics["non_finite"] >= 4 + 24 + 1


def test_fixed_queries_own_their_classes():
    classes, masks = logits(3)
    config = replace(CONFIG, fixed=True)
    _, (_, to_masks) = result = slopes(classes, masks, LABELS, config)
    assert finite(result)
    assert (np.abs(to_masks).sum((3, 4)) > 0)[:, 0].tolist() == [[True, False, True]] * 2


def test_devices_that_share_a_batch_have_its_loss():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    classes, masks = (jnp.asarray(x, jnp.float32) for x in logits())
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    (whole, _), _ = slopes(classes, masks, LABELS)
    (shared, _), _ = slopes(jax.device_put(classes, spread), jax.device_put(masks, spread), LABELS)
    np.testing.assert_allclose(shared, whole, rtol=1e-5)
