"""Losses of promptable segmentation: values by hand, the best of three masks, points where an answer is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmda.losses import prompted
from fmda.losses.prompted import error_points, mask_iou, mask_losses, prompted_losses

LOGITS = np.array([[2.0, -1.0], [0.5, -3.0]], np.float32)
TARGET = np.array([[True, True], [False, False]])


def by_hand(logits, target, focal=20.0, dice=1.0):
    """The loss pixel by pixel."""
    values, overlap, areas = [], 0.0, 0.0
    for logit, inside in zip(logits.ravel().tolist(), target.ravel().tolist(), strict=True):
        chance = 1 / (1 + np.exp(-logit))
        right, weight = (chance, 0.75) if inside else (1 - chance, 0.25)
        values.append(-weight * (1 - right) ** 2 * np.log(right))
        overlap, areas = overlap + chance * inside, areas + chance + inside
    return focal * np.mean(values) + dice * (1 - (2 * overlap + 1) / (areas + 1))


def test_the_loss_of_a_mask_pixel_by_pixel():
    losses = mask_losses(jnp.asarray([LOGITS, -LOGITS]), jnp.asarray([TARGET, TARGET]))
    np.testing.assert_allclose(losses, [by_hand(LOGITS, TARGET), by_hand(-LOGITS, TARGET)], rtol=1e-5)
    # far from any limit the two terms add up to nothing for a right answer and to more than 20 for a wrong one
    sure = np.where(TARGET, 60.0, -60.0).astype(np.float32)
    assert float(mask_losses(sure, TARGET)) == pytest.approx(0, abs=1e-5) and float(mask_losses(-sure, TARGET)) > 20
    for logits in (sure, -sure):
        assert np.isfinite(jax.grad(mask_losses)(jnp.asarray(logits), jnp.asarray(TARGET))).all()


def test_the_object_weighs_three_quarters_and_a_twin_with_weights_exchanged_is_caught(monkeypatch):
    monkeypatch.setattr(prompted, "ALPHA", 0.25)
    assert abs(float(mask_losses(LOGITS, TARGET)) - by_hand(LOGITS, TARGET)) > 0.1


def test_iou_counts_pixels_above_zero():
    assert float(mask_iou(LOGITS, TARGET)) == pytest.approx(1 / 3)
    nothing = np.zeros((2, 2), bool)
    assert float(mask_iou(np.full((2, 2), -1.0), nothing)) == 1 and float(mask_iou(LOGITS, nothing)) == 0


def test_of_three_masks_the_best_counts_and_the_first_only_for_clear_prompts():
    logits = jnp.asarray([[3 * LOGITS, LOGITS, -LOGITS, np.where(TARGET, 2.0, -2.0)]] * 2, jnp.float32)
    predicted = jnp.asarray([[0.5, 0.25, 0.0, 0.5]] * 2)
    mask, error, iou = prompted_losses(logits, predicted, jnp.asarray([TARGET] * 2), jnp.asarray([True, False]))
    best, first = by_hand(np.where(TARGET, 2.0, -2.0), TARGET), by_hand(3 * LOGITS, TARGET)
    np.testing.assert_allclose(mask, [best, best + first], rtol=1e-5)
    np.testing.assert_allclose(iou[0], [1 / 3, 1 / 3, 1 / 3, 1.0], rtol=1e-6)
    squares = (np.array([0.5, 0.25, 0.0, 0.5]) - np.array([1 / 3, 1 / 3, 1 / 3, 1.0])) ** 2
    np.testing.assert_allclose(error, [squares.mean()] * 2, rtol=1e-5)
    # masks that are not the best learn nothing from an ambiguous prompt
    gradient = jax.grad(
        lambda x: prompted_losses(x, predicted, jnp.asarray([TARGET] * 2), jnp.asarray([True] * 2))[0].sum()
    )
    moved = np.abs(np.asarray(gradient(logits))).sum((0, 2, 3))
    assert moved[:3].tolist() == [0, 0, 0] and moved[3] > 0


def test_points_are_drawn_where_mask_and_target_differ():
    mask = np.zeros((3, 4, 5), bool)
    target = np.zeros((3, 4, 5), bool)
    mask[0, 0, 1] = mask[0, 3, 4] = target[0, 0, 1] = target[0, 2, 3] = True  # one pixel too many, one missed
    mask[1], target[1, :, 2] = True, True
    seen = [set(), set()]
    for seed in range(60):
        places, labels = error_points(jnp.asarray(mask), jnp.asarray(target), jax.random.key(seed))
        for row in (0, 1):
            seen[row].add((*np.asarray(places[row]).tolist(), int(labels[row])))
        assert int(labels[2]) == -1
    assert seen[0] == {(4, 3, 0), (3, 2, 1)}
    assert seen[1] <= {(x, y, 0) for x in (0, 1, 3, 4) for y in range(4)} and len(seen[1]) > 10
