"""Small tools of shading over arrays of pixels: colours as triples, antialiased stripes, steps."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array


class Rgb(NamedTuple):
    """A colour per pixel: three arrays of one shape, linear light."""

    red: Array
    green: Array
    blue: Array

    def times(self, k: Array | float) -> "Rgb":
        """Returns the colour scaled by one number per pixel."""
        return Rgb(self.red * k, self.green * k, self.blue * k)

    def plus(self, other: "Rgb") -> "Rgb":
        """Returns the sum."""
        return Rgb(self.red + other.red, self.green + other.green, self.blue + other.blue)

    def filtered(self, other: "Rgb") -> "Rgb":
        """Returns the product, channel by channel."""
        return Rgb(self.red * other.red, self.green * other.green, self.blue * other.blue)

    def mix(self, other: "Rgb", k: Array | float) -> "Rgb":
        """Returns this colour where k is 0, the other where k is 1."""
        return Rgb(*(a + (b - a) * k for a, b in zip(self, other, strict=True)))

    def stack(self) -> Array:
        """Returns the channels as the last axis."""
        return jnp.stack([jnp.broadcast_to(c, self.green.shape) for c in self], -1)


def rgb(red: Array | float, green: Array | float, blue: Array | float) -> Rgb:
    """Returns a colour from numbers or arrays."""
    return Rgb(jnp.asarray(red, jnp.float32), jnp.asarray(green, jnp.float32), jnp.asarray(blue, jnp.float32))


def where(mask: Array, a: Rgb, b: Rgb) -> Rgb:
    """Returns a where the mask holds, else b."""
    return Rgb(*(jnp.where(mask, x, y) for x, y in zip(a, b, strict=True)))


def ramp(x: Array, low: Array | float, high: Array | float) -> Array:
    """Returns 0 below `low`, 1 above `high`, straight between; low may be above high."""
    return jnp.clip((x - low) / (high - low), 0.0, 1.0)


def cover(x: Array, low: Array | float, high: Array | float, width: Array) -> Array:
    """Returns how much of a footprint of `width` around x lies in [low, high], in [0, 1]: an antialiased stripe."""
    half = 0.5 * width
    return jnp.clip((jnp.minimum(x + half, high) - jnp.maximum(x - half, low)) / jnp.maximum(width, 1e-6), 0.0, 1.0)


def cover_cell(f: Array, low: Array | float, high: Array | float, width: Array) -> Array:
    """Returns the same for a stripe repeated in every unit cell, f the position in the cell; fades to its mean."""
    far = ramp(width, 0.5, 1.3)
    return cover(f, low, high, width) * (1.0 - far) + (high - low) * far
