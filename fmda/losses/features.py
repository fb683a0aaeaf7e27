"""Losses on the features of a network: distance to another network's, distance and confusion of domains."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fmda.losses.pixelwise import IGNORE

THINGS = (6, 7, 11, 12, 13, 14, 15, 16, 17, 18)
"""Traffic lights and signs, people and vehicles among the 19 classes of Cityscapes."""


def coarse_labels(
    labels: Int[Array, "b H W"], size: tuple[int, int], classes: int, least: float = 0.75
) -> Int[Array, "b h w"]:
    """Returns for each cell of H // h by W // w pixels the most frequent label; 255 where its share is below `least`.

    Pixels labelled 255 count in the share.
    """
    (h, w), b = size, len(labels)
    rows, columns = labels.shape[1] // h, labels.shape[2] // w
    cells = jnp.where(labels == IGNORE, classes, labels)[:, : h * rows, : w * columns]
    values = jnp.arange(classes + 1).reshape(1, 1, 1, 1, 1, -1)
    shares = (cells.reshape(b, h, rows, w, columns, 1) == values).mean((2, 4), dtype=jnp.float32)
    best = shares.argmax(-1)
    return jnp.where((shares.max(-1) >= least) & (best < classes), best, IGNORE)


def feature_distance(
    features: Float[Array, "b h w c"],
    reference: Float[Array, "b h w c"],
    labels: Int[Array, "b H W"],
    classes: int,
    things: tuple[int, ...] = THINGS,
) -> Float[Array, ""]:
    """Returns the mean Euclidean distance of two networks' features over the cells whose coarse label is a thing.

    0 without such cells. `reference` comes from the frozen ImageNet encoder and gets no gradient.
    Source: Hoyer et al. 2022, DAFormer, section 3.4; weight 0.005.
    """
    _, h, w, _ = features.shape
    mask = jnp.isin(coarse_labels(labels, (h, w), classes), jnp.asarray(things))
    difference = (features - jax.lax.stop_gradient(reference)).astype(jnp.float32)
    # The root of 0 has no finite gradient.
    distance = jnp.sqrt(jnp.square(difference).sum(-1) + 1e-12)
    return (distance * mask).sum() / jnp.maximum(mask.sum(), 1)


def mmd(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, ""]:
    """Returns the squared maximum mean discrepancy of two samples, each of at least two rows; it may be below 0.

    Kernels are the sum of exp(-|a - b|^2 / (2 s^2)) with s^2 = 2^k times the mean squared distance of all pairs, which
    gets no gradient, for k = -3 to 1. Pairs of a row with itself are left out within a sample (unbiased).
    Source: Long et al. 2015, DAN.
    """
    return class_mmd(x, y, jnp.zeros(len(x), jnp.int32), jnp.zeros(len(y), jnp.int32), 1)


def class_mmd(
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    x_classes: Int[Array, " n"],
    y_classes: Int[Array, " m"],
    classes: int,
) -> Float[Array, ""]:
    """Returns the mean over classes of the `mmd` of the rows of a class in x and in y.

    Only classes with at least two rows in both samples count; 0 without any. Rows of class 255 are in no class. The
    kernels of all classes have the widths of all rows.
    """
    n, m = len(x), len(y)
    rows = jnp.concatenate([x, y]).astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    products = jnp.matmul(rows, rows.T, precision=exact)
    lengths = jnp.diagonal(products)
    squared = jnp.maximum(lengths[:, None] + lengths[None] - 2 * products, 0.0)
    mean = jnp.maximum(jax.lax.stop_gradient(squared.mean()), 1e-12)
    kernel = sum((jnp.exp(-squared / (2 * 2.0**k * mean)) for k in range(-3, 2)), jnp.zeros_like(squared))
    own = kernel * (1 - jnp.eye(n + m))
    ours, theirs = jax.nn.one_hot(x_classes, classes), jax.nn.one_hot(y_classes, classes)
    a, b = ours.sum(0), theirs.sum(0)

    def average(kernel: Array, left: Array, right: Array, pairs: Array) -> Array:
        return jnp.einsum("ik,ij,jk->k", left, kernel, right, precision=exact) / jnp.maximum(pairs, 1)

    within = average(own[:n, :n], ours, ours, a * (a - 1)) + average(own[n:, n:], theirs, theirs, b * (b - 1))
    distances = within - 2 * average(kernel[:n, n:], ours, theirs, a * b)
    counted = (a > 1) & (b > 1)
    return (distances * counted).sum() / jnp.maximum(counted.sum(), 1)


@jax.custom_vjp
def reverse_gradient(x: Float[Array, "..."], scale: Float[Array, ""]) -> Float[Array, "..."]:
    """Returns x; its gradient is multiplied by -scale on the way back (Ganin and Lempitsky 2015)."""
    return x


reverse_gradient.defvjp(lambda x, scale: (x, scale), lambda scale, gradient: (-scale * gradient, jnp.zeros_like(scale)))


def reversal_scale(progress: Float[Array, ""]) -> Float[Array, ""]:
    """Returns the scale of the reversed gradient, 2 / (1 + exp(-10 p)) - 1, rising from 0 to 1 with progress p."""
    return 2 * jax.nn.sigmoid(10 * progress) - 1
