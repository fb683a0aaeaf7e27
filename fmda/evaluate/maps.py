"""Bringing predictions and labels of different class lists to one list before they are compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from fmda.data import ClassList, ClassMap
from fmda.errors import UserError

Maps = ClassMap | str | Path | None


@dataclass(frozen=True)
class Common:
    """How to compare two class lists.

    Attributes:
        classes: the list that is scored.
        predictions: maps applied to predictions, in order.
        labels: maps applied to labels, in order.
    """

    classes: ClassList
    predictions: tuple[ClassMap, ...] = ()
    labels: tuple[ClassMap, ...] = ()

    def map_predictions(self, values: UInt8[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W"]:
        """Returns predictions in the common list; 255 where a class has no counterpart."""
        return _apply(self.predictions, values)

    def map_labels(self, values: UInt8[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W"]:
        """Returns labels in the common list; 255 where a class has no counterpart."""
        return _apply(self.labels, values)


def common_list(predicted: ClassList, labelled: ClassList, maps: Maps | Sequence[Maps] = None) -> Common:
    """Returns the maps that bring predictions and labels to one class list.

    Each map goes to the side whose list it starts from: a map from the model's list merges predictions, one from the
    dataset's list merges labels, and one from a list that both share merges both. Maps are many to one.

    Args:
        predicted: the model's classes.
        labelled: the dataset's classes.
        maps: one map, several in order of use, or None when the lists are equal; a map may be given by its known name
            or YAML file.

    Raises:
        UserError: a map fits neither side, or the lists still differ after the maps.
    """
    ours, theirs = predicted, labelled
    on_predictions: list[ClassMap] = []
    on_labels: list[ClassMap] = []
    for entry in [maps] if maps is None or isinstance(maps, ClassMap | str | Path) else maps:
        if entry is None:
            continue
        step = entry if isinstance(entry, ClassMap) else ClassMap.load(entry)
        fits_ours, fits_theirs = same_classes(step.source, ours), same_classes(step.source, theirs)
        if not fits_ours and not fits_theirs:
            raise UserError(
                f"class map {_name(entry)}: starts from {_brief(step.source)}, which is neither the model's list "
                f"({_brief(ours)}) nor the dataset's ({_brief(theirs)}); choose another map"
            )
        if fits_ours:
            on_predictions.append(step)
            ours = step.target
        if fits_theirs:
            on_labels.append(step)
            theirs = step.target
    if not same_classes(ours, theirs):
        raise UserError(
            f"classes: predictions have {_brief(ours)}, labels {_brief(theirs)}; give a class map between them"
        )
    return Common(theirs, tuple(on_predictions), tuple(on_labels))


def same_classes(one: ClassList, other: ClassList) -> bool:
    """Returns whether two lists name the same classes in the same order."""
    return tuple(one.names) == tuple(other.names)


def _apply(maps: Sequence[ClassMap], values: np.ndarray) -> np.ndarray:
    for step in maps:
        values = step.apply(values)
    return values


def _brief(classes: ClassList) -> str:
    return f"{len(classes.names)} classes {classes.names[0]}..{classes.names[-1]}"


def _name(class_map: ClassMap | str | Path) -> str:
    return str(class_map) if isinstance(class_map, str | Path) else "given"
