"""Segment Anything as a whole: `encode` an image once, `decode` as many prompts as there are."""

from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from fmda.errors import UserError
from fmda.models.sam.decoder import MaskDecoder
from fmda.models.sam.prompts import BOTTOM_RIGHT, NOTHING, TOP_LEFT, PromptEncoder
from fmda.models.sam.tiny_vit import TinyVit, TinyVitConfig
from fmda.models.sam.vit import SamVit, SamVitConfig
from fmda.nn.resize import resize


@dataclass(frozen=True)
class SamConfig:
    """Shape of the network; the defaults are SAM ViT-B under its authors' names.

    Attributes:
        encoder: of the image; its `channels` are those of prompts and decoder too.
        mask_channels: hidden channels of the encoder of mask prompts.
        layers, heads, mlp_width: of the decoder's transformer.
        iou_width: hidden channels of the head that predicts IoU.
        decoder_eps: of the normalisation in the decoder's blocks.
    """

    encoder: SamVitConfig | TinyVitConfig = field(default_factory=SamVitConfig)
    mask_channels: int = 16
    layers: int = 2
    heads: int = 8
    mlp_width: int = 2048
    iou_width: int = 256
    decoder_eps: float = 1e-5


SAM: dict[str, SamConfig] = {
    "sam-vit-b": SamConfig(),
    "sam-vit-l": SamConfig(
        SamVitConfig(width=1024, layers=24, heads=16, mlp_width=4096, whole=(5, 11, 17, 23))
    ),
    "sam-vit-h": SamConfig(
        SamVitConfig(width=1280, layers=32, heads=16, mlp_width=5120, whole=(7, 15, 23, 31))
    ),
    "mobile-sam": SamConfig(TinyVitConfig()),
}  # fmt: skip


class Sam(nnx.Module):
    """Images and prompts -> masks. `dtype` is what it computes in; parameters are drawn in float32."""

    def __init__(self, config: SamConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config, self.dtype = config, dtype
        encoder = config.encoder
        self.encoder = (
            TinyVit(encoder, dtype=dtype, rngs=rngs) if isinstance(encoder, TinyVitConfig)
            else SamVit(encoder, dtype=dtype, rngs=rngs)
        )  # fmt: skip
        self.prompts = PromptEncoder(encoder.image_size, encoder.channels, config.mask_channels, dtype=dtype, rngs=rngs)
        self.decoder = MaskDecoder(
            encoder.channels, config.layers, config.heads, config.mlp_width, config.iou_width, eps=config.decoder_eps,
            dtype=dtype, rngs=rngs,
        )  # fmt: skip

    def encode(self, pixels: Float[Array, "b S S 3"]) -> Float[Array, "b h w c"]:
        """Returns the embedding, float32, of ImageNet-normalised RGB, longest side S = `image_size`, then zeros."""
        return self.encoder(pixels).astype(jnp.float32)

    def decode(
        self,
        embedding: Float[Array, "b h w c"],
        points: Num[Array, "b p n 2"],
        labels: Num[Array, "b p n"],
        boxes: Num[Array, "b p 4"] | None = None,
        masks: Float[Array, "b p h4 w4"] | None = None,
    ) -> tuple[Float[Array, "b p 4 h4 w4"], Float[Array, "b p 4"]]:
        """Returns (mask logits, predicted IoU) of p prompts on each image, float32.

        The first of the four masks is meant for prompts that are not ambiguous, the others for single points. `points`
        (x, y) and `boxes` (left, top, right, bottom) are in pixels of the encoded image; n may be 0 where boxes
        are given. Labels are 1 on the object, 0 beside it, -1 for a place that is to be left out. `masks` are logits of
        an earlier answer.
        """
        b, p = points.shape[:2]
        if boxes is None:
            # the authors' predictor ends points without a box like this
            corners, kinds = jnp.zeros((b, p, 1, 2)), jnp.full((b, p, 1), NOTHING)
        else:
            corners = boxes.reshape(b, p, 2, 2)
            kinds = jnp.broadcast_to(jnp.array([TOP_LEFT, BOTTOM_RIGHT]), (b, p, 2))
        return self.decode_labelled(
            embedding, jnp.concatenate([points, corners], axis=2), jnp.concatenate([labels, kinds], axis=2), masks
        )

    def decode_labelled(
        self,
        embedding: Float[Array, "b h w c"],
        points: Num[Array, "b p n 2"],
        labels: Num[Array, "b p n"],
        masks: Float[Array, "b p h4 w4"] | None = None,
    ) -> tuple[Float[Array, "b p 4 h4 w4"], Float[Array, "b p 4"]]:
        """Returns what `decode` returns for prompts that are already complete, as the exported decoder reads them.

        Corners of boxes are points of label 2 and 3, and a prompt without a box ends with a point of label -1.
        """
        b, p, n = labels.shape
        _, h, w, c = embedding.shape
        tokens = self.prompts.points(points, labels).reshape(b * p, n, c)
        if masks is None:
            dense = self.prompts.no_mask[...].astype(self.dtype)[None, None, None, None]
        else:
            dense = self.prompts.mask(masks.reshape(b * p, 4 * h, 4 * w, 1)).reshape(b, p, h, w, c)
        image = jnp.broadcast_to(embedding.astype(self.dtype)[:, None] + dense, (b, p, h, w, c))
        logits, iou = self.decoder(image.reshape(b * p, h, w, c), self.prompts.grid(h), tokens)
        return logits.reshape(b, p, *logits.shape[1:]), iou.reshape(b, p, -1)


def masks_at(
    logits: Float[Array, "n h4 w4"], image_size: int, size: tuple[int, int]
) -> Float[Array, "n H W"]:  # fmt: skip
    """Returns mask logits at the size (H, W) that an image had before it was resized and filled up with zeros."""
    whole = resize(logits[..., None], (image_size, image_size))
    height, width = (int(side * image_size / max(size) + 0.5) for side in size)
    return resize(whole[:, :height, :width], size)[..., 0]


def check_prompts(config: SamConfig, embedding: Array, points: Array, labels: Array, *rest: Array) -> None:
    """Raises UserError for points that are not [B, p, n, 2], or labels that are not [B, p, n]."""
    if np.ndim(points) != 4 or (*np.shape(labels), 2) != np.shape(points) or len(points) != len(embedding):
        raise UserError(
            f"points, labels: of shapes {list(np.shape(points))} and {list(np.shape(labels))}, "
            f"not [{len(embedding)}, p, n, 2] and [{len(embedding)}, p, n]: p prompts of n points on each image"
        )


def check_pixels(config: SamConfig, pixels: Array) -> None:
    """Raises UserError for images that are not [B, S, S, 3], S the `image_size` of the encoder."""
    side = config.encoder.image_size
    if tuple(pixels.shape[1:]) != (side, side, 3):
        raise UserError(
            f"pixels: of shape {list(pixels.shape)}, not [B, {side}, {side}, 3]; "
            f"resize the longest side to {side} and add zeros at the bottom or right"
        )
