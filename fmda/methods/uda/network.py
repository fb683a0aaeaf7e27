"""The segmentation network that is adapted: a new one around a trained encoder, or a trained one as it is."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fmda import trees
from fmda.config import FolderOrName, Share
from fmda.errors import UserError
from fmda.methods.dense import known_encoder
from fmda.methods.segmentation import dense_scores, open_segmentation
from fmda.models.daformer import DaFormerConfig
from fmda.models.deeplab_v2 import DeepLabV2Config
from fmda.models.dinov2_segmenter import Dinov2SegmenterConfig
from fmda.models.hrda import HrdaConfig
from fmda.models.lite_segmenter import LiteSegmenterConfig
from fmda.models.module import init, separated, with_blocks
from fmda.models.segformer import SegFormerConfig
from fmda.trees import Tree
from fmda.weights.checkpoint import network_graph, weight_fingerprint
from fmda.weights.load import load_dinov2, load_efficientnet_lite, load_mit, load_resnet
from fmda.weights.network import Loaded
from fmda.weights.registry import FAMILIES

NEW: Mapping[str, tuple[type[Any], Callable[..., Any]]] = {
    "segformer": (SegFormerConfig, load_mit),
    "daformer": (DaFormerConfig, load_mit),
    "hrda": (HrdaConfig, load_mit),
    "deeplab_v2": (DeepLabV2Config, load_resnet),
    "lite_segmenter": (LiteSegmenterConfig, load_efficientnet_lite),
    "dinov2_segmenter": (Dinov2SegmenterConfig, load_dinov2),
}
"""Family -> its configuration, and what loads its encoder."""
PACKAGED = "small"
"""Name of the encoder that the extra `small` brings."""


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The network and where its weights come from: an `encoder` for a new one, or a whole `start`.

    Attributes:
        family: of a new network, whose head is drawn at random.
        encoder: folder or hub id of its encoder: a Mix Transformer, for `deeplab_v2` a ResNet, for `lite_segmenter` an
            EfficientNet-Lite0, for `dinov2_segmenter` a DINOv2. None is the EfficientNet-Lite0 of the installed extra
            `small`.
        start: folder or hub id of a whole segmentation network to go on from, such as a run's `export`; its family
            counts then.
        new_head: draw the head of `start` anew, as where it has other classes.
        head: of a new `dinov2_segmenter`: "linear" on the encoder's last map, or "daformer" on four, as None is.
            `optim.multipliers` with `"encoder/*": 0` leaves the encoder as it is, so that the head alone learns.
        fixed_attention: of a new `hrda`: share of its detail, see `HrdaConfig`.
        remat: compute the blocks of a Mix Transformer or DINOv2 again for the backward pass, which saves memory.
        scan: run these blocks in loops, which compile one block for all of a stage; each step copies their weights.
    """

    family: Literal["segformer", "daformer", "hrda", "deeplab_v2", "lite_segmenter", "dinov2_segmenter"] = "daformer"
    encoder: FolderOrName | None = None
    start: FolderOrName | None = None
    new_head: bool = False
    head: Literal["linear", "daformer"] | None = None
    fixed_attention: Share | None = None
    remat: bool = False
    scan: bool = False


class Network:
    """A network before training.

    Attributes:
        family, config, graphdef: what it is.
        weights: arrays to start from; what is missing is drawn.

    Raises UserError for a `start` with other classes, unless its head is drawn anew, and for settings that the network
    does not have.
    """

    def __init__(self, config: NetworkConfig, classes: int, *, sizes: bool = False) -> None:
        """Opens the network; with `sizes` an encoder of the catalogue that is not here has shapes for arrays."""
        self._sizes = sizes
        if config.fixed_attention is not None and (config.start is not None or config.family != "hrda"):
            raise UserError("network.fixed_attention: is of a new network of family 'hrda'; set it to null")
        if config.head is not None and (config.start is not None or config.family != "dinov2_segmenter"):
            raise UserError("network.head: is of a new network of family 'dinov2_segmenter'; set it to null")
        if config.start is not None:
            loaded, _ = open_segmentation(network_folder(str(config.start)))
            if loaded.config.classes != classes and not config.new_head:
                raise UserError(
                    f"network.start: {config.start} has {loaded.config.classes} classes, the source {classes}; "
                    "set network.new_head=true to draw its head anew"
                )
            self.family, self.config = loaded.family, replace(loaded.config, classes=classes)
            whole = loaded.params
            self.weights = {"encoder": whole["encoder"]} if config.new_head else whole
        else:
            if config.encoder is None and config.family != "lite_segmenter":
                raise UserError(f"network.encoder: '{config.family}' needs one; name its folder or hub id")
            loaded, shape = self._encoder(config.family, config.encoder), NEW[config.family][0]
            # ImageNet's classifier is left out
            encoder = replace(loaded.config, classes=0) if hasattr(loaded.config, "classes") else loaded.config
            self.family, self.config = config.family, shape(encoder=encoder, classes=classes)
            if config.fixed_attention is not None:
                self.config = replace(self.config, fixed_attention=config.fixed_attention)
            if config.head is not None:
                self.config = replace(self.config, head=config.head)
            wanted = network_graph(self.family, self.config)[1]["encoder"]
            self.weights = {"encoder": {name: part for name, part in loaded.params.items() if name in wanted}}
        self.graphdef, self.shapes = network_graph(self.family, self.config)
        if config.remat or config.scan:
            try:
                self.graphdef = with_blocks(self.graphdef, self.shapes, remat=config.remat, scan=config.scan)
            except ValueError:
                name, end = ("remat", "compute again") if config.remat else ("scan", "run in a loop")
                raise UserError(f"network.{name}: '{self.family}' has no blocks to {end}") from None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the arrays to start from."""
        return weight_fingerprint(self.weights, self.config)

    def parts(self, tree: Tree) -> tuple[Tree, Tree]:
        """Returns (parameters, running statistics) of a tree of this network, which may lack some leaves."""
        names = [set(trees.flatten(part)) for part in separated(self.graphdef, self.shapes)]
        flat = trees.flatten(tree)
        params, statistics = ({path: flat[path] for path in flat if path in part} for part in names)
        return trees.unflatten(params), trees.unflatten(statistics)

    def init(self, key: Any) -> Tree:
        """Returns newly drawn parameters."""
        build = FAMILIES[self.family].build
        return separated(self.graphdef, init(lambda rngs: build(self.config, dtype=np.float32, rngs=rngs), key))[0]

    def frozen_encoder(self, source: str | None) -> Tree:
        """Returns an encoder's weights, by folder, hub id or `PACKAGED`; of None those that training begins with.

        Raises UserError for another shape than the network's.
        """
        if source is None:
            return self.weights["encoder"]
        if self.family not in NEW:
            raise UserError(f"learn.distance.encoder: '{self.family}' has no encoder of its own to load; leave it out")
        packaged = self.family == "lite_segmenter" and source == PACKAGED
        loaded, wanted = self._encoder(self.family, None if packaged else source), self.shapes["encoder"]
        tree = {name: part for name, part in loaded.params.items() if name in wanted}
        if jax.tree.map(jnp.shape, tree) != jax.tree.map(jnp.shape, wanted):
            raise UserError(
                f"learn.distance.encoder: {source} is of another size than the network's; name one of its own"
            )
        return tree

    def _encoder(self, family: str, source: str | None) -> Loaded:
        return self._sizes and known_encoder(source) or NEW[family][1](source)

    def statistics(self) -> Tree:
        """Returns the running statistics before training: those of the weights, elsewhere mean 0 and variance 1."""
        blank = {
            path: (jnp.ones if path.endswith("var") else jnp.zeros)(leaf.shape, leaf.dtype)
            for path, leaf in trees.flatten(separated(self.graphdef, self.shapes)[1]).items()
        }
        return trees.joined(trees.unflatten(blank), self.parts(self.weights)[1])

    def channels(self, crop: int) -> tuple[int, ...]:
        """Returns the channels of each of the encoder's maps of images of such a side."""
        image = jax.ShapeDtypeStruct((1, crop, crop, 3), jnp.float32)
        maps = jax.eval_shape(lambda tree, x: nnx.merge(self.graphdef, tree).encoder.stages(x), self.shapes, image)
        return tuple(one.shape[-1] for one in maps)

    def scores(self, tree: Tree, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b h w k"]:
        """Returns logits of RGB in 0..255; `tree` is the whole tree."""
        return dense_scores(self.graphdef, tree, pixels)


NETWORK = "network"
"""Folder of the network in a run's export."""


def network_folder(source: str) -> str:
    """Returns the folder of the network in a run's export, or `source` itself."""
    inner = Path(source).expanduser() / NETWORK
    return str(inner) if inner.is_dir() else source
