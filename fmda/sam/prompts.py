"""Prompts from a label map: connected components of its classes, points inside and beside them, boxes."""

from collections.abc import Collection
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, UInt8

from fmda.data import IGNORE
from fmda.sam.stage import BACKGROUND, OBJECT, Prompt

MOST = 256
"""Components of an image that become prompts at most, the largest ones."""


@dataclass(frozen=True, eq=False)
class Component:
    """Connected pixels of one class.

    Attributes:
        label: the class.
        mask: of the image's size.
        area: pixels.
        box: left, top, right, bottom; the last two lie beyond the last pixel.
    """

    label: int
    mask: Bool[np.ndarray, "H W"]
    area: int
    box: tuple[int, int, int, int]


def components(
    label_map: UInt8[np.ndarray, "H W"], least: float, only: Collection[int] | None = None, most: int = MOST
) -> list[Component]:
    """Returns the 4-connected components with more than `least` pixels, by class, then by place.

    Of more than `most`, the largest are kept. Pixels of no class (255) are in none. `only` names the classes.
    """
    places = []
    for label in np.unique(label_map):
        if label == IGNORE or only is not None and label not in only:
            continue
        of_class = (label_map == label).astype(np.uint8)
        _, numbers, facts, _ = cv2.connectedComponentsWithStats(of_class, connectivity=4)
        large = np.flatnonzero(facts[:, cv2.CC_STAT_AREA] > least)
        places += [(int(label), numbers, int(k), facts[k].tolist()) for k in large if k > 0]
    largest = sorted(places, key=lambda place: -place[3][cv2.CC_STAT_AREA])[:most]
    ordered = sorted(largest, key=lambda place: (place[0], place[2]))
    return [
        Component(label, numbers == k, area, (left, top, left + width, top + height))
        for label, numbers, k, (left, top, width, height, area) in ordered
    ]


def random_points(component: Component, count: int, rng: np.random.Generator) -> Prompt | None:
    """Returns `count` different pixels of a component, uniformly drawn; None where it has fewer."""
    rows, columns = np.nonzero(component.mask)
    if len(rows) < count:
        return None
    chosen = rng.choice(len(rows), count, replace=False)
    return Prompt(np.stack([columns[chosen], rows[chosen]], 1), np.full(count, OBJECT))


def box_and_points(
    component: Component, label_map: UInt8[np.ndarray, "H W"], negatives: int = 2, margin: float = 0.1
) -> Prompt:
    """Returns the box of a component, its innermost pixel, and pixels of other classes beside it as negative points.

    Negatives are the innermost pixels of the other classes' parts of the box, larger by `margin` of its sides on each
    side; the largest parts come first.
    """
    left, top, right, bottom = component.box
    height, width = label_map.shape
    across, along = round((right - left) * margin) + 1, round((bottom - top) * margin) + 1
    x0, y0, x1, y1 = max(left - across, 0), max(top - along, 0), min(right + across, width), min(bottom + along, height)
    near = label_map[y0:y1, x0:x1]
    points, labels = [_innermost(component.mask[y0:y1, x0:x1])], [OBJECT]
    others, counts = np.unique(near[(near != component.label) & (near != IGNORE)], return_counts=True)
    for other in others[np.argsort(-counts, kind="stable")][:negatives]:
        points.append(_innermost(near == other))
        labels.append(BACKGROUND)
    return Prompt(np.array(points) + (x0, y0), np.array(labels), (left, top, right - 1, bottom - 1))


def _innermost(mask: Bool[np.ndarray, "h w"]) -> tuple[int, int]:
    """Returns x and y of the pixel that is farthest from the pixels outside, also those beyond the border."""
    distance = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 3)
    row, column = divmod(int(distance.argmax()), distance.shape[1])
    return column - 1, row - 1
