"""ConvNeXt with OpenCLIP's projection head."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fmda.models.clip.config import ConvNextConfig
from fmda.nn.activation import ACTIVATIONS
from fmda.nn.conv import check_sides, conv
from fmda.nn.norm import LayerScale, layer_norm


class ConvNextBlock(nnx.Module):
    """Depthwise 7x7, LayerNorm, four-fold MLP, layer scale, residual. x: [B, h, w, c] -> [B, h, w, c]."""

    def __init__(self, channels: int, activation: str, *, eps: float, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.activation = activation
        self.depthwise = conv(channels, channels, 7, padding=3, groups=channels, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(channels, eps=eps, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(channels, 4 * channels, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * channels, channels, dtype=dtype, rngs=rngs)
        self.scale = LayerScale(channels, dtype=dtype)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        y = self.up(self.norm(self.depthwise(x)))
        return x + self.scale(self.down(ACTIVATIONS[self.activation](y)))


class ConvNextStage(nnx.Module):
    """Blocks of one resolution, after a 2x2 downsampling in every stage but the first."""

    def __init__(
        self, before: int, channels: int, depth: int, activation: str, *, first: bool, eps: float, dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.norm = None if first else layer_norm(before, eps=eps, dtype=dtype, rngs=rngs)
        self.downsample = None if first else conv(before, channels, 2, stride=2, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            ConvNextBlock(channels, activation, eps=eps, dtype=dtype, rngs=rngs) for _ in range(depth)
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """Returns the stage's raw output; no norm is added to it."""
        if self.norm is not None and self.downsample is not None:
            x = self.downsample(self.norm(x))
        for block in self.blocks:
            x = block(x)
        return x


class ConvNext(nnx.Module):
    """Image tower. pixels: normalised RGB [B, H, W, 3], sides at least 32 -> [B, embed_dim], not L2-normalised.

    Global mean, LayerNorm and a two-layer MLP without final bias project the last stage, as OpenCLIP's
    `convnext_*_d` models do. Source: Liu et al. 2022; OpenCLIP.
    """

    def __init__(
        self, config: ConvNextConfig, embed_dim: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        eps = config.norm_eps
        self.config = config
        self.dtype = dtype
        self.stem = conv(3, config.channels[0], 4, stride=4, dtype=dtype, rngs=rngs)
        self.stem_norm = layer_norm(config.channels[0], eps=eps, dtype=dtype, rngs=rngs)
        sizes = zip((config.channels[0], *config.channels[:-1]), config.channels, config.depths, strict=True)
        self.blocks = nnx.List(
            ConvNextStage(*size, config.activation, first=i == 0, eps=eps, dtype=dtype, rngs=rngs)
            for i, size in enumerate(sizes)
        )
        self.norm_post = layer_norm(config.channels[-1], eps=eps, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(config.channels[-1], config.head_width, dtype=dtype, rngs=rngs)
        self.projection = nnx.Linear(config.head_width, embed_dim, use_bias=False, dtype=dtype, rngs=rngs)

    def stages(self, pixels: Float[Array, "b H W 3"]) -> tuple[Float[Array, "b h w c"], ...]:
        """Returns the four raw stage outputs at strides 4, 8, 16, 32, with `config.channels` channels.

        Raises UserError where a side is below 32, the stride of the last stage.
        """
        check_sides(pixels, 32, "the stride of 32")
        x = self.stem_norm(self.stem(pixels.astype(self.dtype)))
        maps = []
        for stage in self.blocks:
            x = stage(x)
            maps.append(x)
        return tuple(maps)

    def project(self, x: Float[Array, "... c"]) -> Float[Array, "... embed"]:
        """Returns features of the last stage in the joint space: LayerNorm, linear, GELU, linear."""
        return self.projection(ACTIVATIONS[self.config.activation](self.up(self.norm_post(x))))

    def __call__(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b embed"]:
        last = self.stages(pixels)[-1]
        return self.project(last.mean((1, 2), dtype=jnp.float32).astype(last.dtype))
