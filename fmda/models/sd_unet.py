"""The UNet of Stable Diffusion 1.x and 2.x (Rombach et al. 2022): noise or velocity from latents, time and text."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from fmda.errors import UserError
from fmda.models.sd_blocks import Downsample, ResBlock, Upsample
from fmda.nn.activation import ACTIVATIONS
from fmda.nn.attention import memory_efficient_attention
from fmda.nn.conv import conv
from fmda.nn.norm import group_norm, layer_norm

Remat = Literal["none", "dots", "blocks"]

POLICIES: dict[str, Callable[..., Any] | None] = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        lambda primitive, *_, **__: primitive is jax.lax.conv_general_dilated_p,
    ),
    "blocks": None,
}
"""What each `Remat` but "none" keeps of a block besides its inputs."""


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the UNet; the defaults are Stable Diffusion 1.x.

    Attributes:
        channels: width of each level; the first is also the width of the time sinusoid.
        layers: residual blocks of a level on the way down; one more on the way up.
        attention: levels with spatial transformers.
        heads: attention heads of each level (what diffusers calls `attention_head_dim`).
        context_width: width of the text states.
        linear_projection: how the transformers' outer projections are stored: linear (2.x) or 1x1 convolution (1.x).
        groups: of every GroupNorm.
        sample_size: side of the latents it was trained on.
        gate: of the transformers' MLPs. diffusers' Flax release computed the tanh form, PyTorch's the exact one.
        transformer_eps: epsilon of the transformers' GroupNorm; 1e-5 in the Flax release.
    """

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2
    attention: tuple[bool, ...] = (True, True, True, False)
    heads: tuple[int, ...] = (8, 8, 8, 8)
    context_width: int = 768
    linear_projection: bool = False
    groups: int = 32
    sample_size: int = 64
    gate: Literal["gelu", "gelu_tanh"] = "gelu"
    transformer_eps: float = 1e-6

    @property
    def factor(self) -> int:
        """What the sides of the latents must be a multiple of."""
        return 2 ** (len(self.channels) - 1)


def time_sinusoid(timesteps: Num[Array, "b"], width: int) -> Float[Array, "b width"]:
    """Returns cosines, then sines, of the time at `width / 2` frequencies from 1 to 1/10000, float32."""
    frequencies = np.exp(-np.log(10000.0) * np.arange(width // 2, dtype=np.float32) / (width // 2))
    angles = timesteps.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Attention(nnx.Module):
    """Attention of x [B, n, width] to a context [B, m, context_width], by default itself; no bias in q, k, v."""

    def __init__(self, width: int, heads: int, context_width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.query = nnx.Linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.key = nnx.Linear(context_width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.value = nnx.Linear(context_width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n width"], context: Float[Array, "b m context"] | None = None
    ) -> Float[Array, "b n width"]:
        context = x if context is None else context
        query, key, value = (
            y.reshape(*y.shape[:2], self.heads, -1) for y in (self.query(x), self.key(context), self.value(context))
        )
        return self.out(memory_efficient_attention(query, key, value).reshape(x.shape))


class SpatialTransformer(nnx.Module):
    """Self-attention, attention to the text, gated MLP over all places of a map. x: [B, h, w, width] -> the same."""

    def __init__(self, width: int, heads: int, config: UNetConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.gate = config.gate
        self.norm = group_norm(width, config.groups, eps=config.transformer_eps, dtype=dtype, rngs=rngs)
        self.proj_in = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.norm1 = layer_norm(width, dtype=dtype, rngs=rngs)
        self.self_attention = Attention(width, heads, width, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(width, dtype=dtype, rngs=rngs)
        self.cross_attention = Attention(width, heads, config.context_width, dtype=dtype, rngs=rngs)
        self.norm3 = layer_norm(width, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, 8 * width, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs)
        self.proj_out = nnx.Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w width"], context: Float[Array, "b m context"]
    ) -> Float[Array, "b h w width"]:
        b, h, w, width = x.shape
        y = self.proj_in(self.norm(x).reshape(b, h * w, width))
        y = y + self.self_attention(self.norm1(y))
        y = y + self.cross_attention(self.norm2(y), context)
        value, gate = jnp.split(self.up(self.norm3(y)), 2, axis=-1)
        y = y + self.down(value * ACTIVATIONS[self.gate](gate))
        return x + self.proj_out(y).reshape(x.shape)


class Level(nnx.Module):
    """The blocks of one resolution, on one way of the UNet."""

    def __init__(
        self, widths_in: tuple[int, ...], width: int, config: UNetConfig, level: int, *, up: bool, last: bool,
        dtype: DTypeLike, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        time_width, groups = 4 * config.channels[0], config.groups
        self.blocks = nnx.List(
            ResBlock(i, width, groups=groups, eps=1e-5, time_width=time_width, dtype=dtype, rngs=rngs)
            for i in widths_in
        )
        count = len(widths_in) if config.attention[level] else 0
        self.attentions = nnx.List(
            SpatialTransformer(width, config.heads[level], config, dtype=dtype, rngs=rngs) for _ in range(count)
        )
        resample: Downsample | Upsample | None = None
        if not last and up:
            resample = Upsample(width, dtype=dtype, rngs=rngs)
        elif not last:
            resample = Downsample(width, symmetric=True, dtype=dtype, rngs=rngs)
        self.resample = resample


class UNet(nnx.Module):
    """Latents [B, h, w, 4], timesteps [B], text states [B, T, context_width] -> prediction [B, h, w, 4], float32.

    h and w are multiples of `config.factor`. For the backward pass `remat="blocks"` keeps only the blocks' inputs,
    "dots" the convolutions and projections too: norms, activations and attention are then all that is computed again.
    """

    def __init__(
        self, config: UNetConfig, *, dtype: DTypeLike = jnp.float32, remat: Remat = "none", rngs: nnx.Rngs
    ) -> None:
        self.config, self.dtype, self.remat = config, dtype, remat
        channels, last = config.channels, len(config.channels) - 1
        first = channels[0]
        self.time1 = nnx.Linear(first, 4 * first, dtype=dtype, rngs=rngs)
        self.time2 = nnx.Linear(4 * first, 4 * first, dtype=dtype, rngs=rngs)
        self.conv_in = conv(config.in_channels, first, 3, padding=1, dtype=dtype, rngs=rngs)
        self.down: nnx.List[Level] = nnx.List()
        skips = [first]
        for level, width in enumerate(channels):
            widths = (skips[-1], *(width,) * (config.layers - 1))
            self.down.append(Level(widths, width, config, level, up=False, last=level == last, dtype=dtype, rngs=rngs))
            skips += [width] * (config.layers + (level < last))
        wide = channels[-1]
        block: dict[str, Any] = {"groups": config.groups, "eps": 1e-5, "time_width": 4 * first}
        self.mid1 = ResBlock(wide, wide, **block, dtype=dtype, rngs=rngs)
        self.mid_attention = SpatialTransformer(wide, config.heads[-1], config, dtype=dtype, rngs=rngs)
        self.mid2 = ResBlock(wide, wide, **block, dtype=dtype, rngs=rngs)
        self.up: nnx.List[Level] = nnx.List()
        before = wide
        for level in reversed(range(last + 1)):
            width = channels[level]
            widths = tuple((before if j == 0 else width) + skips.pop() for j in range(config.layers + 1))
            self.up.append(Level(widths, width, config, level, up=True, last=level == 0, dtype=dtype, rngs=rngs))
            before = width
        self.norm_out = group_norm(first, config.groups, eps=1e-5, dtype=dtype, rngs=rngs)
        self.conv_out = conv(first, config.out_channels, 3, padding=1, dtype=dtype, rngs=rngs)

    def _check(self, latents: tuple[int, ...], timesteps: tuple[int, ...], context: tuple[int, ...]) -> None:
        """Raises UserError for latents that the levels cannot halve, and for inputs of another shape."""
        config = self.config
        if len(latents) != 4 or latents[3] != config.in_channels:
            raise UserError(
                f"latents: of shape {list(latents)} where the UNet reads [B, h, w, {config.in_channels}]; "
                "take its own VAE"
            )
        if latents[1] % config.factor or latents[2] % config.factor:
            raise UserError(
                f"latents: {latents[1]}x{latents[2]} are no multiples of {config.factor}; choose another image size"
            )
        if timesteps not in ((), latents[:1]) or len(context) != 3 or context[0] != latents[0]:
            raise UserError(
                f"timesteps {list(timesteps)}, context {list(context)} for {latents[0]} latents; give a timestep and "
                "a context [tokens, width] for each"
            )
        if context[-1] != config.context_width:
            raise UserError(
                f"context: {context[-1]} wide where the UNet reads {config.context_width}; take its own text encoder"
            )

    def __call__(
        self,
        latents: Float[Array, "b h w c"],
        timesteps: Num[Array, "b"] | float,
        context: Float[Array, "b t width"],
    ) -> Float[Array, "b h w out"]:
        """Returns the prediction (noise or velocity, as the checkpoint was trained), float32.

        One timestep may stand for all rows. Raises UserError where shapes do not fit.
        """
        self._check(latents.shape, jnp.shape(timesteps), context.shape)
        timesteps = jnp.broadcast_to(jnp.asarray(timesteps), latents.shape[:1])
        run = partial(_run, self.remat)
        context = context.astype(self.dtype)
        time = self.time1(time_sinusoid(timesteps, self.config.channels[0]).astype(self.dtype))
        time = self.time2(jax.nn.silu(time))
        x = self.conv_in(latents.astype(self.dtype))
        skips = [x]
        for level in self.down:
            for j, block in enumerate(level.blocks):
                x = run(block, x, time)
                if len(level.attentions):
                    x = run(level.attentions[j], x, context)
                skips.append(x)
            if level.resample is not None:
                x = level.resample(x)
                skips.append(x)
        x = run(self.mid1, x, time)
        x = run(self.mid_attention, x, context)
        x = run(self.mid2, x, time)
        for level in self.up:
            for j, block in enumerate(level.blocks):
                x = run(block, jnp.concatenate([x, skips.pop()], axis=-1), time)
                if len(level.attentions):
                    x = run(level.attentions[j], x, context)
            if level.resample is not None:
                x = level.resample(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x))).astype(jnp.float32)


def _run(remat: Remat, block: Callable[[Array, Array], Array], x: Array, other: Array) -> Array:
    """Returns the block's output; `remat` says what of it is computed again for the backward pass."""
    if remat == "none":
        return block(x, other)
    return jax.checkpoint(lambda x, other: block(x, other), policy=POLICIES[remat])(x, other)
