"""ESPNetv2 for semantic segmentation (Mehta et al. 2019): depth-wise pyramids of dilated convolutions.

An encoder halves the map four times, and at each level adds the input image itself, shrunk. A decoder doubles it three
times; every step pools at five scales and adds the encoder's map of its size, gated by its global average.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from fmda.errors import UserError
from fmda.models.segformer import EncoderDecoder
from fmda.nn.conv import conv
from fmda.nn.norm import BatchNorm
from fmda.nn.resize import apply_matrices, resize

BRANCHES = 4
SCALES = (2.0, 1.5, 1.0, 0.5, 0.1)
LEAST_SIDE = 5
"""Smallest side of a map in the pyramid pooling."""
FACTOR = 16
"""What the sides of an image must be a multiple of."""
WIDE, NARROW = (1, 2, 3, 4), (1, 1, 2, 3)
"""Dilations of the branches."""


@dataclass(frozen=True)
class EspNetV2Config:
    """Shape of the network; the defaults are the width factor 2.0 on Cityscapes.

    Attributes:
        channels: of the four encoder levels, at strides 2, 4, 8, 16.
        repeats: blocks after the downsampling to the third and the fourth level.
        decoder: channels of the first three decoder steps.
        classes: logits, in the checkpoint's order.
        unused: how many of the last logits stand for no class and are never the largest.
        pyramid: channels of each scale of the pyramid pooling.
        eps: of the batch normalisation.
    """

    channels: tuple[int, int, int, int] = (32, 128, 256, 512)
    repeats: tuple[int, int] = (3, 7)
    decoder: tuple[int, int, int] = (64, 48, 32)
    classes: int = 20
    unused: int = 0
    pyramid: int = 10
    eps: float = 1e-5


class PRelu(nnx.Module):
    """x where positive, else x times a learned slope per channel (He et al. 2015). x: [..., channels] -> the same."""

    def __init__(self, channels: int, *, dtype: DTypeLike) -> None:
        self.dtype = dtype
        self.slope = nnx.Param(jnp.full((channels,), 0.25, jnp.float32))

    def __call__(self, x: Float[Array, "*s c"]) -> Float[Array, "*s c"]:
        slope = jnp.expand_dims(self.slope[...].astype(self.dtype), tuple(range(x.ndim - 1)))
        return jnp.where(x > 0, x, slope * x)


class NormAct(nnx.Module):
    """Batch normalisation and PReLU. x: [B, h, w, channels] -> the same."""

    def __init__(self, channels: int, *, eps: float, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm = BatchNorm(channels, eps=eps, dtype=dtype, rngs=rngs)
        self.act = PRelu(channels, dtype=dtype)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.act(self.norm(x))


class ConvNorm(nnx.Module):
    """Convolution without bias that keeps the size or halves it, batch normalisation and, with `act`, PReLU."""

    def __init__(
        self, before: int, after: int, size: int, *, stride: int = 1, groups: int = 1, act: bool = True, eps: float,
        dtype: DTypeLike, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.conv = conv(
            before, after, size, stride=stride, padding=size // 2, groups=groups, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.norm = BatchNorm(after, eps=eps, dtype=dtype, rngs=rngs)
        self.act = PRelu(after, dtype=dtype) if act else None

    def __call__(self, x: Float[Array, "b h w before"]) -> Float[Array, "b h2 w2 after"]:
        x = self.norm(self.conv(x))
        return x if self.act is None else self.act(x)


class Pyramid(nnx.Module):
    """EESP: grouped 1x1 convolution, four dilated depth-wise ones with running sums, grouped 1x1 convolution.

    With stride 1 the input is added. x: [B, h, w, before] -> [B, h/stride, w/stride, after]. Source: section 3.2.
    """

    def __init__(
        self, before: int, after: int, dilations: tuple[int, ...], *, stride: int = 1, eps: float, dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        width = after // BRANCHES
        self.stride = stride
        self.reduce = ConvNorm(before, width, 1, groups=BRANCHES, eps=eps, dtype=dtype, rngs=rngs)
        self.branches = nnx.List(
            conv(
                width, width, 3, stride=stride, padding=d, dilation=d, groups=width, use_bias=False, dtype=dtype,
                rngs=rngs,
            )
            for d in dilations
        )  # fmt: skip
        self.joined = NormAct(after, eps=eps, dtype=dtype, rngs=rngs)
        self.expand = ConvNorm(after, after, 1, groups=BRANCHES, act=False, eps=eps, dtype=dtype, rngs=rngs)
        # checkpoints hold the slope of blocks with stride 2 too, which is not used there
        self.act = PRelu(after, dtype=dtype)

    def __call__(self, x: Float[Array, "b h w before"]) -> Float[Array, "b h2 w2 after"]:
        reduced = self.reduce(x)
        sums = [self.branches[0](reduced)]
        for branch in list(self.branches)[1:]:
            sums.append(branch(reduced) + sums[-1])
        y = self.expand(self.joined(jnp.concatenate(sums, axis=-1)))
        return self.act(y + x) if self.stride == 1 else y


class Down(nnx.Module):
    """Halves the map: its average beside a pyramid, plus features of the shrunk image (section 3.3)."""

    def __init__(self, before: int, after: int, *, eps: float, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.pyramid = Pyramid(before, after - before, WIDE, stride=2, eps=eps, dtype=dtype, rngs=rngs)
        self.image = ConvNorm(3, 3, 3, eps=eps, dtype=dtype, rngs=rngs)
        self.image_out = ConvNorm(3, after, 1, act=False, eps=eps, dtype=dtype, rngs=rngs)
        self.act = PRelu(after, dtype=dtype)

    def __call__(
        self, x: Float[Array, "b h w before"], image: Float[Array, "b H W 3"]
    ) -> Float[Array, "b h2 w2 after"]:
        """Returns the map at twice the stride; `image` is the whole input."""
        average = halved(x)
        while image.shape[1] > average.shape[1]:
            image = halved(image)
        return self.act(jnp.concatenate([average, self.pyramid(x)], axis=-1) + self.image_out(self.image(image)))


class Pooling(nnx.Module):
    """Pyramid pooling: depth-wise convolutions at five scales, mixed per channel (the decoder's step).

    x: [B, h, w, before] -> [B, h, w, after]. The last one ends with a bias and without normalisation.
    """

    def __init__(
        self, before: int, after: int, width: int, *, last: bool, eps: float, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        joined = width * len(SCALES)
        self.project = ConvNorm(before, width, 1, eps=eps, dtype=dtype, rngs=rngs)
        self.scales = nnx.List(
            conv(width, width, 3, padding=1, groups=width, use_bias=False, dtype=dtype, rngs=rngs) for _ in SCALES
        )
        self.joined = NormAct(joined, eps=eps, dtype=dtype, rngs=rngs)
        self.mix = ConvNorm(joined, width, 3, groups=width, eps=eps, dtype=dtype, rngs=rngs)
        self.out = conv(width, after, 1, use_bias=last, dtype=dtype, rngs=rngs)
        self.out_act = None if last else NormAct(after, eps=eps, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w before"]) -> Float[Array, "b h w after"]:
        x = self.project(x)
        b, h, w, width = x.shape
        scaled = []
        for scale, layer in zip(SCALES, self.scales, strict=True):
            size = (max(LEAST_SIDE, math.ceil(h * scale)), max(LEAST_SIDE, math.ceil(w * scale)))
            if scale > 1:
                scaled.append(adaptive_average(layer(resize(x, size, align_corners=True)), (h, w)))
            elif scale == 1:
                scaled.append(layer(x))
            else:
                scaled.append(resize(layer(adaptive_average(x, size)), (h, w), align_corners=True))
        y = self.joined(jnp.concatenate(scaled, axis=-1))
        # the scales of one channel become neighbours, which the grouped convolution mixes
        y = y.reshape(b, h, w, len(SCALES), width).swapaxes(-1, -2).reshape(b, h, w, -1)
        y = self.out(self.mix(y))
        return y if self.out_act is None else self.out_act(y)


class Skip(nnx.Module):
    """Activated sum of an encoder map x, convolved and gated by its mean, and a decoder map y of half its size."""

    def __init__(self, before: int, after: int, *, eps: float, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.gate = conv(before, after, 1, use_bias=False, dtype=dtype, rngs=rngs)
        self.expand = ConvNorm(before, after, 3, groups=math.gcd(before, after), eps=eps, dtype=dtype, rngs=rngs)
        self.sum = NormAct(after, eps=eps, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w before"], y: Float[Array, "b h2 w2 after"]
    ) -> Float[Array, "b h w after"]:
        gate = jax.nn.sigmoid(self.gate(x.mean((1, 2), keepdims=True, dtype=jnp.float32).astype(x.dtype)))
        return self.sum(self.expand(x) * gate + resize(y, (x.shape[1], x.shape[2]), align_corners=True))


class EspNetV2Encoder(nnx.Module):
    """Image -> maps at strides 2, 4, 8, 16. `dtype` is what it computes in; parameters are drawn in float32."""

    def __init__(self, config: EspNetV2Config, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        options: dict = {"eps": config.eps, "dtype": dtype, "rngs": rngs}
        c1, c2, c3, c4 = config.channels
        self.dtype = dtype
        self.stem = ConvNorm(3, c1, 3, stride=2, **options)
        self.down2, self.down3, self.down4 = Down(c1, c2, **options), Down(c2, c3, **options), Down(c3, c4, **options)
        self.blocks3 = nnx.List(Pyramid(c3, c3, WIDE, **options) for _ in range(config.repeats[0]))
        self.blocks4 = nnx.List(Pyramid(c4, c4, NARROW, **options) for _ in range(config.repeats[1]))

    def maps(self, pixels: Float[Array, "b H W 3"]) -> dict[str, Float[Array, "b h w c"]]:
        """Returns x1 .. x4, and x3_0 and x4_0, the results of the two last downsamplings; raises as `stages`."""
        if len(pixels.shape) != 4 or pixels.shape[3] != 3 or pixels.shape[1] % FACTOR or pixels.shape[2] % FACTOR:
            raise UserError(
                f"pixels: of shape {list(pixels.shape)}, not [B, H, W, 3] with sides that are multiples of {FACTOR}; "
                "crop or resize them"
            )
        image = pixels.astype(self.dtype)
        maps = {"x1": self.stem(image)}
        x = maps["x2"] = self.down2(maps["x1"], image)
        for level, down, blocks in (("x3", self.down3, self.blocks3), ("x4", self.down4, self.blocks4)):
            x = maps[f"{level}_0"] = down(x, image)
            for block in blocks:
                x = block(x)
            maps[level] = x
        return maps

    def stages(
        self, pixels: Float[Array, "b H W 3"], key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "b h w c"], ...]:
        """Returns the maps of the four levels; nothing is dropped, so that the key of other encoders is not used.

        Raises UserError where a side is no multiple of 16.
        """
        maps = self.maps(pixels)
        return maps["x1"], maps["x2"], maps["x3"], maps["x4"]


class EspNetV2Head(nnx.Module):
    """Class logits at twice the sides of the first of four maps, which are the image's, float32. Nothing is dropped."""

    def __init__(self, config: EspNetV2Config, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        options: dict = {"eps": config.eps, "dtype": dtype, "rngs": rngs}
        c1, c2, c3, c4 = config.channels
        d1, d2, d3 = config.decoder
        widths = ((c4, d1), (d1, d2), (d2, d3), (d3, config.classes))
        self.pool = nnx.List(
            Pooling(before, after, config.pyramid, last=index == 3, **options)
            for index, (before, after) in enumerate(widths)
        )
        self.skip = nnx.List(Skip(before, after, **options) for before, after in ((c3, d1), (c2, d2), (c1, d3)))

    def maps(self, levels: Sequence[Float[Array, "b h w c"]]) -> dict[str, Float[Array, "b h w c"]]:
        """Returns the results of each step, y1 .. y4 and m2 .. m4, of the encoder's four maps."""
        maps = {"y1": self.pool[0](levels[-1])}
        y = maps["y1"]
        for step, skipped in enumerate(levels[-2::-1]):
            maps[f"m{step + 2}"] = self.skip[step](skipped, y)
            y = maps[f"y{step + 2}"] = self.pool[step + 1](maps[f"m{step + 2}"])
        return maps

    def __call__(
        self, levels: Sequence[Float[Array, "b h w c"]], key: Key[Array, ""] | None = None
    ) -> Float[Array, "b H W classes"]:
        height, width = (2 * side for side in levels[0].shape[1:3])
        return resize(self.maps(levels)["y4"].astype(jnp.float32), (height, width), align_corners=True)


class EspNetV2(EncoderDecoder):
    """Image -> class logits at its own size. `dtype` is what it computes in; parameters are drawn in float32.

    Sides are multiples of 16.
    """

    def __init__(self, config: EspNetV2Config, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.encoder = EspNetV2Encoder(config, dtype=dtype, rngs=rngs)
        self.head = EspNetV2Head(config, dtype=dtype, rngs=rngs)


def halved(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Returns means over 3x3 windows at stride 2, the zeros around the map counted in."""
    window, strides = (1, 3, 3, 1), (1, 2, 2, 1)
    total = lax.reduce_window(x.astype(jnp.float32), 0.0, lax.add, window, strides, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return (total / 9).astype(x.dtype)


def adaptive_average(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b h2 w2 c"]:
    """Returns means over `size` cells: cell i of n covers rows floor(i h / n) to ceil((i + 1) h / n) - 1."""
    return apply_matrices(x, *(jnp.asarray(_cells(n, m)) for n, m in zip(x.shape[1:3], size, strict=True)))


def _cells(n_in: int, n_out: int) -> Float[np.ndarray, "n_out n_in"]:
    """Returns the matrix of means over cells; each row sums to one."""
    index, cell = np.arange(n_in)[None], np.arange(n_out)[:, None]
    inside = (index >= cell * n_in // n_out) & (index < -(-(cell + 1) * n_in // n_out))
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)
