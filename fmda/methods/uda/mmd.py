"""Discrepancy of features as a term of adaptation."""

from dataclasses import dataclass
from typing import Annotated, Any

import jax
from jaxtyping import Array, Float, Int

from fmda.config import Bounds, PositiveFloat, Share
from fmda.losses.features import class_mmd, coarse_labels, mmd
from fmda.losses.pixelwise import confident_labels
from fmda.methods.uda.student import Outputs
from fmda.nn.norm import unit


@dataclass(frozen=True)
class MmdConfig:
    """Maximum mean discrepancy of the encoder's last maps of source and target.

    Attributes:
        weight: of the loss.
        vectors: drawn from the maps of each domain at each step; all where there are fewer.
        per_class: compare source and target class by class. The class of a vector is the `coarse_labels` of its cell:
            of the labels in the source, of the student's confident predictions in the target.
        threshold: probability from which a prediction counts as confident.
    """

    weight: PositiveFloat = 0.1
    vectors: Annotated[int, Bounds(2)] = 256
    per_class: bool = False
    threshold: Share = 0.968


def mmd_loss(
    config: MmdConfig, source: Outputs, target: Outputs, labels: Int[Array, "b H W"], key: Any
) -> Float[Array, ""]:
    """Returns the weighted discrepancy of random vectors of two maps, each of unit length; `labels` are the source's.

    Per class it is the mean over the classes that at least two vectors of each domain show.
    """
    classes = source.logits.shape[-1]

    def drawn(key: Any, features: Array, labels: Array) -> tuple[Array, Array]:
        _, h, w, channels = features.shape
        rows, cells = features.reshape(-1, channels), coarse_labels(labels, (h, w), classes).reshape(-1)
        chosen = jax.random.choice(key, len(rows), (min(config.vectors, len(rows)),), replace=False)
        return unit(rows[chosen]), cells[chosen]

    source_key, target_key = jax.random.split(key)
    x, x_classes = drawn(source_key, source.features, labels)
    y, y_classes = drawn(target_key, target.features, confident_labels(target.logits, config.threshold))
    return config.weight * (class_mmd(x, y, x_classes, y_classes, classes) if config.per_class else mmd(x, y))
