"""Predictions and labels of different class lists are brought to one list before they are compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from fmda.data import ClassList, ClassMap
from fmda.errors import UserError

Map = ClassMap | str | Path
"""A class map, its known name, or its YAML file."""


@dataclass(frozen=True)
class Common:
    """How to compare two class lists.

    Attributes:
        classes: the list that is scored.
        predictions, labels: class in `classes` of each predicted and labelled value; 255 where there is none.
    """

    classes: ClassList
    predictions: UInt8[np.ndarray, " 256"]
    labels: UInt8[np.ndarray, " 256"]


def as_maps(maps: Map | Sequence[Map] | None) -> list[Map]:
    """Returns the maps as a list."""
    if maps is None:
        return []
    return [maps] if isinstance(maps, Map) else list(maps)


def common_list(predicted: ClassList, labelled: ClassList, maps: Map | Sequence[Map] | None = None) -> Common:
    """Returns the maps that bring predictions and labels to one class list.

    A map from the model's list applies to predictions, one from the dataset's list to labels, and one from a list that
    both share to both. Maps are many to one.

    Args:
        predicted: the model's classes.
        labelled: the dataset's classes.
        maps: one map, several in order of use, or None when the lists are equal.

    Raises:
        UserError: a map fits neither side, or the lists still differ after the maps.
    """
    classes, tables = [predicted, labelled], [np.arange(256, dtype=np.uint8)] * 2
    for entry in as_maps(maps):
        step = ClassMap.load(entry)
        sides = [side for side in (0, 1) if step.source.names == classes[side].names]
        if not sides:
            raise UserError(
                f"class map {entry}: starts from {_brief(step.source)}, which is neither the model's list "
                f"({_brief(classes[0])}) nor the dataset's ({_brief(classes[1])}); choose another map"
            )
        for side in sides:
            classes[side], tables[side] = step.target, step.apply(tables[side])
    if classes[0].names != classes[1].names:
        raise UserError(
            f"classes: predictions have {_brief(classes[0])}, labels {_brief(classes[1])}; give a class map for them"
        )
    return Common(classes[1], *tables)


def _brief(classes: ClassList) -> str:
    return f"{len(classes.names)} classes {classes.names[0]}..{classes.names[-1]}"
