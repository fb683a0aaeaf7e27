"""Mask2Former's loss: queries are matched to the classes of a label map and learn class and mask at sampled points.

A target is the mask of one class that occurs in an image, for things too. Source: Cheng et al. 2022, 3.3 and 4.1.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from fmda.losses.matching import LIMIT, NONE, match
from fmda.losses.pixelwise import IGNORE, dice_loss
from fmda.nn.deformable import bilinear_corners, gather_sum, packed


@dataclass(frozen=True)
class MaskLossConfig:
    """Weights and points; the defaults are those of Mask2Former and CLOUDS.

    Attributes:
        class_weight, mask_weight, dice_weight: of the three terms, in the loss and in the cost of a match.
        no_object: weight of a query without a target in the class term.
        points: at which a mask is compared.
        oversample: candidates per point; those with the smallest |logit| are taken.
        important: share of the points that are taken from the candidates; the others are uniform.
        ignore: "negative" counts pixels labelled 255 as outside of every mask, as the released CLOUDS does; "excluded"
            leaves them out of points, costs and loss.
        fixed: query k belongs to class k; nothing is matched.
    """

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object: float = 0.1
    points: int = 12544
    oversample: float = 3.0
    important: float = 0.75
    ignore: Literal["negative", "excluded"] = "excluded"
    fixed: bool = False

    @property
    def candidates(self) -> int:
        """Candidates of a mask."""
        return int(self.points * self.oversample)

    @property
    def uncertain(self) -> int:
        """Points of a mask that are taken from the candidates."""
        return int(self.important * self.points)


class Points(NamedTuple):
    """Places (x, y) from 0 to 1: the candidates of each class, and those that are taken whatever their logit."""

    candidates: Float[Array, "b k c 2"]
    fresh: Float[Array, "b k r 2"]


def mask_loss(
    classes: Float[Array, "l b q k+1"],
    masks: Float[Array, "l b q h w"],
    labels: Int[Array, "b H W"],
    key: Key[Array, ""],
    config: MaskLossConfig = MaskLossConfig(),
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns (loss, metrics); the loss is the sum over the l predictions and is always finite.

    Under jit, means are over the whole batch, however it is split over devices. Metrics: the three unweighted terms of
    the last prediction ("class", "mask", "dice"), and "non_finite", the number of logits and costs that were replaced:
    training that reports any has diverged. An image without a target trains "no object" alone.

    Args:
        classes: logits of each prediction, "no object" last.
        masks: logits.
        labels: classes 0 to k - 1 of the same images; 255, and whatever is no class, is ignored as `config` says.
        key: of the points.
        config: weights and points.
    """
    broken = (~jnp.isfinite(classes)).sum() + (~jnp.isfinite(masks)).sum()
    classes, masks = (
        jnp.nan_to_num(x.astype(jnp.float32), nan=0.0, posinf=LIMIT, neginf=-LIMIT) for x in (classes, masks)
    )
    depth, b, queries, count = classes.shape
    labels = jnp.where((labels >= 0) & (labels < count - 1), labels, IGNORE)
    present = (labels[..., None] == jnp.arange(count - 1).reshape(1, 1, 1, -1)).any((1, 2))
    match_key, loss_key = jax.random.split(key)
    if config.fixed:
        owner = jnp.where(present, jnp.arange(queries, dtype=jnp.int32)[None], NONE)
        owners = jnp.broadcast_to(owner, (depth, *owner.shape))
    else:
        points = (b, config.points, 2)
        costs = lax.map(
            lambda one: matching_costs(one[0], one[1], labels, jax.random.uniform(one[2], points), config),
            (*map(lax.stop_gradient, (classes, masks)), jax.random.split(match_key, depth)),
        )
        flat = costs.reshape(depth * b, queries, -1)
        owners, replaced = match(flat, jnp.tile(present, (depth, 1)))
        owners, broken = owners.reshape(depth, b, -1), broken + replaced

    def level(one: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array]:
        points = draw_points(one[3], (b, count - 1), config)
        return prediction_loss(one[0], one[1], labels, one[2], present, points, config)

    terms = lax.map(level, (classes, masks, owners, jax.random.split(loss_key, depth)))
    weights = (config.class_weight, config.mask_weight, config.dice_weight)
    loss = sum((weight * term.sum() for weight, term in zip(weights, terms, strict=True)), jnp.zeros(()))
    last = {name: term[-1] for name, term in zip(("class", "mask", "dice"), terms, strict=True)}
    return loss, last | {"non_finite": broken.astype(jnp.float32)}


def matching_costs(
    classes: Float[Array, "b q k+1"],
    masks: Float[Array, "b q h w"],
    labels: Int[Array, "b H W"],
    points: Float[Array, "b p 2"],
    config: MaskLossConfig,
) -> Float[Array, "b q k"]:
    """Returns the cost of giving each query each class, from one set of points per image."""
    logits = _sampled(jnp.moveaxis(masks, 1, -1), points)
    values, corners = _label_corners(labels, points)
    wanted = jnp.arange(classes.shape[-1] - 1).reshape(1, 1, 1, -1)
    targets = jnp.where(values[..., None] == wanted, corners[..., None], 0).sum(2)
    valid = _valid(values, corners, config)
    probs = jax.nn.sigmoid(logits)
    exact = lax.Precision.HIGHEST
    positive = jnp.einsum("bpq,bpk->bqk", logits, targets, precision=exact)
    overlap = jnp.einsum("bpq,bpk->bqk", probs, targets, precision=exact)
    area, softplus = (
        jnp.einsum("bpq,bp->bq", x, valid, precision=exact)[..., None] for x in (probs, jax.nn.softplus(logits))
    )
    mean = jnp.maximum(valid.sum(1), 1.0).reshape(-1, 1, 1)
    return (
        config.mask_weight * (softplus - positive) / mean
        - config.class_weight * jax.nn.softmax(classes)[..., :-1]
        + config.dice_weight * dice_loss(overlap, area + targets.sum(1)[:, None])
    )


def draw_points(key: Key[Array, ""], shape: tuple[int, int], config: MaskLossConfig) -> Points:
    """Returns uniform candidates and fresh points for each image and class."""
    first, second = jax.random.split(key)
    fresh = config.points - config.uncertain
    return Points(
        jax.random.uniform(first, (*shape, config.candidates, 2)), jax.random.uniform(second, (*shape, fresh, 2))
    )


def prediction_loss(
    classes: Float[Array, "b q k+1"],
    masks: Float[Array, "b q h w"],
    labels: Int[Array, "b H W"],
    owners: Int[Array, "b k"],
    present: Bool[Array, "b k"],
    points: Points,
    config: MaskLossConfig,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Returns the class, mask and Dice terms of one prediction, unweighted, for queries `owners` of the classes."""
    b, queries, k = len(classes), classes.shape[1], classes.shape[2] - 1
    matched = owners != NONE
    index = jnp.where(matched, owners, 0)
    chosen = jnp.take_along_axis(masks, index[..., None, None], axis=1).reshape(b * k, *masks.shape[2:], 1)
    places = _chosen_points(chosen, labels, points, config)
    logits = _sampled(chosen, places.reshape(b * k, -1, 2)).reshape(b, k, -1)
    values, corners = _label_corners(labels, places.reshape(b, -1, 2))
    values, corners = (x.reshape(b, k, -1, 4) for x in (values, corners))
    targets = jnp.where(values == jnp.arange(k).reshape(1, -1, 1, 1), corners, 0).sum(-1)
    valid = _valid(values, corners, config)
    probs = jax.nn.sigmoid(logits)
    each_mask = (valid * jax.nn.softplus(logits) - targets * logits).sum(-1) / jnp.maximum(valid.sum(-1), 1.0)
    each_dice = dice_loss((probs * targets).sum(-1), (valid * probs).sum(-1) + targets.sum(-1))
    masks_in_all = jnp.maximum(present.sum(), 1)
    mask, dice = ((each * matched).sum() / masks_in_all for each in (each_mask, each_dice))

    # each image's queries know their class; those of no class learn "no object"
    rows = jnp.arange(b).reshape(-1, 1)
    wanted = jnp.full((b, queries), k, jnp.int32)
    wanted = wanted.at[rows, jnp.where(matched, owners, queries)].set(jnp.arange(k, dtype=jnp.int32)[None], mode="drop")
    weights = jnp.where(wanted == k, config.no_object, 1.0)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(classes), wanted[..., None], axis=-1)[..., 0]
    return (weights * losses).sum() / weights.sum(), mask, dice


def _chosen_points(
    masks: Float[Array, "b*k h w 1"], labels: Int[Array, "b H W"], points: Points, config: MaskLossConfig
) -> Float[Array, "b k p 2"]:
    """Returns the candidates that the masks are least sure of, and the fresh points. No gradient."""
    b, k, count, _ = points.candidates.shape
    logits = _sampled(lax.stop_gradient(masks), points.candidates.reshape(b * k, count, 2)).reshape(b, k, count)
    doubt = -jnp.abs(logits)
    if config.ignore == "excluded":
        values, corners = _label_corners(labels, points.candidates.reshape(b, -1, 2))
        doubt = jnp.where(_valid(values, corners, config).reshape(doubt.shape) > 0, doubt, -jnp.inf)
    _, best = lax.top_k(doubt, config.uncertain)
    taken = jnp.take_along_axis(points.candidates, best[..., None], axis=2)
    return lax.stop_gradient(jnp.concatenate([taken, points.fresh], axis=2))


def _sampled(maps: Float[Array, "n h w c"], points: Float[Array, "n p 2"]) -> Float[Array, "n p c"]:
    """Returns bilinear samples, zeros outside."""
    index, corners = bilinear_corners(points[:, :, None], (maps.shape[1], maps.shape[2]))
    return gather_sum(packed(maps), index, corners)


def _label_corners(
    labels: Int[Array, "b H W"], points: Float[Array, "b p 2"]
) -> tuple[Int[Array, "b p 4"], Float[Array, "b p 4"]]:
    """Returns the labels around each point, -1 outside the image, and their bilinear weights."""
    index, corners = bilinear_corners(points[:, :, None], (labels.shape[1], labels.shape[2]))
    # the image's border is filled with zeros
    cells = packed((labels.astype(jnp.int32) + 1)[..., None])
    values = jnp.take_along_axis(cells, index, axis=1) - 1
    return values, corners[:, :, 0]


def _valid(values: Int[Array, "*s 4"], corners: Float[Array, "*s 4"], config: MaskLossConfig) -> Float[Array, "*s"]:
    """Returns how much of each point counts: all of it, or its share that has a class."""
    if config.ignore == "negative":
        return jnp.ones(values.shape[:-1])
    return jnp.where((values >= 0) & (values != IGNORE), corners, 0).sum(-1)
