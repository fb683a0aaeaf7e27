"""Mask2Former's decoders on the maps of a frozen encoder."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fmda.config import PositiveInt
from fmda.losses.masks import MaskLossConfig, mask_loss
from fmda.methods.dense import Encoder
from fmda.models.mask2former import HeadConfig, Mask2FormerHead, Predictions, log_scores
from fmda.models.module import abstract, init
from fmda.trees import Tree


@dataclass(frozen=True, kw_only=True)
class MaskHeadConfig:
    """Shape and loss of the decoders; the defaults are those of CLOUDS, apart from `ignore`.

    Attributes:
        width, mask_width, heads, pixel_layers, pixel_hidden, layers, hidden, queries: see `HeadConfig`; `width` is a
            multiple of 32 and of `heads`.
        points, ignore: see `MaskLossConfig`.
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


class MaskNetwork:
    """A frozen encoder under Mask2Former's decoders; what `supervised` trains in place of `DenseNetwork`."""

    def __init__(self, encoder: Encoder, config: MaskHeadConfig, classes: int) -> None:
        shape = HeadConfig(
            classes=classes, width=config.width, mask_width=config.mask_width, heads=config.heads,
            pixel_layers=config.pixel_layers, pixel_hidden=config.pixel_hidden, layers=config.layers,
            hidden=config.hidden, queries=config.queries,
        )  # fmt: skip
        square = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        channels = [x.shape[-1] for x in jax.eval_shape(encoder.maps, encoder.params, square)]
        self.encoder = encoder
        self._make = lambda rngs: Mask2FormerHead(shape, channels, rngs=rngs)
        self._graphdef = abstract(self._make)[0]
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

    def scores(self, params: Any, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b H W k"]:
        """Returns `log_scores` at the images' size."""
        predicted = self.predictions(params, pixels)
        return log_scores(predicted.classes[-1], predicted.masks[-1], (pixels.shape[1], pixels.shape[2]))
