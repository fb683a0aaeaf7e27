"""Confusion of domains in the features as a term of adaptation."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float

from fmda.config import PositiveFloat, PositiveInt
from fmda.losses.features import reversal_scale, reverse_gradient
from fmda.methods.uda.adversary import SOURCE, TARGET, domain_cross_entropy, domain_logits, init_layers
from fmda.trees import Tree


@dataclass(frozen=True)
class DannConfig:
    """A domain classifier on each cell of the encoder's last map, behind reversed gradients (Ganin et al. 2016, DANN).

    Attributes:
        weight: of the reversed gradient, besides a scale that rises from 0 to 1 during training. The classifier itself
            learns with weight 1.
        width: channels of its two hidden layers.
    """

    weight: PositiveFloat = 0.01
    width: PositiveInt = 256


def init_classifier(config: DannConfig, key: Any, channels: int) -> Tree:
    """Returns the parameters of the classifier of maps with so many channels."""
    return init_layers(key, 1, (channels, config.width, config.width, 1))


def dann_loss(
    config: DannConfig,
    params: Tree,
    source: Float[Array, "b h w c"],
    target: Float[Array, "b h w c"],
    progress: Float[Array, ""],
) -> Float[Array, ""]:
    """Returns the classifier's cross-entropy, the mean over both domains; `progress` is the share of the steps done."""
    scale = config.weight * reversal_scale(progress)

    def loss(features: Array, domain: float) -> Array:
        return domain_cross_entropy(domain_logits(params, reverse_gradient(features, scale), 1, 0), domain)

    return (loss(source, SOURCE) + loss(target, TARGET)) / 2
