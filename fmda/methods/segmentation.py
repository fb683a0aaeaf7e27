"""Segmentation networks as their checkpoints hold them: their class lists, and segmenters that no method trained."""

import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from fmda.data import ClassList, class_list
from fmda.data.classes import known_class_lists
from fmda.errors import UserError
from fmda.evaluate import Predictor, Protocol, Segmenter
from fmda.evaluate.protocol import WHOLE_IMAGE
from fmda.evaluate.segmenter import checkpoint_name
from fmda.methods.dense import normalised
from fmda.trees import Tree
from fmda.weights.checkpoint import weight_fingerprint, weights_and_config
from fmda.weights.files import read_json
from fmda.weights.load import load_segmentation
from fmda.weights.network import CLASSES_FILE, Loaded
from fmda.weights.registry import FAMILIES

COMMON = {19: "cityscapes"}
"""{number of classes: the list that is meant where a checkpoint names none}."""


def open_segmentation(source: str | Path, *, masks: bool = False) -> tuple[Loaded, ClassList]:
    """Returns a segmentation network and the classes of its logits; `masks` as in `load_segmentation`.

    Logits that stand for no class (ESPNetv2's background) are left out. The classes are those of `classes.yaml` in the
    folder, else those that config.json names, else Cityscapes' where there are 19. Raises UserError as
    `load_segmentation`, and where the classes are not known.
    """
    network = load_segmentation(source, masks=masks)
    config, params = FAMILIES[network.family].without_unused(network.config, network.params)
    return replace(network, config=config, params=params), _classes(source, network.folder, config.classes)


def load_segmenter(source: str | Path, protocol: Protocol = WHOLE_IMAGE) -> Segmenter:
    """Returns the segmenter of a checkpoint, which sees images as `protocol` says.

    Sides are rounded to what the network needs. Raises UserError as `open_segmentation`.
    """
    network, classes = open_segmentation(source, masks=True)
    protocol = fitting(protocol, network.family)
    scores = partial(mask_scores if FAMILIES[network.family].masks else dense_scores, network.graphdef)
    name = checkpoint_name(Path(source).expanduser())
    fingerprint = weight_fingerprint(network.params, network.config, classes.names, protocol)
    return Segmenter(Predictor(scores, network.params, protocol), classes, name, fingerprint, protocol)


def dense_scores(graphdef: nnx.GraphDef, tree: Tree, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b h w k"]:
    """Returns a network's logits of RGB in 0..255."""
    return nnx.merge(graphdef, tree)(normalised(pixels))


def mask_scores(graphdef: nnx.GraphDef, tree: Tree, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b H W k"]:
    """Returns the class scores, like logits, of a network of queries for RGB in 0..255."""
    network = nnx.merge(graphdef, tree)
    return network.scores(normalised(pixels, *network.config.image))


def fitting(protocol: Protocol, family: str) -> Protocol:
    """Returns the protocol with the sides of images rounded to what networks of a family need."""
    return replace(protocol, multiple=math.lcm(protocol.multiple, FAMILIES[family].multiple))


def _classes(source: str | Path, folder: Path | None, count: int) -> ClassList:
    """Returns the classes of so many logits of a checkpoint."""
    assert folder is not None  # of a checkpoint that was just opened
    beside, file = folder / CLASSES_FILE, Path(source).expanduser()
    if beside.is_file():
        listed = ClassList.load(beside)
        if len(listed) != count:
            raise UserError(f"{beside}: lists {len(listed)} classes, and the network has {count}; list these")
        return listed
    path = weights_and_config(folder, file if file.is_file() else None)[1]
    names = _stored_names(read_json(path) if path.is_file() else {})[:count]
    for known in map(class_list, known_class_lists()):
        if known.names == names:
            return known
    if len(names) == count:
        return ClassList(names, where=str(path))
    if count not in COMMON:
        raise UserError(
            f"{source}: has {count} classes and does not name them; write their names in the order of the logits to "
            f"{beside}, under `classes:`"
        )
    return class_list(COMMON[count])


def _stored_names(config: dict[str, Any]) -> tuple[str, ...]:
    """Returns the names of classes in a configuration; () where it has none, or transformers' placeholders."""
    labels = config.get("id2label")
    names = list(labels.values()) if isinstance(labels, dict) else config.get("classes")
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        return ()
    return () if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else tuple(names)
