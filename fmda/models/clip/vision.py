"""CLIP's vision transformer, open at every joint that dense methods need."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fmda.models.clip.config import VitConfig
from fmda.models.clip.transformer import blocks, projection
from fmda.nn.conv import check_sides, conv
from fmda.nn.norm import layer_norm
from fmda.nn.resize import resized_positions


class VisionTransformer(nnx.Module):
    """Image tower. pixels: normalised RGB [B, H, W, 3] of any size -> [B, embed_dim], not L2-normalised.

    Attributes: `patch` (convolution), `class_token` [width], `position` [1 + side^2, width], `norm_pre`, `blocks`,
    `norm_post`, `projection` (no bias). `norm_pre` is None where the configuration has no `pre_norm`, `projection` is
    None where `embed_dim` is None; the output is then the normalised class token [B, width].
    Source: Radford et al. 2021, 2.4.
    """

    def __init__(
        self, config: VitConfig, embed_dim: int | None, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        width = config.width
        self.config = config
        self.dtype = dtype
        self.patch = conv(
            3, width, config.patch_size, stride=config.patch_size, use_bias=config.patch_bias, dtype=dtype, rngs=rngs
        )
        draw = nnx.initializers.normal(width**-0.5)
        self.class_token = nnx.Param(draw(rngs.params(), (width,), jnp.float32))
        self.position = nnx.Param(draw(rngs.params(), (1 + config.side**2, width), jnp.float32))
        self.norm_pre = layer_norm(width, eps=config.norm_eps, dtype=dtype, rngs=rngs) if config.pre_norm else None
        self.blocks = blocks(config, dtype=dtype, rngs=rngs)
        self.norm_post = layer_norm(width, eps=config.norm_eps, dtype=dtype, rngs=rngs)
        self.projection = projection(width, embed_dim, dtype=dtype, rngs=rngs)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns (h, w), the patches of an image of that size; a remainder smaller than a patch is dropped."""
        return height // self.config.patch_size, width // self.config.patch_size

    def positions(self, h: int, w: int, *, offset: float = 0.0) -> Float[Array, "1+h*w width"]:
        """Returns the position table for a grid of h x w patches, in float32, class position first.

        `offset` as in `resized_positions`.
        """
        return resized_positions(self.position[...], (h, w), offset)

    def tokens(self, pixels: Float[Array, "b H W 3"], *, position_offset: float = 0.0) -> Float[Array, "b 1+h*w width"]:
        """Returns what enters the first block: patches after the class token, positions added, `norm_pre` applied.

        Raises UserError where the image is smaller than one patch.
        """
        h, w = self.grid(*pixels.shape[1:3])
        check_sides(pixels, self.config.patch_size, f"one patch of {self.config.patch_size}")
        patches = self.patch(pixels.astype(self.dtype)).reshape(pixels.shape[0], h * w, -1)
        first = jnp.broadcast_to(self.class_token[...].astype(self.dtype), (pixels.shape[0], 1, patches.shape[-1]))
        positions = self.positions(h, w, offset=position_offset).astype(self.dtype)
        x = jnp.concatenate([first, patches], axis=1) + positions[None]
        return x if self.norm_pre is None else self.norm_pre(x)

    def hidden(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b 1+h*w width"]:
        """Returns the output of the last block, before `norm_post`."""
        x = self.tokens(pixels)
        for block in self.blocks:
            x = block(x)
        return x

    def project(self, x: Float[Array, "... width"]) -> Float[Array, "... embed"]:
        """Returns tokens in the joint space: `norm_post`, then `projection` if there is one."""
        x = self.norm_post(x)
        return x if self.projection is None else self.projection(x)

    def __call__(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b embed"]:
        return self.project(self.hidden(pixels)[:, 0])
