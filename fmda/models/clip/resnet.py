"""CLIP's ModifiedResNet, with its four stage maps and its attention pool."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fmda.models.clip.config import ResNetConfig
from fmda.models.resnet import stage_maps
from fmda.nn.attention import attention
from fmda.nn.conv import average_pool, check_sides, conv
from fmda.nn.norm import BatchNorm
from fmda.nn.resize import resized_positions


class Bottleneck(nnx.Module):
    """Residual bottleneck whose stride is an average pool before the last 1x1 convolution, also on the shortcut.

    x: [B, h, w, in] -> [B, h/stride, w/stride, 4 * planes]. Pooling before the stride keeps it free of aliases.
    """

    def __init__(self, channels: int, planes: int, stride: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.stride = stride
        self.conv1 = conv(channels, planes, 1, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm1 = BatchNorm(planes, dtype=dtype, rngs=rngs)
        self.conv2 = conv(planes, planes, 3, padding=1, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm2 = BatchNorm(planes, dtype=dtype, rngs=rngs)
        self.conv3 = conv(planes, 4 * planes, 1, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm3 = BatchNorm(4 * planes, dtype=dtype, rngs=rngs)
        self.shortcut: nnx.Conv | None
        if stride > 1 or channels != 4 * planes:
            self.shortcut = conv(channels, 4 * planes, 1, use_bias=False, dtype=dtype, rngs=rngs)
            self.shortcut_norm = BatchNorm(4 * planes, dtype=dtype, rngs=rngs)
        else:
            self.shortcut = None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = nnx.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(average_pool(y, self.stride)))
        if self.shortcut is not None:
            x = self.shortcut_norm(self.shortcut(average_pool(x, self.stride)))
        return nnx.relu(x + y)


class AttentionPool(nnx.Module):
    """One attention step with the mean of the map as the only query. x: [B, h, w, width] -> [B, embed_dim].

    `position` is [1 + side^2, width], the mean's own position first.
    """

    def __init__(self, side: int, width: int, heads: int, embed_dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.dtype = dtype
        draw = nnx.initializers.normal(width**-0.5)
        self.position = nnx.Param(draw(rngs.params(), (side * side + 1, width), jnp.float32))
        self.query = nnx.Linear(width, width, dtype=dtype, kernel_init=draw, rngs=rngs)
        self.key = nnx.Linear(width, width, dtype=dtype, kernel_init=draw, rngs=rngs)
        self.value = nnx.Linear(width, width, dtype=dtype, kernel_init=draw, rngs=rngs)
        self.out = nnx.Linear(width, embed_dim, dtype=dtype, kernel_init=draw, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w width"]) -> Float[Array, "b embed"]:
        b, h, w, width = x.shape
        x = x.reshape(b, h * w, width)
        mean = x.mean(axis=1, keepdims=True, dtype=jnp.float32).astype(x.dtype)
        positions = resized_positions(self.position[...], (h, w)).astype(self.dtype)
        x = jnp.concatenate([mean, x], axis=1) + positions[None]
        query, key, value = (
            y.reshape(b, -1, self.heads, width // self.heads)
            for y in (self.query(x[:, :1]), self.key(x), self.value(x))
        )
        return self.out(attention(query, key, value).reshape(b, width))


class ModifiedResNet(nnx.Module):
    """Image tower. pixels: normalised RGB [B, H, W, 3], sides at least 32 -> [B, embed_dim], not L2-normalised.

    Batch normalisation always runs on its stored statistics. Source: Radford et al. 2021, 2.4 (RN50, RN101).
    """

    def __init__(self, config: ResNetConfig, embed_dim: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        width = config.width
        self.config = config
        self.dtype = dtype
        self.conv1 = conv(3, width // 2, 3, stride=2, padding=1, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm1 = BatchNorm(width // 2, dtype=dtype, rngs=rngs)
        self.conv2 = conv(width // 2, width // 2, 3, padding=1, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm2 = BatchNorm(width // 2, dtype=dtype, rngs=rngs)
        self.conv3 = conv(width // 2, width, 3, padding=1, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm3 = BatchNorm(width, dtype=dtype, rngs=rngs)
        stages = []
        channels = width
        for index, depth in enumerate(config.layers):
            stage = []
            for block in range(depth):
                stride = 2 if index > 0 and block == 0 else 1
                stage.append(Bottleneck(channels, width * 2**index, stride, dtype=dtype, rngs=rngs))
                channels = config.channels[index]
            stages.append(nnx.List(stage))
        self.blocks = nnx.List(stages)
        self.pool = AttentionPool(config.image_size // 32, channels, config.heads, embed_dim, dtype=dtype, rngs=rngs)

    def stem(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        """Returns the map at stride 4 that enters the first stage.

        Raises UserError where a side is below 32, the stride of the last stage.
        """
        check_sides(pixels, 32, "the stride of 32")
        x = nnx.relu(self.norm1(self.conv1(pixels.astype(self.dtype))))
        x = nnx.relu(self.norm2(self.conv2(x)))
        return average_pool(nnx.relu(self.norm3(self.conv3(x))), 2)

    def stages(self, pixels: Float[Array, "b H W 3"]) -> tuple[Float[Array, "b h w c"], ...]:
        """Returns the four stage outputs at strides 4, 8, 16, 32, with `config.channels` channels."""
        return stage_maps(self.blocks, self.stem(pixels))

    def project(self, x: Float[Array, "... width"]) -> Float[Array, "... embed"]:
        """Returns places of the last stage in the joint space, each attending to itself alone.

        Source: Zhou et al. 2022 (MaskCLIP), 3.2.
        """
        return self.pool.out(self.pool.value(x))

    def __call__(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b embed"]:
        return self.pool(self.stages(pixels)[-1])
