"""HRDA (Hoyer et al. 2022): DAFormer on a whole image at half size and on crops at full size, joined by an attention.

The context is the whole image at half resolution, the detail a window of half its sides at full resolution. One encoder
and one head serve both; a second head on the context's maps, or a constant, weighs them for each class and place.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from fmda.errors import UserError
from fmda.models.daformer import DaFormer, DaFormerConfig
from fmda.models.segformer import SegFormerHead
from fmda.nn.resize import resize

CELL = 8
"""What corners of the detail are multiples of: pixels per place of the context's logits."""
LOGIT_STRIDE = 4
SIDES = 64
"""What the sides of an image must be multiples of."""


@dataclass(frozen=True)
class HrdaConfig(DaFormerConfig):
    """Shape of the network; the defaults are those of the paper.

    Attributes:
        fixed_attention: share of the detail's logits wherever it is seen, 0.5 in the paper's ablation; None learns it
            for each class and place.
    """

    fixed_attention: float | None = None


class HrdaOutputs(NamedTuple):
    """What a training step reads.

    Attributes:
        fused: logits of the whole image at stride 4.
        detail: logits of the detail alone at stride 4.
        context_maps: the encoder's maps of the context.
    """

    fused: Float[Array, "b h w classes"]
    detail: Float[Array, "b h2 w2 classes"]
    context_maps: tuple[Float[Array, "b h w c"], ...]


class Hrda(DaFormer):
    """Image -> class logits. `dtype` is what it computes in; parameters are drawn in float32."""

    def __init__(self, config: HrdaConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.fixed_attention = config.fixed_attention
        if self.fixed_attention is None:
            self.attention = SegFormerHead(
                config.encoder.widths, config.width, config.classes, config.dropout, dtype=dtype, rngs=rngs
            )

    def with_detail(
        self, pixels: Float[Array, "b H W 3"], corner: Int[Array, "2"], key: Key[Array, ""] | None = None
    ) -> HrdaOutputs:
        """Returns logits where only the window at `corner` (row, column; see `detail_corner`) is seen in detail.

        Outside the window the fused logits are the context's. Sides are multiples of 64, as everywhere in this class.
        """
        height, width = _checked(pixels)
        keys = [None] * 2 if key is None else list(jax.random.split(key))
        maps, context, attention = self._context(pixels, keys[0])
        window = lax.dynamic_slice(
            pixels, (0, corner[0], corner[1], 0), (len(pixels), height // 2, width // 2, pixels.shape[-1])
        )
        detail = super().__call__(window, keys[1])
        inside = _placed(
            jnp.ones((1, height // 2 // CELL, width // 2 // CELL, 1)), attention.shape[1:3], corner // CELL
        )
        size = (height // LOGIT_STRIDE, width // LOGIT_STRIDE)
        padded = _placed(detail, size, corner // LOGIT_STRIDE)
        return HrdaOutputs(_fused(context, padded, attention * inside), detail, maps)

    def __call__(
        self, pixels: Float[Array, "b H W 3"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "b h w classes"]:
        """Returns float32 logits at stride 4, all of the image seen in detail, by windows that overlap by half.

        `pixels` are RGB, ImageNet-normalised. Raises UserError where a side is no multiple of 64.
        """
        height, width = _checked(pixels)
        keys = [None] * 2 if key is None else list(jax.random.split(key))
        _, context, attention = self._context(pixels, keys[0])
        h, w = height // 2, width // 2
        corners = [(row, column) for row in (0, h // 2, h) for column in (0, w // 2, w)]
        windows = jnp.concatenate([pixels[:, row : row + h, column : column + w] for row, column in corners])
        logits = jnp.split(super().__call__(windows, keys[1]), len(corners))
        size = (height // LOGIT_STRIDE, width // LOGIT_STRIDE)
        total = jnp.zeros((len(pixels), *size, logits[0].shape[-1]))
        count = jnp.zeros((1, *size, 1))
        for (row, column), part in zip(corners, logits, strict=True):
            rows = slice(row // LOGIT_STRIDE, (row + h) // LOGIT_STRIDE)
            columns = slice(column // LOGIT_STRIDE, (column + w) // LOGIT_STRIDE)
            total, count = total.at[:, rows, columns].add(part), count.at[:, rows, columns].add(1)
        return _fused(context, total / count, attention)

    def _context(self, pixels: Array, key: Array | None) -> tuple[tuple[Array, ...], Array, Array]:
        """Returns (maps, logits, attention in [0, 1] per class) of the image at half size."""
        keys = [None] * 3 if key is None else list(jax.random.split(key, 3))
        maps = self.encoder.stages(halved(pixels), keys[0])
        logits = self.head(maps, keys[1])
        if self.fixed_attention is not None:
            return maps, logits, jnp.full_like(logits, self.fixed_attention)
        return maps, logits, jax.nn.sigmoid(self.attention(maps, keys[2]))


def halved(pixels: Float[Array, "b H W 3"]) -> Float[Array, "b h w 3"]:
    """Returns the context: the image at half its sides, bilinear and without antialiasing."""
    return resize(pixels, (pixels.shape[1] // 2, pixels.shape[2] // 2))


def detail_corner(key: Key[Array, ""], size: tuple[int, int]) -> Int[Array, "2"]:
    """Returns a random (row, column) of the detail in an image of `size` = (H, W): multiples of 8.

    The last multiple that would fit, half a side, is never drawn; so it was in the published runs.
    """
    return jnp.stack(
        [
            jax.random.randint(part, (), 0, (side - side // 2 + 1) // CELL) * CELL
            for part, side in zip(jax.random.split(key), size, strict=True)
        ]
    )


def _placed(x: Array, size: tuple[int, ...], corner: Array) -> Array:
    """Returns x at `corner` on a map of zeros of `size` = (h, w)."""
    blank = jnp.zeros((x.shape[0], *size, x.shape[-1]), x.dtype)
    return lax.dynamic_update_slice(blank, x, (0, corner[0], corner[1], 0))


def _fused(context: Array, detail: Array, attention: Array) -> Array:
    """Returns (1 - attention) * context + attention * detail at the detail's size (section 3.2)."""
    size = (detail.shape[1], detail.shape[2])
    return resize((1 - attention) * context, size) + resize(attention, size) * detail


def _checked(pixels: Array) -> tuple[int, int]:
    height, width = pixels.shape[1:3]
    if height % SIDES or width % SIDES:
        raise UserError(
            f"pixels: {height}x{width}, where HRDA reads sides that are multiples of {SIDES}; crop or resize them"
        )
    return height, width
