"""Stable Diffusion's autoencoder (Rombach et al. 2022): images to a Gaussian over latents, latents to images."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from fmda.config import PositiveFloat, PositiveInt
from fmda.errors import UserError
from fmda.models.sd_blocks import Downsample, ResBlock, Upsample
from fmda.nn.attention import memory_efficient_attention
from fmda.nn.conv import conv
from fmda.nn.norm import group_norm

EPS = 1e-6
LEAST, MOST = -30.0, 20.0
"""Limits of the log-variance."""


@dataclass(frozen=True)
class VaeConfig:
    """Shape of the autoencoder; the defaults are Stable Diffusion's.

    Attributes:
        channels: width of each level.
        layers: residual blocks of a level in the encoder; one more in the decoder.
        latent_channels: of a latent.
        scale: what sampled latents are multiplied by before the UNet sees them.
        groups: of every GroupNorm.
        sample_size: side of the images it was trained on.
    """

    in_channels: PositiveInt = 3
    channels: tuple[PositiveInt, ...] = (128, 256, 512, 512)
    layers: PositiveInt = 2
    latent_channels: PositiveInt = 4
    scale: PositiveFloat = 0.18215
    groups: PositiveInt = 32
    sample_size: PositiveInt = 512

    @property
    def factor(self) -> int:
        """Pixels along the side of one latent."""
        return 2 ** (len(self.channels) - 1)


class PlaceAttention(nnx.Module):
    """x plus attention with one head among all places of a map. x: [B, h, w, width] -> the same."""

    def __init__(self, width: int, groups: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm = group_norm(width, groups, eps=EPS, dtype=dtype, rngs=rngs)
        self.query = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.key = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.value = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w width"]) -> Float[Array, "b h w width"]:
        b, h, w, width = x.shape
        y = self.norm(x).reshape(b, h * w, 1, width)
        y = memory_efficient_attention(self.query(y), self.key(y), self.value(y))
        return x + self.out(y).reshape(x.shape)


class Middle(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, width: int, groups: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.block1 = ResBlock(width, width, groups=groups, eps=EPS, dtype=dtype, rngs=rngs)
        self.attention = PlaceAttention(width, groups, dtype=dtype, rngs=rngs)
        self.block2 = ResBlock(width, width, groups=groups, eps=EPS, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w width"]) -> Float[Array, "b h w width"]:
        return self.block2(self.attention(self.block1(x)))


class Level(nnx.Module):
    """Residual blocks of one resolution, and what leads to the next."""

    def __init__(
        self, widths: tuple[int, ...], groups: int, resample: Downsample | Upsample | None, *, dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.blocks = nnx.List(
            ResBlock(i, o, groups=groups, eps=EPS, dtype=dtype, rngs=rngs)
            for i, o in zip(widths, widths[1:], strict=False)
        )
        self.resample = resample

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        for block in self.blocks:
            x = block(x)
        return x if self.resample is None else self.resample(x)


class Encoder(nnx.Module):
    """Images [B, H, W, 3] -> moments before the last 1x1 convolution [B, H/f, W/f, 2 * latent_channels]."""

    def __init__(self, config: VaeConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        channels, groups = config.channels, config.groups
        self.conv_in = conv(config.in_channels, channels[0], 3, padding=1, dtype=dtype, rngs=rngs)
        self.levels: nnx.List[Level] = nnx.List()
        before = channels[0]
        for level, width in enumerate(channels):
            last = level == len(channels) - 1
            down = None if last else Downsample(width, symmetric=False, dtype=dtype, rngs=rngs)
            self.levels.append(Level((before, *(width,) * config.layers), groups, down, dtype=dtype, rngs=rngs))
            before = width
        self.mid = Middle(before, groups, dtype=dtype, rngs=rngs)
        self.norm_out = group_norm(before, groups, eps=EPS, dtype=dtype, rngs=rngs)
        self.conv_out = conv(before, 2 * config.latent_channels, 3, padding=1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b H W 3"]) -> Float[Array, "b h w c2"]:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
    """Latents [B, h, w, latent_channels] -> images [B, h*f, w*f, 3]."""

    def __init__(self, config: VaeConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        channels, groups = config.channels, config.groups
        before = channels[-1]
        self.conv_in = conv(config.latent_channels, before, 3, padding=1, dtype=dtype, rngs=rngs)
        self.mid = Middle(before, groups, dtype=dtype, rngs=rngs)
        self.levels: nnx.List[Level] = nnx.List()
        for level, width in reversed(list(enumerate(channels))):
            up = None if level == 0 else Upsample(width, dtype=dtype, rngs=rngs)
            self.levels.append(Level((before, *(width,) * (config.layers + 1)), groups, up, dtype=dtype, rngs=rngs))
            before = width
        self.norm_out = group_norm(before, groups, eps=EPS, dtype=dtype, rngs=rngs)
        self.conv_out = conv(before, config.in_channels, 3, padding=1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        x = self.mid(self.conv_in(x))
        for level in self.levels:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


def signed(pixels: UInt8[Array | np.ndarray, "*b H W 3"]) -> Float[Array, "*b H W 3"]:
    """Returns images as the autoencoder wants them, float32 in [-1, 1]."""
    return jnp.asarray(pixels).astype(jnp.float32) / 127.5 - 1.0


class Vae(nnx.Module):
    """Encoder and decoder with the 1x1 convolutions between them. Latents here are not multiplied by `config.scale`."""

    def __init__(self, config: VaeConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config, self.dtype = config, dtype
        latents = config.latent_channels
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.quant = conv(2 * latents, 2 * latents, 1, dtype=dtype, rngs=rngs)
        self.post_quant = conv(latents, latents, 1, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)

    def encode(self, images: Float[Array, "b H W 3"]) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Returns mean and log-variance (in [-30, 20]) of the latents of images in [-1, 1], float32.

        Latents are not multiplied by `config.scale`. Raises UserError for images that are not RGB, or a side that is
        no multiple of `config.factor`.
        """
        shape, channels, factor = images.shape, self.config.in_channels, self.config.factor
        if len(shape) != 4 or shape[3] != channels:
            raise UserError(f"images: of shape {list(shape)}, not [B, H, W, {channels}]; convert them to RGB")
        if shape[1] % factor or shape[2] % factor:
            raise UserError(f"images: {shape[1]}x{shape[2]} pixels are no multiples of {factor}; crop or resize them")
        moments = self.quant(self.encoder(images.astype(self.dtype))).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, LEAST, MOST)

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        """Returns images, about in [-1, 1] and not clipped, float32.

        Raises UserError for latents with other channels than its own.
        """
        shape, channels = latents.shape, self.config.latent_channels
        if len(shape) != 4 or shape[3] != channels:
            raise UserError(
                f"latents: of shape {list(shape)} where the autoencoder reads [B, h, w, {channels}]; "
                "take those of a UNet made for it"
            )
        return self.decoder(self.post_quant(latents.astype(self.dtype))).astype(jnp.float32)
