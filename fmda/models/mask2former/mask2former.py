"""Mask2Former: an encoder with maps at strides 4 to 32, a pixel decoder, a transformer decoder."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from fmda.errors import UserError
from fmda.models.clip.config import ConvNextConfig
from fmda.models.clip.convnext import ConvNext
from fmda.models.clip.resnet import ModifiedResNet
from fmda.models.mask2former.config import HeadConfig, Mask2FormerConfig
from fmda.models.mask2former.decoder import Decoder, Predictions
from fmda.models.mask2former.pixel_decoder import PixelDecoder
from fmda.models.mask2former.text import MOST, cosines, geometric_ensemble, mask_pooled
from fmda.models.resnet import ResNetEncoder, ResNetEncoderConfig
from fmda.nn.resize import interpolation_matrix


class Mask2FormerHead(nnx.Module):
    """Four maps with `channels` channels -> `Predictions`. `dtype` is what it computes in."""

    def __init__(
        self, config: HeadConfig, channels: Sequence[int], *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.pixel = PixelDecoder(config, channels, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, maps: Sequence[Float[Array, "b h w c"]], text: Float[Array, "k s e"] | None = None
    ) -> Predictions:
        """Returns the predictions of all layers; `text` as in `Decoder`."""
        features, memories = self.pixel(maps)
        return self.decoder(features, memories, text)


class Mask2Former(nnx.Module):
    """Image -> classes and masks of queries. `dtype` is what it computes in; parameters are drawn in float32.

    Source: Cheng et al. 2022.
    """

    def __init__(self, config: Mask2FormerConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.encoder = _encoder(config, dtype=dtype, rngs=rngs)
        self.head = Mask2FormerHead(config.head, config.encoder.channels, dtype=dtype, rngs=rngs)

    def predictions(self, pixels: Float[Array, "b H W 3"], text: Float[Array, "k s e"] | None = None) -> Predictions:
        """Returns the predictions of all layers. `pixels` are normalised RGB, `text` as in `Decoder`.

        Raises UserError where a side is below 32.
        """
        return self.head(self.encoder.stages(pixels), text)

    def __call__(
        self, pixels: Float[Array, "b H W 3"], text: Float[Array, "k s e"] | None = None
    ) -> tuple[Float[Array, "b q k+1"], Float[Array, "b q h w"]]:
        """Returns (class logits, "no object" last, mask logits at stride 4) of the last layer, float32."""
        predicted = self.predictions(pixels, text)
        return predicted.classes[-1], predicted.masks[-1]

    def scores(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b H W k"]:
        """Returns `log_scores` at the images' size; `pixels` as for a call.

        Raises UserError for a network that needs text.
        """
        if self.config.head.text_classes or self.config.head.fixed:
            raise UserError("this Mask2Former needs text embeddings of its classes; open it with fmda.load_mask2former")
        return log_scores(*self(pixels), (pixels.shape[1], pixels.shape[2]))

    def with_clip(
        self, pixels: Float[Array, "b H W 3"], text: Float[Array, "k s e"], seen: Bool[Array, "k"]
    ) -> tuple[Float[Array, "b q k+1"], Float[Array, "b q h w"]]:
        """Returns what a call returns, its class logits mixed with CLIP's own classification (`geometric_ensemble`).

        CLIP classifies the mean of its last map under each mask. `seen` marks the classes that occur in training.
        Raises UserError for an encoder that is not CLIP's.
        """
        if isinstance(self.encoder, ResNetEncoder):
            raise UserError("with_clip: the encoder is not CLIP's; take a ResNet or a ConvNeXt of CLIP")
        maps = self.encoder.stages(pixels)
        predicted = self.head(maps, text)
        classes, masks = predicted.classes[-1], predicted.masks[-1]
        pooled = self.encoder.project(mask_pooled(maps[-1], masks))
        return geometric_ensemble(classes, MOST * cosines(pooled, text), seen), masks


def _encoder(config: Mask2FormerConfig, **options: Any) -> ResNetEncoder | ModifiedResNet | ConvNext:
    if isinstance(config.encoder, ResNetEncoderConfig):
        return ResNetEncoder(config.encoder, **options)
    if isinstance(config.encoder, ConvNextConfig):
        return ConvNext(config.encoder, config.embed_dim, **options)
    return ModifiedResNet(config.encoder, config.embed_dim, **options)


def semantic_scores(
    classes: Float[Array, "b q k+1"], masks: Float[Array, "b q h w"], size: tuple[int, int], rows: int = 64
) -> Float[Array, "b H W k"]:
    """Returns class scores: the sum over queries of class probability times mask probability, float32.

    "No object" is left out after the softmax; scores do not add up to one. Masks are resized bilinearly to `size` =
    (H, W) and contracted `rows` rows at a time, so that they never exist at full size together.
    Source: Cheng et al. 2021 (MaskFormer), 3.4.
    """
    probs = jax.nn.softmax(classes.astype(jnp.float32), axis=-1)[..., :-1]
    height, width = size
    blocks = -(-height // rows)
    down = jnp.asarray(interpolation_matrix(masks.shape[2], height))
    down = jnp.pad(down, ((0, blocks * rows - height), (0, 0))).reshape(blocks, rows, -1)
    across = jnp.asarray(interpolation_matrix(masks.shape[3], width))
    exact = lax.Precision.HIGHEST

    def block(part: Float[Array, "rows h"]) -> Float[Array, "b rows W k"]:
        high = jnp.einsum("rh,bqhw->bqrw", part, masks.astype(jnp.float32), precision=exact)
        full = jax.nn.sigmoid(jnp.einsum("Ww,bqrw->bqrW", across, high, precision=exact))
        return jnp.einsum("bqk,bqrW->brWk", probs, full)

    scores = jnp.moveaxis(lax.map(block, down), 0, 1)
    return scores.reshape(len(masks), blocks * rows, width, -1)[:, :height]


def log_scores(
    classes: Float[Array, "b q k+1"], masks: Float[Array, "b q h w"], size: tuple[int, int]
) -> Float[Array, "b H W k"]:
    """Returns logarithms of `semantic_scores`: like logits, their softmax is a distribution."""
    return jnp.log(jnp.maximum(semantic_scores(classes, masks, size), 1e-8))
