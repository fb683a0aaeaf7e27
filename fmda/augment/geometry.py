"""Windows and mirror images. `arrays` are trees of images, labels or weights [b, H, W, ...], treated alike."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def flipped(arrays: Any, flip: Bool[Array, " b"]) -> Any:
    """Returns the arrays, those rows mirrored left and right where `flip` is true."""
    return jax.tree.map(lambda x: jnp.where(flip.reshape(-1, *(1,) * (x.ndim - 1)), x[:, :, ::-1], x), arrays)


def random_flip(key: Any, arrays: Any, probability: float = 0.5) -> Any:
    """Returns the arrays, each row mirrored left and right with a probability."""
    count = jax.tree.leaves(arrays)[0].shape[0]
    return flipped(arrays, jax.random.bernoulli(key, probability, (count,)))


def windows(
    arrays: Any, rows: Int[Array, " b"], top: Int[Array, " b"], left: Int[Array, " b"], size: tuple[int, int]
) -> Any:
    """Returns the windows [b, h, w, ...] of size (h, w) at (top, left) of these rows of the arrays [n, H, W, ...].

    Windows lie inside; one that would not is moved back.
    """

    def cut(x: Array) -> Array:
        def one(row: Array, top: Array, left: Array) -> Array:
            start = (row, top, left, *(jnp.zeros_like(row) for _ in x.shape[3:]))
            return jax.lax.dynamic_slice(x, start, (1, *size, *x.shape[3:]))[0]

        return jax.vmap(one)(rows, top, left)

    return jax.tree.map(cut, arrays)


def random_crop(key: Any, arrays: Any, size: tuple[int, int]) -> Any:
    """Returns a window of size (h, w) of each row, the place uniform over all that lie inside."""
    count, height, width = jax.tree.leaves(arrays)[0].shape[:3]
    top, left = (
        jax.random.randint(k, (count,), 0, whole - part + 1)
        for k, whole, part in zip(jax.random.split(key), (height, width), size, strict=True)
    )
    return windows(arrays, jnp.arange(count), top, left, size)
