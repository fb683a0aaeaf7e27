"""Confusion of domains in the predictions as a term of adaptation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmda.config import PositiveFloat, PositiveInt
from fmda.methods.uda.adversary import SOURCE, TARGET, domain_cross_entropy, domain_logits, init_layers
from fmda.trees import Tree

LEAST_CROP = 32
"""Side of the smallest images that the discriminator takes."""


@dataclass(frozen=True)
class OutputAdversarialConfig:
    """A discriminator of maps of class probabilities (Tsai et al. 2018, AdaptSegNet, with a single level).

    The second level of the original sees an auxiliary classifier of an earlier stage, which no network here has.
    The original trains it by Adam with a rate of 1e-4 and b2 = 0.99, and the segmentation network by SGD with 2.5e-4.

    Attributes:
        weight: of the student's loss; 0.001 with cross-entropy, 0.01 with squares.
        loss: "cross_entropy" or "squares" (LS-GAN).
        width: channels of the first layer.
    """

    weight: PositiveFloat = 0.001
    loss: Literal["cross_entropy", "squares"] = "cross_entropy"
    width: PositiveInt = 64


def init_discriminator(config: OutputAdversarialConfig, key: Any, classes: int) -> Tree:
    """Returns the parameters of five convolutions 4x4."""
    return init_layers(key, 4, (classes, *(config.width * 2**i for i in range(4)), 1))


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


def _squares(scores: Float[Array, "..."], domain: float) -> Float[Array, ""]:
    return jnp.square(scores - domain).mean()


_LOSSES: dict[str, Callable[[Array, float], Array]] = {"cross_entropy": domain_cross_entropy, "squares": _squares}
