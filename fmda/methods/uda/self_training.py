"""Self-training on pseudo-labels of an average of earlier students, on mixed images: DACS, DAFormer and MIC.

A teacher labels the clean target crops. Half of the classes of a source crop are pasted over each of them (ClassMix),
and the student learns the result after strong changes of colour and sharpness, beside the source crops themselves.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fmda import trees
from fmda.augment.mixing import class_masks, mixed, patch_masked
from fmda.augment.photometric import strong_augmentation
from fmda.config import Decay, NonNegativeFloat, NonNegativeInt, PositiveInt, Share
from fmda.losses.features import THINGS, feature_distance
from fmda.losses.pixelwise import pseudo_labels, weighted_cross_entropy
from fmda.methods.dense import normalised
from fmda.models.module import assembled, statistics_of
from fmda.nn.resize import resize
from fmda.train import Objective, OptimConfig, Outcome, TrainState
from fmda.trees import Tree

DAFORMER_OPTIM = OptimConfig(
    learning_rate=6e-5, schedule="poly", power=1.0, warmup_steps=1500, weight_decay=0.01,
    no_decay=("encoder/*norm*",), multipliers={"head/*": 10.0},
)  # fmt: skip
"""AdamW of DAFormer: ten times the rate for the head, no decay on the encoder's norms, decay on all else."""


@dataclass(frozen=True)
class SelfTrainingConfig:
    """What the student learns besides the labels of the source; the defaults are DAFormer's without its distance.

    Attributes:
        decay: share that the teacher keeps, once it has seen enough steps; 0.99 in DACS.
        threshold: probability from which a pixel counts as confident.
        mix_per_image: ClassMix takes the classes of each image (DACS), not of the batch.
        strength, jitter, blur: see `strong_augmentation`.
        ignored_rows: rows at the top and at the bottom of a target crop whose pseudo-labels have no weight; (15, 120)
            in DAFormer, where a crop is as high as the frame and the car's bonnet is in it.
        distance: weight of the distance of the encoder's last map to that of the encoder before training; 0.005 in
            DAFormer.
        things: classes that the distance looks at.
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
    distance: NonNegativeFloat = 0.0
    things: tuple[NonNegativeInt, ...] = THINGS
    masked: NonNegativeFloat = 0.0
    patch: PositiveInt = 32
    hidden: Share = 0.7


SHARES_DECAY = 0.99
"""Share that the running mean of pseudo-label shares keeps at each step."""


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


def teacher_logits(graphdef: nnx.GraphDef, state: TrainState, pixels: Float[Array, "b h w 3"]) -> Array:
    """Returns the teacher's logits of normalised pixels, at their size.

    Nothing is dropped, and `BatchNorm` layers normalise by this batch alone: the average is one of parameters, not of
    running statistics.
    """
    teacher = assembled(graphdef, state.teacher, state.aux["statistics"], batch_statistics=True)
    return resize(teacher(pixels), (pixels.shape[1], pixels.shape[2]))


def pseudo_weights(weight: Float[Array, ""], shape: tuple[int, ...], ignored_rows: tuple[int, int]) -> Array:
    """Returns the weights [b, h, w] of pseudo-labels: `weight`, and 0 in so many rows at the top and at the bottom."""
    rows, (top, bottom) = jnp.arange(shape[1]), ignored_rows
    inside = (rows >= top) & (rows < shape[1] - bottom)
    return jnp.broadcast_to(weight, shape) * jnp.broadcast_to(inside[None, :, None], shape)


def student_outputs(student: Any, pixels: Float[Array, "b h w 3"], key: Any) -> tuple[Array, Array]:
    """Returns (logits at the size of normalised pixels, last map of the encoder) of a network in training."""
    keys = jax.random.split(key)
    maps = student.encoder.stages(pixels, keys[0])
    return resize(student.head(maps, keys[1]), (pixels.shape[1], pixels.shape[2])), maps[-1]


def make_objective(graphdef: nnx.GraphDef, classes: int, config: SelfTrainingConfig) -> Objective:
    """Returns the objective of a network with an `encoder` and a `head`.

    Batches are {"source": {"image", "labels"}, "target": {"image"}}, RGB in 0..255; without a target the source is all
    that is learned. `state.aux` (`initial_aux`) holds the running statistics of `BatchNorm`: the source and then the
    mixed images move them, target images do not. Its "shares" [classes] are those of the pseudo-labels
    (`running_shares`). `frozen["encoder"]` is the encoder before training, where a distance is asked for. Each
    cross-entropy is a mean over all pixels, ignored ones included. Sources: Tranheden et al. 2021 (DACS), Hoyer et al.
    2022 (DAFormer) and 2023 (MIC).
    """

    def objective(params: Tree, state: TrainState, frozen: Any, batch: Mapping[str, Any], key: Any) -> Outcome:
        source_key, classes_key, augment_key, mixed_key, hide_key, look_key, masked_key = jax.random.split(key, 7)
        statistics, shares = state.aux["statistics"], state.aux["shares"]
        student = assembled(graphdef, params, statistics, batch_statistics=True)
        image, labels = batch["source"]["image"], batch["source"]["labels"]
        pixels = normalised(image)
        logits, features = student_outputs(student, pixels, source_key)
        losses = {"source": weighted_cross_entropy(logits, labels)}
        if config.distance:
            whole = trees.unflatten(trees.flatten(params) | trees.flatten(statistics))
            network = whole | {"encoder": frozen["encoder"]}
            reference = nnx.merge(graphdef, network).encoder.stages(pixels)[-1]
            losses["distance"] = config.distance * feature_distance(features, reference, labels, classes, config.things)
        metrics = {}
        statistics = statistics_of(student)
        if "target" in batch:
            target = batch["target"]["image"]
            pseudo, confident = pseudo_labels(teacher_logits(graphdef, state, normalised(target)), config.threshold)
            weights = pseudo_weights(confident, pseudo.shape, config.ignored_rows)
            metrics["confident"] = confident.mean()
            mask = class_masks(classes_key, labels, classes, per_image=config.mix_per_image)
            ours = {"image": image, "labels": labels, "weights": jnp.ones_like(weights)}
            mix = mixed(mask, ours, {"image": target, "labels": pseudo, "weights": weights})
            look = {"strength": config.strength, "jitter": config.jitter, "blur": config.blur}
            changed = normalised(strong_augmentation(augment_key, mix["image"], **look))
            logits, _ = student_outputs(student, changed, mixed_key)
            losses["mixed"] = weighted_cross_entropy(logits, mix["labels"], mix["weights"])
            statistics = statistics_of(student)
            shares = running_shares(shares, pseudo, state.step)
            if config.masked:
                changed = normalised(strong_augmentation(look_key, target, **look))
                changed = patch_masked(hide_key, changed, patch=config.patch, ratio=config.hidden)
                logits, _ = student_outputs(student, changed, masked_key)
                losses["masked"] = config.masked * weighted_cross_entropy(logits, pseudo, weights)
        metrics |= {f"loss_{name}": loss for name, loss in losses.items()}
        return Outcome(sum(losses.values(), jnp.zeros(())), metrics, {"statistics": statistics, "shares": shares})

    return objective
