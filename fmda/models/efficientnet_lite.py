"""EfficientNet-Lite (Tan and Le 2019, without squeeze-and-excitation and with ReLU6), with its four stage maps."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from fmda.models.dino import IMAGENET_MEAN, IMAGENET_STD
from fmda.nn.conv import check_sides
from fmda.nn.grouped import grouped
from fmda.nn.norm import BatchNorm

Group = tuple[int, int, int, int, int]
"""Blocks, kernel size, stride of the first block, expansion, channels."""

LITE0: tuple[Group, ...] = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip


@dataclass(frozen=True)
class EfficientNetLiteConfig:
    """Shape of the network; the defaults are Lite0.

    Attributes:
        groups: of blocks, behind a stem of stride 2; four of them have stride 2.
        stem: channels of the first convolution.
        hidden: channels before the classes.
        classes: outputs of the linear layer on the mean of the last map; 0 leaves it and `hidden` out.
    """

    groups: tuple[Group, ...] = LITE0
    stem: int = 32
    hidden: int = 1280
    classes: int = 1000

    @property
    def ends(self) -> tuple[int, ...]:
        """Indices of the groups whose maps are the stages': the last ones of strides 4, 8, 16 and 32."""
        count = len(self.groups)
        return tuple(i for i in range(1, count) if i + 1 == count or self.groups[i + 1][2] > 1)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the four stage maps."""
        return tuple(self.groups[index][-1] for index in self.ends)


class ConvNorm(nnx.Module):
    """Convolution without bias, padded as TensorFlow's SAME, and batch normalisation. [B, h, w, c] -> [B, h2, w2, c2].

    With stride 2 and an even side, zeros are added at the far side only.
    """

    def __init__(
        self, before: int, after: int, size: int, *, stride: int = 1, groups: int = 1, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.conv = nnx.Conv(
            before, after, (size, size), strides=(stride, stride), padding="SAME", feature_group_count=groups,
            conv_general_dilated=grouped if groups > 1 else jax.lax.conv_general_dilated,
            use_bias=False, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        self.norm = BatchNorm(after, eps=1e-3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w before"]) -> Float[Array, "b h2 w2 after"]:
        return self.norm(self.conv(x))


class Block(nnx.Module):
    """Inverted bottleneck (Sandler et al. 2018). x: [B, h, w, before] -> [B, h/stride, w/stride, after]."""

    def __init__(
        self, before: int, after: int, size: int, *, stride: int, expansion: int, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        width = before * expansion
        self.residual = stride == 1 and before == after
        self.expand = ConvNorm(before, width, 1, dtype=dtype, rngs=rngs) if expansion > 1 else None
        self.depthwise = ConvNorm(width, width, size, stride=stride, groups=width, dtype=dtype, rngs=rngs)
        self.project = ConvNorm(width, after, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w before"]) -> Float[Array, "b h2 w2 after"]:
        y = x if self.expand is None else nnx.relu6(self.expand(x))
        y = self.project(nnx.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class EfficientNetLite(nnx.Module):
    """Image -> four stage maps; called, it returns class logits. `dtype` is what it computes in."""

    def __init__(self, config: EfficientNetLiteConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config, self.dtype = config, dtype
        self.stem = ConvNorm(3, config.stem, 3, stride=2, dtype=dtype, rngs=rngs)
        before, blocks = config.stem, []
        for count, size, stride, expansion, after in config.groups:
            for index in range(count):
                first = stride if index == 0 else 1
                blocks.append(Block(before, after, size, stride=first, expansion=expansion, dtype=dtype, rngs=rngs))
                before = after
        self.blocks = nnx.List(blocks)
        hidden, classes = config.hidden, config.classes
        self.last = ConvNorm(before, hidden, 1, dtype=dtype, rngs=rngs) if classes else None
        self.classifier = nnx.Linear(hidden, classes, dtype=dtype, rngs=rngs) if classes else None

    def stages(
        self, pixels: Float[Array, "b H W 3"], key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "b h w c"], ...]:
        """Returns the maps at strides 4, 8, 16 and 32. `pixels` are RGB, ImageNet-normalised.

        Raises UserError where a side is below 32.
        """
        del key  # taken for the common signature of encoders; nothing is dropped
        check_sides(pixels, 32, "the 32 pixels of the last stride")
        # trained on (255 x - 127) / 128 of RGB in 0..1; all encoders here read ImageNet-normalised pixels
        mean, std = (jnp.asarray(values)[None, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        x = ((pixels * std + mean) * 255 - 127) / 128
        x = nnx.relu6(self.stem(x.astype(self.dtype)))
        blocks, maps = iter(self.blocks), []
        for index, group in enumerate(self.config.groups):
            for _ in range(group[0]):
                x = next(blocks)(x)
            if index in self.config.ends:
                maps.append(x)
        return tuple(maps)

    def __call__(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b classes"]:
        """Returns float32 logits of ImageNet's classes; of a network without them, the mean of the last map."""
        x = self.stages(pixels)[-1]
        if self.last is None or self.classifier is None:
            return x.mean((1, 2), dtype=jnp.float32)
        x = nnx.relu6(self.last(x)).mean((1, 2), dtype=jnp.float32)
        return self.classifier(x.astype(self.dtype)).astype(jnp.float32)
