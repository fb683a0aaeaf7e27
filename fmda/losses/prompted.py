"""Losses of promptable segmentation (Kirillov et al. 2023, Segment Anything, appendix A), and where its errors lie."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from fmda.losses.pixelwise import dice_loss

FOCAL, DICE = 20.0, 1.0
"""Weights of the terms of a mask's loss."""
ALPHA, GAMMA = 0.75, 2
"""Weight of pixels on the object, and exponent of the focal loss (Lin et al. 2017).

Theirs is 0.25, for detectors. With it masks of a small network stayed nearly empty, in trials that changed other
settings too.
"""


def mask_losses(logits: Float[Array, "*n h w"], target: Bool[Array, "*n h w"]) -> Float[Array, "*n"]:
    """Returns 20 x focal loss, the mean over pixels, + Dice loss of each mask; float32."""
    logits, wanted = logits.astype(jnp.float32), target.astype(jnp.float32)
    chance = jax.nn.sigmoid(logits)
    entropy = jax.nn.softplus(logits) - logits * wanted
    missed = chance + wanted - 2 * chance * wanted
    weight = (1 - ALPHA) + (2 * ALPHA - 1) * wanted
    focal = (weight * missed**GAMMA * entropy).mean((-2, -1))
    overlap, areas = (chance * wanted).sum((-2, -1)), (chance + wanted).sum((-2, -1))
    return FOCAL * focal + DICE * dice_loss(overlap, areas)


def mask_iou(logits: Float[Array, "*n h w"], target: Bool[Array, "*n h w"]) -> Float[Array, "*n"]:
    """Returns the IoU of each mask, logits above 0, with its target; 1 where both are empty. It has no gradient."""
    mask = logits > 0
    union = (mask | target).sum((-2, -1))
    return jnp.where(union == 0, 1.0, (mask & target).sum((-2, -1)) / jnp.maximum(union, 1))


def prompted_losses(
    logits: Float[Array, "*n 4 h w"],
    predicted: Float[Array, "*n 4"],
    target: Bool[Array, "*n h w"],
    ambiguous: Bool[Array, "*n"],
) -> tuple[Float[Array, "*n"], Float[Array, "*n"], Float[Array, "*n 4"]]:
    """Returns (mask loss, squared error of the predicted IoU, IoU of the four masks) of each prompt.

    Of the last three masks the one of the smallest loss counts, so that each may stand for another meaning of a prompt.
    The first mask, meant for prompts that are not ambiguous, adds its own loss for these.
    """
    target = target[..., None, :, :]
    losses, iou = mask_losses(logits, target), mask_iou(logits, target)
    single = jnp.where(ambiguous, 0.0, losses[..., 0])
    error = ((predicted.astype(jnp.float32) - jax.lax.stop_gradient(iou)) ** 2).mean(-1)
    # not `min`: where a compiler rounds its input and its result apart, the gradient divides by no equal value
    best = 1 + losses[..., 1:].argmin(-1, keepdims=True)
    return jnp.take_along_axis(losses, best, axis=-1)[..., 0] + single, error, iou


def error_points(
    mask: Bool[Array, "*n h w"], target: Bool[Array, "*n h w"], key: Key[Array, ""]
) -> tuple[Int[Array, "*n 2"], Int[Array, "*n"]]:
    """Returns a random cell (x, y) where mask and target differ, and its label: 1 on the target, 0 beside it.

    The label is -1, no point, where both are the same.
    """
    *lead, _, w = mask.shape
    wrong = (mask != target).reshape(*lead, -1)
    place = jnp.where(wrong, jax.random.uniform(key, wrong.shape), -1.0).argmax(-1)
    inside = jnp.take_along_axis(target.reshape(*lead, -1), place[..., None], axis=-1)[..., 0]
    label = jnp.where(wrong.any(-1), inside.astype(jnp.int32), -1)
    return jnp.stack([place % w, place // w], axis=-1), label
