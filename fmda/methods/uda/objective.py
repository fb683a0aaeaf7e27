"""What a student learns in adaptation: the labels of the source, and the terms on the target that are asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from fmda import trees
from fmda.config import FolderOrName, NonNegativeFloat, NonNegativeInt, PositiveFloat, Share
from fmda.losses.features import THINGS, feature_distance
from fmda.losses.pixelwise import entropy_loss
from fmda.methods.dense import normalised
from fmda.methods.uda.adversary import ADVERSARY, without_adversary
from fmda.methods.uda.dann import DannConfig, dann_loss, init_classifier
from fmda.methods.uda.entropy import EntropyConfig
from fmda.methods.uda.mmd import MmdConfig, mmd_loss
from fmda.methods.uda.output_adversarial import (
    OutputAdversarialConfig,
    auxiliary_losses,
    init_auxiliary,
    init_discriminator,
    output_adversarial_losses,
)
from fmda.methods.uda.self_training import SelfTrainingConfig, self_training_losses
from fmda.methods.uda.student import Outputs, reference_features, student_outputs
from fmda.methods.uda.style import StyleConfig, styled
from fmda.models.module import assembled, statistics_of
from fmda.train import Objective, Outcome, TrainState
from fmda.trees import Tree


@dataclass(frozen=True)
class DistanceConfig:
    """Distance of the encoder's last map to that of a frozen encoder (DAFormer).

    Attributes:
        weight: of the loss.
        things: classes whose cells are compared.
        encoder: folder or hub id of the frozen encoder, of the shape of the network's; "small" is the
            EfficientNet-Lite0 of that extra. None is the encoder that training begins with: ImageNet's in DAFormer, but
            with `network.start` one that has learned the source already.
    """

    weight: PositiveFloat = 0.005
    things: tuple[NonNegativeInt, ...] = THINGS
    encoder: FolderOrName | None = None


CLEAN = ("mmd", "dann", "output_adversarial", "entropy")
"""Terms that share one forward pass of the target images as they are."""


@dataclass(frozen=True)
class LearnConfig:
    """What is learned beside the labels of the source; a term that is None is left out.

    Attributes:
        self_training: pseudo-labels of an average of earlier students, on mixed images.
        distance: to a frozen encoder.
        mmd: discrepancy of the encoder's last maps of source and target.
        dann: confusion of source and target in the encoder's last map.
        output_adversarial: confusion of source and target in the predictions.
        entropy: of the predictions for the target.
        style: of the target, put on the source images before anything else sees them.
        target_labels: weight of the labels of the target, where its dataset is opened with labels.
        detail_weight: share of the detail's own loss in each cross-entropy of HRDA; 0 to 0.7 in its ablation.
    """

    self_training: SelfTrainingConfig | None = None
    distance: DistanceConfig | None = None
    mmd: MmdConfig | None = None
    dann: DannConfig | None = None
    output_adversarial: OutputAdversarialConfig | None = None
    entropy: EntropyConfig | None = None
    style: StyleConfig | None = None
    target_labels: NonNegativeFloat = 1.0
    detail_weight: Share = 0.1

    @property
    def of_target(self) -> tuple[str, ...]:
        """Names of the terms here that need images of the target."""
        return tuple(name for name in ("self_training", *CLEAN, "style") if getattr(self, name) is not None)


def init_adversary(learn: LearnConfig, key: Any, channels: Sequence[int], classes: int) -> Tree:
    """Returns the parameters beside those of the network: {} or {"adversary": what terms train beside it}.

    `channels` are those of the encoder's maps.
    """
    dann_key, output_key = jax.random.split(key)
    drawn = {}
    if learn.dann:
        drawn["dann"] = init_classifier(learn.dann, dann_key, channels[-1])
    if learn.output_adversarial:
        drawn["output"] = init_discriminator(learn.output_adversarial, output_key, classes)
        if learn.output_adversarial.auxiliary:
            beyond = jax.random.fold_in(output_key, 5)  # the five layers of the discriminator have 0 to 4
            drawn["auxiliary"] = init_auxiliary(learn.output_adversarial, beyond, channels[-2], classes)
    return {ADVERSARY: drawn} if drawn else {}


def make_objective(
    graphdef: nnx.GraphDef,
    classes: int,
    learn: LearnConfig,
    *,
    steps: int = 1,
    autoencoder: nnx.GraphDef | None = None,
) -> Objective:
    """Returns the objective of a network with an `encoder` and a `head`, in a run of so many steps.

    Batches are {"source": {"image", "labels"}, "target": {"image"}}, RGB in 0..255; where pseudo-labels have a border,
    the target has "margins" too (`training_transform`). Without a target the source is all that is learned.
    `state.aux` is that of `initial_aux`; its running statistics are moved by source images and then by what the student
    sees of the target, save for masked images. `frozen["encoder"]` is the frozen encoder, where a distance is asked
    for, `frozen["autoencoder"]` that of a style in latents. Each cross-entropy of classes is a mean over all
    pixels, ignored ones included.
    """

    def on_target(
        params: Tree, progress: Array, source: Outputs, target: Outputs, labels: Array, key: Any
    ) -> dict[str, Array]:
        """Returns the losses of the terms that see the target images as they are."""
        losses = {}
        if learn.mmd:
            losses["mmd"] = mmd_loss(learn.mmd, source, target, labels, key)
        if learn.dann:
            classifier = params[ADVERSARY]["dann"]
            losses["dann"] = dann_loss(learn.dann, classifier, source.features, target.features, progress)
        if learn.output_adversarial:
            config, adversary = learn.output_adversarial, params[ADVERSARY]
            losses |= output_adversarial_losses(config, adversary["output"], source.logits, target.logits)
            if config.auxiliary:
                losses |= auxiliary_losses(config, config.auxiliary, adversary["auxiliary"], source, target, labels)
        if learn.entropy:
            losses["entropy"] = learn.entropy.weight * entropy_loss(target.logits, learn.entropy.power)
        return losses

    def objective(params: Tree, state: TrainState, frozen: Any, batch: Mapping[str, Any], key: Any) -> Outcome:
        source_key, target_key, training_key, style_key, clean_key = jax.random.split(key, 5)
        own = without_adversary(params)
        student = assembled(graphdef, own, state.aux["statistics"], batch_statistics=True)
        source, target = batch["source"], batch.get("target")
        if target is not None and learn.style:
            network = None if autoencoder is None else nnx.merge(autoencoder, frozen["autoencoder"])
            image = styled(learn.style, source["image"], target["image"], style_key, network)
            source = source | {"image": image}
            batch = dict(batch) | {"source": source}
        pixels = normalised(source["image"])
        outputs = student_outputs(student, pixels, source_key, learn.detail_weight)
        losses = {"source": outputs.cross_entropy(source["labels"])}
        metrics: dict[str, Array] = {}
        aux = dict(state.aux)
        if learn.distance is not None:
            whole = trees.joined(own, state.aux["statistics"]) | {"encoder": frozen["encoder"]}
            reference = reference_features(nnx.merge(graphdef, whole), pixels)
            distance = feature_distance(outputs.features, reference, source["labels"], classes, learn.distance.things)
            losses["distance"] = learn.distance.weight * distance
        if target is not None and ("labels" in target or set(learn.of_target) & set(CLEAN)):
            clean = student_outputs(student, normalised(target["image"]), target_key, learn.detail_weight)
            if "labels" in target:
                losses["target"] = learn.target_labels * clean.cross_entropy(target["labels"])
            losses |= on_target(params, state.step / steps, outputs, clean, source["labels"], clean_key)
        aux["statistics"] = statistics_of(student)
        if target is not None and learn.self_training is not None:
            more = self_training_losses(
                graphdef, classes, learn.self_training, student, state, batch, training_key, learn.detail_weight
            )
            losses |= more.losses
            metrics |= more.metrics
            aux |= more.aux
        metrics |= {f"loss_{name}": loss for name, loss in losses.items()}
        return Outcome(sum(losses.values(), jnp.zeros(())), metrics, aux)

    return objective
