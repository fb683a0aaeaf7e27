"""Deterministic noise on integer lattices: hashes, value noise, fractal sums."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def lattice(i: Array | int, j: Array | int, seed: Array | int = 0) -> Float[Array, "..."]:
    """Returns a uniform number in [0, 1) for each integer cell (i, j) and seed, all of one shape or scalar."""
    row, column, salt = (jnp.asarray(a).astype(jnp.int32).astype(jnp.uint32) for a in (i, j, seed))
    h = row * jnp.uint32(0x9E3779B1) + column * jnp.uint32(0x85EBCA77) + salt * jnp.uint32(0xC2B2AE3D)
    h = (h ^ (h >> 15)) * jnp.uint32(0x2C1B3C6D)
    h = (h ^ (h >> 13)) * jnp.uint32(0x297A2D39)
    return (h >> 8).astype(jnp.int32).astype(jnp.float32) * jnp.float32(2.0**-24)


def value_noise(x: Array, y: Array, seed: Array | int = 0) -> Float[Array, "..."]:
    """Returns smooth noise in [0, 1] with one random value per unit cell; x, y and seed of one shape."""
    i, j = jnp.floor(x), jnp.floor(y)
    u, v = x - i, y - j
    u, v = u * u * (3.0 - 2.0 * u), v * v * (3.0 - 2.0 * v)
    low = lattice(i, j, seed) * (1.0 - u) + lattice(i + 1.0, j, seed) * u
    high = lattice(i, j + 1.0, seed) * (1.0 - u) + lattice(i + 1.0, j + 1.0, seed) * u
    return low * (1.0 - v) + high * v


def fractal(x: Array, y: Array, seed: Array | int = 0, octaves: int = 2) -> Float[Array, "..."]:
    """Returns a sum of value noises of doubling frequency and halving weight, in [0, 1]."""
    total = jnp.zeros_like(x)
    weight, norm = 1.0, 0.0
    for octave in range(octaves):
        total = total + weight * value_noise(x, y, seed + 101 * octave)
        norm += weight
        weight *= 0.5
        x, y = 2.03 * x + 17.1, 2.03 * y - 9.7
    return total / norm


def pixel_noise(rows: Int[Array, "..."], columns: Int[Array, "..."], seed: Array | int) -> Float[Array, "..."]:
    """Returns about normal noise of unit variance for each pixel (sum of three uniform numbers)."""
    total = lattice(rows, columns, seed) + lattice(rows, columns, seed + 1) + lattice(rows, columns, seed + 2)
    return (total - 1.5) * 2.0
