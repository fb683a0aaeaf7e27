"""SAM's mask decoder: a transformer in which prompts read the image and the image reads prompts, and its heads."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fmda.models.clip.transformer import Mlp
from fmda.nn.activation import gelu
from fmda.nn.cross_attention import CrossAttention
from fmda.nn.mlp import ThreeLayers
from fmda.nn.norm import layer_norm

MASKS = 4
"""Masks per prompt: one for a prompt that is not ambiguous, then whole, part and subpart in any order."""
REDUCTION = 2
"""Factor by which attention between prompts and image is narrower."""


class TwoWayBlock(nnx.Module):
    """Self-attention of the tokens, tokens to image, MLP, image to tokens; each is added and normalised.

    Queries and keys carry their position; the first block's self-attention has none and is not added to its input.
    """

    def __init__(
        self, width: int, heads: int, mlp_width: int, *, first: bool, eps: float, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:  # fmt: skip
        self.first = first
        self.self_attention = CrossAttention(width, heads, dtype=dtype, rngs=rngs)
        self.to_image = CrossAttention(width, heads, inner=width // REDUCTION, dtype=dtype, rngs=rngs)
        self.to_tokens = CrossAttention(width, heads, inner=width // REDUCTION, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(width, mlp_width, 1, "relu", dtype=dtype, rngs=rngs)
        self.norm1, self.norm2, self.norm3, self.norm4 = (
            layer_norm(width, eps=eps, dtype=dtype, rngs=rngs) for _ in range(4)
        )

    def __call__(
        self,
        tokens: Float[Array, "n t c"],
        image: Float[Array, "n s c"],
        token_position: Float[Array, "n t c"],
        image_position: Float[Array, "1 s c"],
    ) -> tuple[Float[Array, "n t c"], Float[Array, "n s c"]]:
        """Returns tokens and image."""
        if self.first:
            tokens = self.norm1(self.self_attention(tokens, tokens, tokens))
        else:
            placed = tokens + token_position
            tokens = self.norm1(tokens + self.self_attention(placed, placed, tokens))
        tokens = self.norm2(tokens + self.to_image(tokens + token_position, image + image_position, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.to_tokens(image + image_position, tokens + token_position, tokens))
        return tokens, image


class Upscale(nnx.Module):
    """Transposed convolution of size and stride 2. x: [n, h, w, before] -> [n, 2h, 2w, after]."""

    def __init__(self, before: int, after: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.dtype = dtype
        draw = nnx.initializers.lecun_normal(in_axis=0, out_axis=(1, 2, 3))
        self.kernel = nnx.Param(draw(rngs.params(), (before, 2, 2, after), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((after,), jnp.float32))

    def __call__(self, x: Float[Array, "n h w before"]) -> Float[Array, "n h2 w2 after"]:
        n, h, w, _ = x.shape
        # with stride = size no output place has two contributions
        tiles = jnp.einsum("nhwi,iyxo->nhywxo", x, self.kernel[...].astype(self.dtype))
        return tiles.reshape(n, 2 * h, 2 * w, -1) + self.bias[...].astype(self.dtype)[None, None, None]


class MaskDecoder(nnx.Module):
    """Image and prompts -> mask logits at four times the embedding's size, and the IoU that each is expected to reach.

    `eps` is that of the blocks' normalisation: 1e-5 in the authors' code, 1e-6 in transformers'.
    """

    def __init__(
        self, width: int, layers: int, heads: int, mlp_width: int, iou_width: int, *, eps: float, dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        draw, self.dtype = nnx.initializers.normal(1.0), dtype
        self.iou_token = nnx.Param(draw(rngs.params(), (1, width), jnp.float32))
        self.mask_tokens = nnx.Param(draw(rngs.params(), (MASKS, width), jnp.float32))
        self.blocks = nnx.List(
            TwoWayBlock(width, heads, mlp_width, first=i == 0, eps=eps, dtype=dtype, rngs=rngs) for i in range(layers)
        )
        self.final = CrossAttention(width, heads, inner=width // REDUCTION, dtype=dtype, rngs=rngs)
        self.final_norm = layer_norm(width, eps=1e-5, dtype=dtype, rngs=rngs)
        self.upscale1 = Upscale(width, width // 4, dtype=dtype, rngs=rngs)
        self.upscale_norm = layer_norm(width // 4, eps=1e-6, dtype=dtype, rngs=rngs)
        self.upscale2 = Upscale(width // 4, width // 8, dtype=dtype, rngs=rngs)
        self.mask_heads = nnx.List(ThreeLayers(width, width, width // 8, dtype=dtype, rngs=rngs) for _ in range(MASKS))
        self.iou_head = ThreeLayers(width, iou_width, MASKS, dtype=dtype, rngs=rngs)

    def __call__(
        self, image: Float[Array, "n h w c"], position: Float[Array, "h w c"], prompts: Float[Array, "n t c"]
    ) -> tuple[Float[Array, "n masks h4 w4"], Float[Array, "n masks"]]:
        """Returns (mask logits, IoU), both float32, of images with their mask prompt added."""
        n, h, w, c = image.shape
        own = jnp.concatenate([self.iou_token[...], self.mask_tokens[...]]).astype(self.dtype)
        start = jnp.concatenate([jnp.broadcast_to(own[None], (n, *own.shape)), prompts], axis=1)
        tokens, places, grid = start, image.reshape(n, h * w, c), position.reshape(1, h * w, c)
        for block in self.blocks:
            tokens, places = block(tokens, places, start, grid)
        tokens = self.final_norm(tokens + self.final(tokens + start, places + grid, places))
        upscaled = gelu(self.upscale_norm(self.upscale1(places.reshape(n, h, w, c))))
        upscaled = gelu(self.upscale2(upscaled))
        kernels = jnp.stack([head(tokens[:, 1 + i]) for i, head in enumerate(self.mask_heads)], axis=1)
        masks = jnp.einsum("nkc,nhwc->nkhw", kernels, upscaled)
        return masks.astype(jnp.float32), self.iou_head(tokens[:, 0]).astype(jnp.float32)
