"""Blocks that Stable Diffusion's UNet and autoencoder share: residual block, down- and upsampling."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fmda.nn.conv import conv
from fmda.nn.norm import group_norm


class ResBlock(nnx.Module):
    """Two 3x3 convolutions, each after GroupNorm and SiLU. x: [B, h, w, in] -> [B, h, w, out].

    With `time_width` the projected time embedding is added between them. Source: Rombach et al. 2022, appendix E.
    """

    def __init__(
        self, width_in: int, width_out: int, *, groups: int, eps: float, time_width: int | None = None,
        dtype: DTypeLike, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.norm1 = group_norm(width_in, groups, eps=eps, dtype=dtype, rngs=rngs)
        self.conv1 = conv(width_in, width_out, 3, padding=1, dtype=dtype, rngs=rngs)
        self.time = None if time_width is None else nnx.Linear(time_width, width_out, dtype=dtype, rngs=rngs)
        self.norm2 = group_norm(width_out, groups, eps=eps, dtype=dtype, rngs=rngs)
        self.conv2 = conv(width_out, width_out, 3, padding=1, dtype=dtype, rngs=rngs)
        self.shortcut = None if width_in == width_out else conv(width_in, width_out, 1, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w in"], time: Float[Array, "b t"] | None = None
    ) -> Float[Array, "b h w out"]:
        """Returns the block's output; `time` is the embedding that all blocks of a UNet get, before its SiLU."""
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        if self.time is not None and time is not None:
            y = y + self.time(jax.nn.silu(time))[:, None, None]
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class Downsample(nnx.Module):
    """A 3x3 convolution of stride 2. x: [B, h, w, c] -> [B, h/2, w/2, c].

    `symmetric` pads both sides by one (UNet); else the right and lower side alone (autoencoder).
    """

    def __init__(self, width: int, *, symmetric: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.symmetric = symmetric
        self.conv = conv(width, width, 3, stride=2, padding=int(symmetric), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return self.conv(x if self.symmetric else jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))))


class Upsample(nnx.Module):
    """Each value repeated 2x2, then a 3x3 convolution. x: [B, h, w, c] -> [B, 2h, 2w, c]."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.conv = conv(width, width, 3, padding=1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        b, h, w, c = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
        return self.conv(x)
