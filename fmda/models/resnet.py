"""ResNet-50 and -101 with the stride on the 3x3 convolution, as torchvision, timm and OpenMMLab train them."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from fmda.nn.conv import check_sides, conv
from fmda.nn.norm import BatchNorm

EXPANSION = 4
Four = tuple[int, int, int, int]


@dataclass(frozen=True)
class ResNetEncoderConfig:
    """Shape of the network; the defaults are ResNet-50.

    Attributes:
        layers: blocks of each stage.
        width: channels of the stem.
        deep_stem: whether three 3x3 convolutions take the place of the 7x7 one ("V1c", He et al. 2019, "ResNet-C").
        classes: outputs of the linear layer on the mean of the last map; 0 leaves it out.
    """

    layers: Four = (3, 4, 6, 3)
    width: int = 64
    deep_stem: bool = False
    classes: int = 0

    @property
    def channels(self) -> Four:
        """Channels of the four stage maps."""
        a, b, c, d = (self.width * EXPANSION * 2**stage for stage in range(4))
        return a, b, c, d


class ConvNorm(nnx.Module):
    """Convolution without bias, and batch normalisation. x: [B, h, w, before] -> [B, h/stride, w/stride, after]."""

    def __init__(
        self, before: int, after: int, size: int, *, stride: int = 1, dilation: int = 1, dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.conv = conv(
            before, after, size, stride=stride, padding=size // 2 * dilation, dilation=dilation, use_bias=False,
            dtype=dtype, rngs=rngs,
        )  # fmt: skip
        self.norm = BatchNorm(after, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w before"]) -> Float[Array, "b h2 w2 after"]:
        return self.norm(self.conv(x))


class Bottleneck(nnx.Module):
    """Residual bottleneck. x: [B, h, w, before] -> [B, h/stride, w/stride, 4 * planes]."""

    def __init__(
        self, before: int, planes: int, *, stride: int, dilation: int, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        after = EXPANSION * planes
        self.conv1 = ConvNorm(before, planes, 1, dtype=dtype, rngs=rngs)
        self.conv2 = ConvNorm(planes, planes, 3, stride=stride, dilation=dilation, dtype=dtype, rngs=rngs)
        self.conv3 = ConvNorm(planes, after, 1, dtype=dtype, rngs=rngs)
        projects = stride > 1 or before != after
        self.shortcut = ConvNorm(before, after, 1, stride=stride, dtype=dtype, rngs=rngs) if projects else None

    def __call__(self, x: Float[Array, "b h w before"]) -> Float[Array, "b h2 w2 after"]:
        y = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        return nnx.relu(self.conv3(y) + (x if self.shortcut is None else self.shortcut(x)))


def stage_maps(stages: nnx.List, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h w c"], ...]:
    """Returns the map after each stage, a list of blocks that follow one another."""
    maps = []
    for stage in stages:
        for block in stage:
            x = block(x)
        maps.append(x)
    return tuple(maps)


class ResNetEncoder(nnx.Module):
    """Image -> four stage maps; called, it returns class logits.

    Source: He et al. 2016; the dilated form is that of Chen et al. 2017 (DeepLab).

    Args:
        config: its shape.
        strides: of each stage, behind a stem of stride 4.
        dilations: of each stage's 3x3 convolutions. The first block of a dilated stage has half its stage's dilation.
        dtype: what it computes in; parameters are drawn in float32.
        rngs: keys of the initial parameters.
    """

    def __init__(
        self,
        config: ResNetEncoderConfig,
        *,
        strides: Four = (1, 2, 2, 2),
        dilations: Four = (1, 1, 1, 1),
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.dtype = config, dtype
        width = config.width
        if config.deep_stem:
            sizes = ((3, width // 2, 2), (width // 2, width // 2, 1), (width // 2, width, 1))
            stem = [ConvNorm(i, o, 3, stride=stride, dtype=dtype, rngs=rngs) for i, o, stride in sizes]
        else:
            stem = [ConvNorm(3, width, 7, stride=2, dtype=dtype, rngs=rngs)]
        self.stem = nnx.List(stem)
        before, stages = width, []
        for index, (depth, stride, dilation) in enumerate(zip(config.layers, strides, dilations, strict=True)):
            blocks = []
            for block in range(depth):
                blocks.append(
                    Bottleneck(
                        before, width * 2**index, stride=1 if block else stride,
                        dilation=dilation if block else max(dilation // 2, 1), dtype=dtype, rngs=rngs,
                    )
                )  # fmt: skip
                before = config.channels[index]
            stages.append(nnx.List(blocks))
        self.blocks = nnx.List(stages)
        self.classifier = nnx.Linear(before, config.classes, dtype=dtype, rngs=rngs) if config.classes else None

    def stages(
        self, pixels: Float[Array, "b H W 3"], key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "b h w c"], ...]:
        """Returns the four stage maps, with `config.channels` channels. `pixels` are RGB, ImageNet-normalised.

        Raises UserError where a side is below 32.
        """
        del key  # taken for the common signature of encoders; nothing is dropped
        check_sides(pixels, 32, "the 32 pixels of a ResNet's last stride")
        x = pixels.astype(self.dtype)
        for layer in self.stem:
            x = nnx.relu(layer(x))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        return stage_maps(self.blocks, x)

    def __call__(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b classes"]:
        """Returns float32 logits of ImageNet's classes; of a network without them, the mean of the last map."""
        x = self.stages(pixels)[-1].mean((1, 2), dtype=jnp.float32)
        return x if self.classifier is None else self.classifier(x.astype(self.dtype)).astype(jnp.float32)
