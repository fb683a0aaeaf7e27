"""Self-training on pseudo-labels of an average of earlier students, on mixed images: DACS, DAFormer and MIC.

A teacher labels the clean target crops. Half of the classes of a source crop are pasted over each of them (ClassMix),
and the student learns the result after strong changes of colour and sharpness, beside the source crops themselves.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from fmda.augment.mixing import class_masks, mixed, patch_masked
from fmda.augment.photometric import strong_augmentation
from fmda.config import Decay, NonNegativeFloat, NonNegativeInt, PositiveInt, Share
from fmda.losses.pixelwise import pseudo_labels
from fmda.methods.dense import normalised
from fmda.methods.uda.student import student_outputs, teacher_logits
from fmda.models.module import statistics_of
from fmda.train import OptimConfig, TrainState
from fmda.trees import Tree


@dataclass(frozen=True)
class Optimizer(OptimConfig):
    """AdamW of DAFormer: ten times the rate for all but the encoder, no decay on the encoder's norms, else on all."""

    learning_rate: NonNegativeFloat = 6e-5
    schedule: Literal["cosine", "linear", "poly", "step", "constant"] = "poly"
    power: NonNegativeFloat = 1.0
    warmup_steps: NonNegativeInt = 1500
    weight_decay: NonNegativeFloat = 0.01
    no_decay: tuple[str, ...] = ("encoder/*norm*",)
    multipliers: dict[str, NonNegativeFloat] = field(default_factory=lambda: {"encoder/*": 1.0, "*": 10.0})


SHARES_DECAY = 0.99
"""Share that the running mean of pseudo-label shares keeps at each step."""


@dataclass(frozen=True)
class SelfTrainingConfig:
    """What the student learns besides the labels of the source; the defaults are DAFormer's.

    Attributes:
        decay: share that the teacher keeps, once it has seen enough steps; 0.99 in DACS.
        threshold: probability from which a pixel counts as confident.
        mix_per_image: ClassMix takes the classes of each image (DACS), not of the batch.
        strength, jitter, blur: see `strong_augmentation`.
        ignored_rows: rows at the top and at the bottom of a target crop whose pseudo-labels have no weight; (15, 120)
            in DAFormer, where a crop is as high as the frame and the car's bonnet is in it.
        border: rows at the top and at the bottom, columns at the left and at the right of a resized target frame whose
            pseudo-labels have no weight, wherever a crop lies; (30, 240, 30, 30) in HRDA.
        masked: weight of the loss on target images with hidden patches; 1 in MIC.
        patch, hidden: side of a patch in pixels and share that is hidden; MIC has patches of 64 for crops of 1024.
    """

    decay: Decay = 0.999
    threshold: Share = 0.968
    mix_per_image: bool = False
    strength: Share = 0.2
    jitter: Share = 0.8
    blur: Share = 0.5
    ignored_rows: tuple[NonNegativeInt, NonNegativeInt] = (0, 0)
    border: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt, NonNegativeInt] = (0, 0, 0, 0)
    masked: NonNegativeFloat = 0.0
    patch: PositiveInt = 32
    hidden: Share = 0.7


def initial_aux(statistics: Tree, classes: int) -> Tree:
    """Returns `state.aux` before the first step, for the running statistics of `BatchNorm` ({} without one)."""
    return {"statistics": statistics, "shares": jnp.zeros(classes)}


def teacher_decay(decay: float) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
    """Returns the share that the teacher keeps before each step: min(1 - 1 / (step + 1), decay), 0 before the first."""
    return lambda step: jnp.minimum(1 - 1 / (step + 1), decay)


def running_shares(shares: Float[Array, " k"], pseudo: Int[Array, "b h w"], step: Int[Array, ""]) -> Array:
    """Returns the running mean [k] of the share of pixels with each class, the plain mean over the first steps."""
    keep = teacher_decay(SHARES_DECAY)(step)
    return keep * shares + (1 - keep) * jax.nn.one_hot(pseudo, len(shares)).mean((0, 1, 2))


def pseudo_weights(weight: Float[Array, ""], shape: tuple[int, ...], ignored_rows: tuple[int, int]) -> Array:
    """Returns the weights [b, h, w] of pseudo-labels: `weight`, and 0 in so many rows at the top and at the bottom."""
    rows, (top, bottom) = jnp.arange(shape[1]), ignored_rows
    inside = (rows >= top) & (rows < shape[1] - bottom)
    return jnp.broadcast_to(weight, shape) * jnp.broadcast_to(inside[None, :, None], shape)


def inside_border(
    margins: Int[Array, "b 4"], size: tuple[int, int], border: tuple[int, int, int, int]
) -> Bool[Array, "b h w"]:
    """Returns which pixels of crops of size (h, w) lie inside the border of their frame, a mirrored one included.

    `margins` are the rows of the frame above and below, and its columns left and right of each crop; `border` is in the
    same order.
    """
    rows, columns = jnp.arange(size[0])[None, :, None], jnp.arange(size[1])[None, None]
    depths = (rows, size[0] - 1 - rows, columns, size[1] - 1 - columns)
    sides = (depth + margins[:, i, None, None] >= border[i] for i, depth in enumerate(depths))
    return functools.reduce(jnp.logical_and, sides)


class SelfTraining(NamedTuple):
    """Losses of one step, scalars to log, and what of `state.aux` changes."""

    losses: dict[str, Array]
    metrics: dict[str, Array]
    aux: Tree


def self_training_losses(
    graphdef: nnx.GraphDef,
    classes: int,
    config: SelfTrainingConfig,
    student: Any,
    state: TrainState,
    batch: Mapping[str, Any],
    key: Any,
    detail_weight: float,
) -> SelfTraining:
    """Returns what the student learns from the target images of a batch, and from source pixels pasted over them.

    The mixed images move the running statistics, masked ones do not. Sources: Tranheden et al. 2021 (DACS), Hoyer et
    al. 2022 (DAFormer) and 2023 (MIC).
    """
    classes_key, augment_key, mixed_key, hide_key, look_key, masked_key = jax.random.split(key, 6)
    image, labels = batch["source"]["image"], batch["source"]["labels"]
    target = batch["target"]["image"]
    pseudo, confident = pseudo_labels(teacher_logits(graphdef, state, target), config.threshold)
    weights = pseudo_weights(confident, pseudo.shape, config.ignored_rows)
    if any(config.border):
        size = (pseudo.shape[1], pseudo.shape[2])
        weights *= inside_border(batch["target"]["margins"], size, config.border)
    mask = class_masks(classes_key, labels, classes, per_image=config.mix_per_image)
    ours = {"image": image, "labels": labels, "weights": jnp.ones_like(weights)}
    mix = mixed(mask, ours, {"image": target, "labels": pseudo, "weights": weights})
    look = {"strength": config.strength, "jitter": config.jitter, "blur": config.blur}
    changed = normalised(strong_augmentation(augment_key, mix["image"], **look))
    outputs = student_outputs(student, changed, mixed_key, detail_weight)
    losses = {"mixed": outputs.cross_entropy(mix["labels"], mix["weights"])}
    shares = running_shares(state.aux["shares"], pseudo, state.step)
    aux = {"statistics": statistics_of(student), "shares": shares}
    if config.masked:
        changed = normalised(strong_augmentation(look_key, target, **look))
        changed = patch_masked(hide_key, changed, patch=config.patch, ratio=config.hidden)
        outputs = student_outputs(student, changed, masked_key, detail_weight)
        losses["masked"] = config.masked * outputs.cross_entropy(pseudo, weights)
    return SelfTraining(losses, {"confident": confident.mean()}, aux)
