"""Class-agnostic regions of an image: a grid of points, a filter by predicted IoU and stability, suppression."""

import numpy as np
from jaxtyping import Bool, Float, Int

from fmda.sam.stage import OBJECT, Embedding, Masks, Prompt, SamStage


def automatic_masks(
    stage: SamStage, embedding: Embedding, points: int, *, least_iou: float, least_stability: float, most_overlap: float
) -> Masks:
    """Returns regions, best score first: one for each point of a grid, without the unsure and the repeated ones.

    Args:
        stage, embedding: the SAM, and what it made of the image.
        points: about this many in all; the cells of the grid are nearly square.
        least_iou, least_stability: of the masks that are kept.
        most_overlap: IoU beyond which the mask of the lower score is dropped.
    """
    prompts = [Prompt(point[None], np.array([OBJECT])) for point in grid(*embedding.size, points)]
    masks = stage.decode(embedding, prompts)
    sure = (masks.iou >= least_iou) & (masks.stability >= least_stability) & masks.masks.any((1, 2))
    masks = masks.take(sure)
    return masks.take(suppressed(masks.masks, masks.score, most_overlap))


def grid(height: int, width: int, points: int) -> Float[np.ndarray, "n 2"]:
    """Returns x, y of the centres of nearly square cells, row by row."""
    columns = min(max(round((points * width / height) ** 0.5), 1), points)
    rows = max(round(points / columns), 1)
    x, y = (np.arange(columns) + 0.5) * width / columns, (np.arange(rows) + 0.5) * height / rows
    return np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)


def suppressed(
    masks: Bool[np.ndarray, "p H W"], scores: Float[np.ndarray, " p"], most_overlap: float
) -> Int[np.ndarray, " q"]:
    """Returns the places of the masks that non-maximum suppression by the IoU of masks keeps, best score first."""
    packed = np.packbits(masks.reshape(len(masks), masks.shape[1] * masks.shape[2]), axis=1)
    areas = masks.sum((1, 2))
    kept: list[int] = []
    for place in np.argsort(-scores, kind="stable"):
        shared = np.bitwise_count(packed[kept] & packed[place]).sum(1, dtype=np.int64)
        if not (shared > most_overlap * (areas[kept] + areas[place] - shared)).any():
            kept.append(int(place))
    return np.array(kept, int)
