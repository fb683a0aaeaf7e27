"""From the teacher's label map to the labels of a generated image: the SAM stage, or the map as it is."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from fmda.data import IGNORE
from fmda.sam import Improved, Refined, Roles, SamStage, refine


@dataclass(frozen=True)
class Refinement:
    """What refines label maps; without a `stage` nothing does.

    Attributes:
        stage: the SAM.
        roles: of the classes, for the votes.
        settings: of the votes; None is the algorithm of the paper, with five random points in each large component.
    """

    stage: SamStage | None
    roles: Roles
    settings: Improved | None

    def refined(self, image: UInt8[np.ndarray, "H W 3"], label_map: UInt8[np.ndarray, "H W"]) -> Refined | None:
        """Returns what SAM makes of a label map; None without a SAM."""
        return None if self.stage is None else refine(self.stage, image, label_map, self.roles, self.settings)

    def labels(
        self, image: UInt8[np.ndarray, "H W 3"], label_map: UInt8[np.ndarray, "H W"]
    ) -> UInt8[np.ndarray, "H W"]:
        """Returns the labels of an image, 255 for none.

        Where votes refuse every region, the map stays as it is: an image without labels would teach that it holds no
        object. The algorithm of the paper leaves it empty.
        """
        result = self.refined(image, label_map)
        if result is None or self.settings is not None and (result.labels == IGNORE).all():
            return label_map
        return result.labels
