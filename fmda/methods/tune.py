"""Encoders that are trained together with the head on them: by low-rank adapters, or by their own weights."""

import copy
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fmda import trees
from fmda.config import PositiveFloat, PositiveInt
from fmda.errors import UserError
from fmda.methods.dense import DenseNetwork, Encoder
from fmda.methods.lora import init_adapters, merged, minor_adapters
from fmda.methods.mask_head import MaskNetwork
from fmda.trees import Tree

Net = TypeVar("Net", bound=DenseNetwork | MaskNetwork)

ADAPTED = tuple(
    f"blocks/*/{name}/kernel"
    for name in ("attention/query", "attention/key", "attention/value", "attention/out", "up", "down", "gate")
)
"""Kernels that get adapters: attention and MLP of a transformer's blocks, the MLP of a ConvNeXt's."""

STATISTICS = ("*/mean", "*/var")
"""Leaves of batch normalisation that are no parameters."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """What of an encoder is trained.

    Attributes:
        method: low-rank adapters of attention and MLP, which begin at zero ("lora", Hu et al. 2022) or as the part of
            each kernel that belongs to its smallest singular values ("minor-lora", Yun et al. 2025, SoMA), or the
            parameters themselves ("weights").
        blocks: that change, counted from the last one; None is all.
        rank: of an adapter.
        alpha: an adapter is multiplied by alpha / rank.
    """

    method: Literal["lora", "minor-lora", "weights"] = "minor-lora"
    blocks: PositiveInt | None = None
    rank: PositiveInt = 16
    alpha: PositiveFloat = 16.0


class TunedNetwork:
    """A network whose encoder is trained too, under the methods of one whose encoder is frozen.

    Its "head" holds what is trained: the parameters of the head and, as "encoder", adapters or weights of the encoder.
    Raises UserError for an encoder without the layers or blocks that `config` names.
    """

    def __init__(self, network: DenseNetwork | MaskNetwork, config: TuneConfig) -> None:
        self._network, self._config, self._scale = network, config, config.alpha / config.rank
        self._changed = changed_part(network.encoder.params, config)

    @functools.cached_property
    def start(self) -> Tree:
        """What of the encoder's training does not begin as `init` draws it."""
        if self._config.method == "lora":
            return {}
        if not _known(self._changed):
            return self._shapes
        if self._config.method == "minor-lora":
            return minor_adapters(self._changed, self._config.rank, self._scale, ADAPTED)
        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), self._changed)

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The encoder with what stays frozen as its parameters."""
        encoder = copy.copy(self._network.encoder)
        if self._config.method == "minor-lora":
            merge = functools.partial(merged, scale=-self._scale)
            if _known(self._changed):
                encoder.params = jax.device_get(merge(encoder.params, self.start))
            else:
                encoder.params = jax.eval_shape(merge, encoder.params, self.start)
        return encoder

    def init(self, key: Any) -> Tree:
        """Returns freshly drawn parameters of the head, and adapters that change nothing; zeros in place of `start`."""
        if self._config.method == "lora":
            trained = self._adapters(jax.random.fold_in(key, 1))
        else:
            trained = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), self._shapes)
        return {**self._network.init(key), "encoder": trained}

    def whole(self, params: Mapping[str, Any]) -> Tree:
        """Returns {"encoder", "head"} of the network without adapters that computes the same."""
        head = {name: leaf for name, leaf in params["head"].items() if name != "encoder"}
        trained = params["head"]["encoder"]
        if self._config.method == "weights":
            return {"encoder": trees.joined(params["encoder"], trained), "head": head}
        return {"encoder": merged(params["encoder"], trained, self._scale), "head": head}

    def loss(self, params: Any, batch: dict[str, Array], key: Any) -> tuple[Array, dict[str, Array]]:
        """Returns (loss, metrics) of images and labels."""
        return self._network.loss(self.whole(params), batch, key)

    def scores(self, params: Any, pixels: Any) -> Array:
        """Returns the scores of the network."""
        return self._network.scores(self.whole(params), pixels)

    def finished(self, trained: Tree) -> tuple[Tree, Encoder]:
        """Returns (parameters of the head, the encoder as it was trained, which records its changes)."""
        whole = self.whole({"encoder": self.encoder.params, "head": trained})
        flat = trees.flatten(whole["encoder"])
        changes = trees.unflatten({path: np.asarray(flat[path]) for path in trees.flatten(self._changed)})
        return whole["head"], self._network.encoder.changed(changes)

    def _adapters(self, key: Any) -> Tree:
        return init_adapters(key, self._changed, self._config.rank, ADAPTED)

    @functools.cached_property
    def _shapes(self) -> Tree:
        if self._config.method == "weights":
            return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), self._changed)
        return jax.eval_shape(self._adapters, jax.random.key(0))


def tuned(network: Net, config: TuneConfig | None) -> Net | TunedNetwork:
    """Returns the network with its encoder trained as `config` says; None freezes it."""
    return network if config is None else TunedNetwork(network, config)


def starting(network: Any, head: Tree) -> Tree:
    """Returns the parameters that a training on a given head starts from, as far as they are not drawn."""
    return {**head, "encoder": network.start} if isinstance(network, TunedNetwork) and network.start else head


def finished(network: Any, trained: Tree) -> tuple[Tree, Encoder]:
    """Returns (parameters of the head, encoder) after a training."""
    return network.finished(trained) if isinstance(network, TunedNetwork) else (trained, network.encoder)


def changed_part(params: Tree, config: TuneConfig) -> Tree:
    """Returns the leaves of an encoder that training changes; they need only a shape. Raises UserError as the class."""
    blocks = _blocks(params)
    count = config.blocks or len(blocks)
    if count > len(blocks):
        raise UserError(f"tune.blocks: {count} of {len(blocks)} blocks; choose at most {len(blocks)}")
    paths = [path for block in blocks[-count:] for path in block]
    if config.method == "weights":
        paths = [path for path in paths if not any(trees.matches(path, one) for one in STATISTICS)]
        return _part(params, paths)
    paths = [path for path in paths if any(trees.matches(path, one) for one in ADAPTED)]
    if not paths:
        raise UserError("tune.method: this encoder has no attention and no MLP for adapters; take method=weights")
    part = _part(params, paths)
    if config.rank > (least := min(side for leaf in jax.tree.leaves(part) for side in leaf.shape)):
        raise UserError(f"tune.rank: {config.rank} is above {least}, a side of a kernel; choose at most {least}")
    return part


def _blocks(params: Tree) -> list[list[str]]:
    """Returns the paths of the leaves of each block, from the first one on; blocks may lie in stages."""
    for pattern in (r"blocks/(\d+)/(?:blocks/)?(\d+)/", r"blocks/(\d+)/"):
        blocks: dict[tuple[int, ...], list[str]] = {}
        for path in trees.flatten(params):
            if found := re.match(pattern, path):
                blocks.setdefault(tuple(map(int, found.groups())), []).append(path)
        if blocks:
            return [blocks[number] for number in sorted(blocks)]
    raise AssertionError("an encoder has blocks")


def _part(params: Tree, paths: list[str]) -> Tree:
    flat = trees.flatten(params)
    return trees.unflatten({path: flat[path] for path in paths})


def _known(tree: Tree) -> bool:
    """Returns whether the leaves are arrays, and not shapes."""
    return not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))
