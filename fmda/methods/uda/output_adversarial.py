"""Confusion of domains in the predictions as a term of adaptation."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fmda.config import PositiveFloat, PositiveInt
from fmda.losses.pixelwise import weighted_cross_entropy
from fmda.methods.uda.adversary import SOURCE, TARGET, domain_cross_entropy, domain_logits, init_layers
from fmda.methods.uda.student import Outputs
from fmda.models.deeplab_v2 import DeepLabV2Head
from fmda.models.module import Make, abstract, init
from fmda.nn.resize import resize
from fmda.trees import Tree

LEAST_CROP = 32
"""Side of the smallest images that the discriminator takes."""


@dataclass(frozen=True)
class AuxiliaryConfig:
    """A second classifier, DeepLabV2's head on the encoder's map before the last, and a discriminator of what it says.

    Attributes:
        weight: of the student's loss against that discriminator.
        segmentation: weight of the classifier's cross-entropy on the source.
    """

    weight: PositiveFloat = 0.0002
    segmentation: PositiveFloat = 0.1


@dataclass(frozen=True)
class OutputAdversarialConfig:
    """A discriminator of maps of class probabilities (Tsai et al. 2018, AdaptSegNet).

    The original trains it by Adam with a rate of 1e-4 and b2 = 0.99, and the segmentation network by SGD with 2.5e-4.

    Attributes:
        weight: of the student's loss; 0.001 with cross-entropy, 0.01 with squares.
        loss: "cross_entropy" or "squares" (LS-GAN).
        width: channels of the first layer.
        auxiliary: the second of the original's two levels; None is the form with a single one.
    """

    weight: PositiveFloat = 0.001
    loss: Literal["cross_entropy", "squares"] = "cross_entropy"
    width: PositiveInt = 64
    auxiliary: AuxiliaryConfig | None = None


def init_discriminator(config: OutputAdversarialConfig, key: Any, classes: int) -> Tree:
    """Returns the parameters of five convolutions 4x4."""
    return init_layers(key, 4, (classes, *(config.width * 2**i for i in range(4)), 1))


def init_auxiliary(config: OutputAdversarialConfig, key: Any, channels: int, classes: int) -> Tree:
    """Returns the parameters of the auxiliary "classifier" of a map with so many channels, and "discriminator"."""
    first, second = jax.random.split(key)
    return {
        "classifier": init(_classifier(channels, classes), first),
        "discriminator": init_discriminator(config, second, classes),
    }


def output_adversarial_losses(
    config: OutputAdversarialConfig,
    params: Tree,
    source: Float[Array, "b H W k"],
    target: Float[Array, "b H W k"],
) -> dict[str, Array]:
    """Returns the weighted loss of the student, and that of the discriminator, for the student's logits.

    The first is that of taking the target for the source, and gives the discriminator no gradient. The second gives
    the student none.
    """
    fixed = jax.lax.stop_gradient
    source, target = (jax.nn.softmax(logits.astype(jnp.float32)) for logits in (source, target))
    loss = _LOSSES[config.loss]

    def judged(params: Tree, maps: Array, domain: float) -> Array:
        return loss(domain_logits(params, maps, stride=2, padding=1), domain)

    own = (judged(params, fixed(source), SOURCE) + judged(params, fixed(target), TARGET)) / 2
    return {"adversarial": config.weight * judged(fixed(params), target, SOURCE), "discriminator": own}


def auxiliary_losses(
    config: OutputAdversarialConfig,
    auxiliary: AuxiliaryConfig,
    params: Tree,
    source: Outputs,
    target: Outputs,
    labels: Int[Array, "b H W"],
) -> dict[str, Array]:
    """Returns the losses of the auxiliary level: `output_adversarial_losses` there, and of its classifier.

    The latter is its weighted cross-entropy for the `labels` of the source. All names begin with "auxiliary".
    """
    _, height, width, classes = source.logits.shape
    graphdef, _ = abstract(_classifier(source.maps[-2].shape[-1], classes))
    head = nnx.merge(graphdef, params["classifier"])
    logits = [resize(head(outputs.maps[:-1]), (height, width)) for outputs in (source, target)]
    own = replace(config, weight=auxiliary.weight)
    losses = output_adversarial_losses(own, params["discriminator"], *logits)
    segmentation = auxiliary.segmentation * weighted_cross_entropy(logits[0], labels)
    return {"auxiliary": segmentation} | {f"auxiliary_{name}": loss for name, loss in losses.items()}


def _classifier(channels: int, classes: int) -> Make:
    return lambda rngs: DeepLabV2Head(channels, classes, (6, 12), rngs=rngs)


def _squares(scores: Float[Array, "..."], domain: float) -> Float[Array, ""]:
    return jnp.square(scores - domain).mean()


_LOSSES: dict[str, Callable[[Array, float], Array]] = {"cross_entropy": domain_cross_entropy, "squares": _squares}
