"""Entropy of the student's predictions for the target as a term of adaptation."""

from dataclasses import dataclass

from fmda.config import NonNegativeFloat, PositiveFloat


@dataclass(frozen=True)
class EntropyConfig:
    """Mean over pixels of (entropy / log k) ** power; the defaults are MinEnt's (Vu et al. 2019, ADVENT).

    The robust entropy of FDA (Yang and Soatto 2020) has a power of 4 and a weight of 0.005.

    Attributes:
        weight: of the loss; at 0 the target moves the statistics of BatchNorm alone (Li et al. 2016, AdaBN).
        power: of the entropy of a pixel, which is between 0 and 1.
    """

    weight: NonNegativeFloat = 0.001
    power: PositiveFloat = 1.0
