"""Changes of colour and sharpness. Images are RGB in 0..255, uint8 or float; results are float32, not rounded.

Semantics and constants are those of DACS as rewritten in DAFormer (Tranheden et al. 2021, Hoyer et al. 2022), whose
jitter is that of kornia 0.5.8.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def strong_augmentation(
    key: Any, images: Num[Array, "b h w 3"], *, strength: float = 0.2, jitter: float = 0.8, blur: float = 0.5
) -> Float[Array, "b h w 3"]:
    """Returns the images after `colour_jitter` with probability `jitter`, then `gaussian_blur` with probability `blur`.

    Whether each of the two applies is drawn once for the whole batch, its amounts for each image. The defaults are
    DAFormer's; the original DACS has a strength of 0.25.
    """
    jitter_key, blur_key, *amount_keys = jax.random.split(key, 4)
    x = images.astype(jnp.float32)
    x = jax.lax.cond(
        jax.random.bernoulli(jitter_key, jitter), lambda x: colour_jitter(amount_keys[0], x, strength), lambda x: x, x
    )
    return jax.lax.cond(
        jax.random.bernoulli(blur_key, blur), lambda x: gaussian_blur(amount_keys[1], x), lambda x: x, x
    )


def colour_jitter(key: Any, images: Num[Array, "b h w 3"], strength: float = 0.2) -> Float[Array, "b h w 3"]:
    """Returns images `jittered` in a random order with amounts from U(-strength, strength), both drawn per image."""
    order_key, amount_key = jax.random.split(key)
    order = jnp.argsort(jax.random.uniform(order_key, (len(images), 4)), axis=1)
    amounts = jax.random.uniform(amount_key, (len(images), 4), minval=-strength, maxval=strength)
    return jittered(images, order, amounts)


def ssd_jitter(key: Any, images: Num[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Returns images `jittered` as SSD does (Liu et al. 2016), the jitter of Mask2Former and CLOUDS."""
    return jittered(images, *ssd_amounts(key, len(images)))


def ssd_amounts(key: Any, count: int) -> tuple[Int[Array, "b 4"], Float[Array, "b 4"]]:
    """Returns the order and the amounts of SSD's jitter for so many images.

    Brightness changes by up to 32 of 255, contrast and saturation by a factor of 0.5 to 1.5, hue by up to 18 of 180,
    each with probability 1/2. Brightness is first; contrast comes before or after saturation and hue.
    """
    order_key, chance_key, amount_key = jax.random.split(key, 3)
    orders = jnp.array([[BRIGHTNESS, CONTRAST, SATURATION, HUE], [BRIGHTNESS, SATURATION, HUE, CONTRAST]])
    order = orders[jax.random.bernoulli(order_key, shape=(count,)).astype(jnp.int32)]
    applied = jax.random.bernoulli(chance_key, shape=(count, 4))
    amounts = jax.random.uniform(amount_key, (count, 4), minval=-1.0) * jnp.array([[32 / 255, 0.5, 0.5, 18 / 180]])
    return order, jnp.where(applied, amounts, 0.0)


def jittered(
    images: Num[Array, "b h w 3"], order: Int[Array, "b 4"], amounts: Float[Array, "b 4"]
) -> Float[Array, "b h w 3"]:
    """Returns the images after four changes, in the order of each row of `order`.

    With RGB in 0..1 and an amount a: BRIGHTNESS adds a; CONTRAST multiplies by 1 + a, not about the mean; SATURATION
    multiplies the S of HSV by 1 + a; HUE turns H by a of a full turn. The first three are clipped to 0..1.
    """
    # channels as planes: a last axis of three would keep the processor from using its vector units
    x = jnp.moveaxis(images.astype(jnp.float32) / 255, -1, 0)
    for place in range(4):
        change = order[:, place, None, None]
        brightness, contrast, saturation, hue = (
            jnp.where(change == k, amounts[:, k, None, None], 0.0) for k in range(4)
        )
        changed = jnp.clip(x * (1 + contrast)[None] + brightness[None], 0, 1)
        x = jnp.where((change >= SATURATION)[None], _changed_hsv(x, 1 + saturation, hue), changed)
    return 255 * jnp.moveaxis(x, 0, -1)


def _changed_hsv(
    x: Float[Array, "3 b h w"], saturation: Float[Array, "b 1 1"], turn: Float[Array, "b 1 1"]
) -> Float[Array, "3 b h w"]:
    """Returns RGB in 0..1 with S multiplied and H turned."""
    red, green, blue = x
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    unit = jnp.where(chroma == 0, 1.0, chroma)
    hue = jnp.where(
        value == red,
        (green - blue) / unit,
        jnp.where(value == green, 2 + (blue - red) / unit, 4 + (red - green) / unit),
    )
    s = jnp.clip(chroma / jnp.where(value == 0, 1.0, value) * saturation, 0, 1)

    def channel(offset: int) -> Float[Array, "b h w"]:
        turns = (offset + hue) / 6 + turn
        sixths = 6 * (turns - jnp.floor(turns))
        return value * (1 - s * jnp.clip(jnp.minimum(sixths, 4 - sixths), 0, 1))

    return jnp.stack([channel(offset) for offset in (5, 3, 1)])


def gaussian_blur(
    key: Any, images: Num[Array, "b h w 3"], sigma: tuple[float, float] = (0.15, 1.15)
) -> Float[Array, "b h w 3"]:
    """Returns blurred images, the deviation in pixels drawn from U(sigma) for each; borders mirror without the edge.

    The kernel has `kernel_size` taps along each side. Those further than five times the largest deviation are left
    out: together they weigh less than 1e-6.
    """
    sigmas = jax.random.uniform(key, (len(images),), minval=sigma[0], maxval=sigma[1])
    x = images.astype(jnp.float32)
    for axis in (1, 2):
        radius = min(kernel_size(x.shape[axis]) // 2, math.ceil(5 * sigma[1]))
        offsets = jnp.arange(-radius, radius + 1)[None]
        weights = jax.nn.softmax(-0.5 * jnp.square(offsets / sigmas[:, None]), axis=1)[..., None, None, None]
        margin = [(radius, radius) if a == axis else (0, 0) for a in range(4)]
        padded = jnp.pad(x, margin, mode="reflect")
        shifted = (
            weights[:, tap] * jax.lax.slice_in_dim(padded, tap, tap + x.shape[axis], axis=axis)
            for tap in range(2 * radius + 1)
        )
        x = sum(shifted, jnp.zeros_like(x))
    return x


def kernel_size(side: int) -> int:
    """Returns DACS's odd number of taps for a side of so many pixels, a tenth of it: 51 for 512, 103 for 1024."""
    tenth = math.ceil(0.1 * side)
    return math.floor(tenth - 0.5 + tenth % 2)
