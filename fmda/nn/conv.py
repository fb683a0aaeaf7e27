"""Convolutions with torch's padding: the same count of zeros on both sides, whatever the stride."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fmda.errors import UserError
from fmda.nn.grouped import grouped


def conv(
    in_channels: int,
    out_channels: int,
    size: int,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    use_bias: bool = True,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Returns a square NHWC convolution, kernel [size, size, in/groups, out], padded as `torch.nn.Conv2d(padding=)`.

    "SAME" is not used: at stride 2 it pads only at the far side, torch pads both.
    """
    return nnx.Conv(
        in_channels,
        out_channels,
        (size, size),
        strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        kernel_dilation=(dilation, dilation),
        feature_group_count=groups,
        conv_general_dilated=grouped if groups > 1 else jax.lax.conv_general_dilated,
        use_bias=use_bias,
        dtype=dtype,
        rngs=rngs,
    )


def check_sides(pixels: Array, least: int, what: str) -> None:
    """Raises UserError for images [B, H, W, C] with a side below `least`, which `what` explains."""
    height, width = pixels.shape[1:3]
    if min(height, width) < least:
        raise UserError(f"image of {height}x{width} pixels is smaller than {what}; enlarge it first")


def average_pool(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b h2 w2 c"]:
    """Returns means over size x size tiles; a remainder at the far side is dropped, as `torch.nn.AvgPool2d(size)`."""
    if size == 1:
        return x
    b, h, w, c = x.shape
    h, w = h // size, w // size
    tiles = x[:, : h * size, : w * size].reshape(b, h, size, w, size, c)
    return tiles.mean((2, 4), dtype=jnp.float32).astype(x.dtype)
