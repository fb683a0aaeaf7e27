"""Mask2Former's decoders on the maps of a frozen encoder."""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fmda.config import PositiveInt
from fmda.data import ClassList
from fmda.losses.masks import MaskLossConfig, mask_loss
from fmda.methods.dense import Encoder
from fmda.methods.zero_shot import ZeroShotConfig, geometric_mean, zero_shot_probabilities
from fmda.models.mask2former import HeadConfig, Mask2FormerHead, Predictions, log_scores
from fmda.models.module import abstract, init
from fmda.trees import Tree
from fmda.weights.checkpoint import weight_fingerprint


@dataclass(frozen=True, kw_only=True)
class MaskHeadConfig:
    """Shape and loss of the decoders; the defaults are those of CLOUDS, apart from `ignore`.

    Attributes:
        width, mask_width, heads, pixel_layers, pixel_hidden, layers, hidden, queries: see `HeadConfig`; `width` is a
            multiple of 32 and of `heads`.
        points, ignore: see `MaskLossConfig`.
        zero_shot: how a CLIP classifies by the classes' names beside the decoders; counts for scores, not for training.
            None leaves it out.
    """

    width: PositiveInt = 256
    mask_width: PositiveInt = 256
    heads: PositiveInt = 8
    pixel_layers: PositiveInt = 6
    pixel_hidden: PositiveInt = 1024
    layers: PositiveInt = 9
    hidden: PositiveInt = 2048
    queries: PositiveInt = 100
    points: PositiveInt = 12544
    ignore: Literal["negative", "excluded"] = "excluded"
    zero_shot: ZeroShotConfig | None = None


def names_read(encoder: Encoder, config: MaskHeadConfig | None, classes: ClassList) -> dict[str, str]:
    """Returns {"names": fingerprint of their embeddings} where a CLIP classifies too, else {}. Raises as they do."""
    if (zero_shot := _zero_shot(config)) is None:
        return {}
    names, scale = encoder.class_names(classes)
    return {"names": weight_fingerprint({"names": names}, scale, zero_shot)}


def _zero_shot(config: MaskHeadConfig | None) -> ZeroShotConfig | None:
    found = None if config is None else config.zero_shot
    return found if found is not None and found.share else None


class MaskNetwork:
    """A frozen encoder under Mask2Former's decoders; what `supervised` trains in place of `DenseNetwork`."""

    def __init__(self, encoder: Encoder, config: MaskHeadConfig, classes: ClassList) -> None:
        shape = HeadConfig(
            classes=len(classes), width=config.width, mask_width=config.mask_width, heads=config.heads,
            pixel_layers=config.pixel_layers, pixel_hidden=config.pixel_hidden, layers=config.layers,
            hidden=config.hidden, queries=config.queries,
        )  # fmt: skip
        square = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        channels = [x.shape[-1] for x in jax.eval_shape(encoder.maps, encoder.params, square)]
        self.encoder = encoder
        self._make = lambda rngs: Mask2FormerHead(shape, channels, rngs=rngs)
        self._graphdef = abstract(self._make)[0]
        self._classes, self._zero_shot = classes, _zero_shot(config)
        self._loss = MaskLossConfig(points=config.points, ignore=config.ignore)

    def init(self, key: Any) -> Tree:
        """Returns freshly drawn parameters of the decoders."""
        return init(self._make, key)

    def predictions(self, params: Any, pixels: Float[Array, "b H W 3"]) -> Predictions:
        """Returns what all layers predict for RGB in 0..255; `params` holds those of "encoder" and "head"."""
        return nnx.merge(self._graphdef, params["head"])(self.encoder.maps(params["encoder"], pixels))

    def loss(self, params: Any, batch: dict[str, Array], key: Any) -> tuple[Array, dict[str, Array]]:
        """Returns (loss, metrics) of images and labels."""
        return mask_loss(*self.predictions(params, batch["image"]), batch["labels"], key, self._loss)

    @functools.cached_property
    def names(self) -> tuple[Any, float]:
        """What `Encoder.class_names` returns, where CLIP classifies too."""
        # scores are traced
        with jax.ensure_compile_time_eval():
            return self.encoder.class_names(self._classes)

    def scores(self, params: Any, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b H W k"]:
        """Returns `log_scores` at the images' size, in an ensemble with what CLIP sees where it classifies too."""
        predicted = self.predictions(params, pixels)
        scores = log_scores(predicted.classes[-1], predicted.masks[-1], (pixels.shape[1], pixels.shape[2]))
        if self._zero_shot is None:
            return scores
        seen = zero_shot_probabilities(self._zero_shot, self.encoder, params["encoder"], pixels, *self.names)
        return geometric_mean(scores, seen, self._zero_shot.share)
