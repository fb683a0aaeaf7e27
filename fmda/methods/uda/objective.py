"""What a student learns in adaptation: the labels of the source, and the terms on the target that are asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from fmda import trees
from fmda.config import NonNegativeFloat, NonNegativeInt, PositiveFloat
from fmda.losses.features import THINGS, feature_distance
from fmda.losses.pixelwise import weighted_cross_entropy
from fmda.methods.dense import normalised
from fmda.methods.uda.self_training import SelfTrainingConfig, self_training_losses
from fmda.methods.uda.student import student_outputs
from fmda.models.module import assembled, statistics_of
from fmda.train import Objective, Outcome, TrainState
from fmda.trees import Tree


@dataclass(frozen=True)
class DistanceConfig:
    """Distance of the encoder's last map to that of the encoder before training (DAFormer).

    Attributes:
        weight: of the loss.
        things: classes whose cells are compared.
    """

    weight: PositiveFloat = 0.005
    things: tuple[NonNegativeInt, ...] = THINGS


@dataclass(frozen=True)
class LearnConfig:
    """What is learned beside the labels of the source; a term that is None is left out.

    Attributes:
        self_training: pseudo-labels of an average of earlier students, on mixed images.
        distance: to the encoder before training.
        target_labels: weight of the labels of the target, where its dataset is opened with labels.
    """

    self_training: SelfTrainingConfig | None = None
    distance: DistanceConfig | None = None
    target_labels: NonNegativeFloat = 1.0


def make_objective(graphdef: nnx.GraphDef, classes: int, learn: LearnConfig) -> Objective:
    """Returns the objective of a network with an `encoder` and a `head`.

    Batches are {"source": {"image", "labels"}, "target": {"image"}}, RGB in 0..255; without a target the source is all
    that is learned. `state.aux` is that of `initial_aux`; its running statistics are moved by source images and then
    by what the student sees of the target, save for masked images. `frozen["encoder"]` is the encoder before
    training, where a distance is asked for. Each cross-entropy is a mean over all pixels, ignored ones included.
    """

    def objective(params: Tree, state: TrainState, frozen: Any, batch: Mapping[str, Any], key: Any) -> Outcome:
        source_key, target_key, training_key = jax.random.split(key, 3)
        student = assembled(graphdef, params, state.aux["statistics"], batch_statistics=True)
        source, target = batch["source"], batch.get("target")
        pixels = normalised(source["image"])
        outputs = student_outputs(student, pixels, source_key)
        losses = {"source": weighted_cross_entropy(outputs.logits, source["labels"])}
        metrics: dict[str, Array] = {}
        aux = dict(state.aux)
        if learn.distance is not None:
            whole = trees.joined(params, state.aux["statistics"]) | {"encoder": frozen["encoder"]}
            reference = nnx.merge(graphdef, whole).encoder.stages(pixels)[-1]
            distance = feature_distance(outputs.features, reference, source["labels"], classes, learn.distance.things)
            losses["distance"] = learn.distance.weight * distance
        if target is not None and "labels" in target:
            logits = student_outputs(student, normalised(target["image"]), target_key).logits
            losses["target"] = learn.target_labels * weighted_cross_entropy(logits, target["labels"])
        aux["statistics"] = statistics_of(student)
        if target is not None and learn.self_training is not None:
            more = self_training_losses(graphdef, classes, learn.self_training, student, state, batch, training_key)
            losses |= more.losses
            metrics |= more.metrics
            aux |= more.aux
        metrics |= {f"loss_{name}": loss for name, loss in losses.items()}
        return Outcome(sum(losses.values(), jnp.zeros(())), metrics, aux)

    return objective
