"""Discrepancy of features as a term of adaptation."""

from dataclasses import dataclass
from typing import Annotated, Any

import jax
from jaxtyping import Array, Float

from fmda.config import Bounds, PositiveFloat
from fmda.losses.features import mmd
from fmda.nn.norm import unit


@dataclass(frozen=True)
class MmdConfig:
    """Maximum mean discrepancy of the encoder's last maps of source and target.

    Attributes:
        weight: of the loss.
        vectors: drawn from the maps of each domain at each step; all where there are fewer.
    """

    weight: PositiveFloat = 0.1
    vectors: Annotated[int, Bounds(2)] = 256


def mmd_loss(
    config: MmdConfig, source: Float[Array, "b h w c"], target: Float[Array, "b h w c"], key: Any
) -> Float[Array, ""]:
    """Returns the weighted discrepancy of random vectors of two maps, each of unit length."""

    def drawn(key: Any, features: Array) -> Array:
        rows = features.reshape(-1, features.shape[-1])
        chosen = jax.random.choice(key, len(rows), (min(config.vectors, len(rows)),), replace=False)
        return unit(rows[chosen])

    source_key, target_key = jax.random.split(key)
    return config.weight * mmd(drawn(source_key, source), drawn(target_key, target))
