"""Quality of generated image sets without labels: distance to a target, and diversity.

All measures take features of any encoder, one row per image, and run on the host in float64: the kernel values of
`cmmd` lie so close to 1 that float32 would leave four digits.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from fmda.errors import UserError

BLOCK = 2**22
"""Distances in memory at a time, 32 MiB."""


def cmmd(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"], sigma: float = 10.0) -> float:
    """Returns 1000 times the squared maximum mean discrepancy of two sets of embeddings, about 0 for one distribution.

    Rows are scaled to length 1; the kernel is exp(-|x - y|^2 / (2 sigma^2)). The estimator is unbiased: means run over
    pairs of different rows, so small values may fall below 0. The authors' published code includes pairs of a row
    with itself, which adds about 10 (1 - mean cosine) (1/n + 1/m). With a sigma this wide the value is close to
    1000 / sigma^2 times the squared distance of the mean embeddings: it detects a shift of the whole set, but hardly
    any loss of diversity.
    Source: Jayasumana et al. 2024 ("Rethinking FID"), eq. 4, with its constants; Gretton et al. 2012, eq. 3.
    """
    a, b = _pair(a, b, least=2)
    a, b = _unit(a), _unit(b)
    # k - 1 in place of k: the ones cancel in the sum, and the rest keeps all its digits
    within = [_mean_kernel(rows, rows, sigma) * len(rows) / (len(rows) - 1) for rows in (a, b)]
    return float(1000 * (sum(within) - 2 * _mean_kernel(a, b, sigma)))


def frechet_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Returns the squared Frechet (2-Wasserstein) distance of the Gaussians fitted to two sets of features, >= 0.

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), with sample covariances. The last trace is the sum of the
    singular values of A B^T, where A^T A = C_a and B^T B = C_b, so fewer rows than columns are no special case. The
    value falls with the number of rows: compare sets of one size. Not FID unless the features are Inception's.
    Source: Heusel et al. 2017, eq. 6.
    """
    a, b = _pair(a, b, least=2)
    mean_a, mean_b = a.mean(0), b.mean(0)
    root_a, root_b = _covariance_root(a - mean_a), _covariance_root(b - mean_b)
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    total = np.sum((mean_a - mean_b) ** 2) + np.sum(root_a**2) + np.sum(root_b**2) - 2 * cross
    return float(max(total, 0.0))


def pairwise_diversity(x: Float[np.ndarray, "n d"]) -> float:
    """Returns the mean cosine distance over all pairs of different rows, 0 (all alike) to n / (n - 1) at most."""
    x = _unit(_features(x, "features", least=2))
    count = len(x)
    # sum over i != j of cosines = |sum of rows|^2 - n, so no pair is ever formed
    cosines = (np.sum(x.sum(0) ** 2) - count) / (count * (count - 1))
    return float(max(1.0 - cosines, 0.0))


class Alignment(NamedTuple):
    """Cosine distances of generated images to crops of the target image, averaged over the generated images.

    Attributes:
        mean: to all crops, 0..2: nearness in kind; the smaller the more alike.
        nearest: to the nearest crop, at most `mean`: falls towards 0 where crops are repeated.
    """

    mean: float
    nearest: float


def alignment(generated: Float[np.ndarray, "n d"], target_crops: Float[np.ndarray, "m d"]) -> Alignment:
    """Returns how near generated images are to the crops of one target image."""
    generated, target_crops = _pair(generated, target_crops, least=1)
    generated, target_crops = _unit(generated), _unit(target_crops)
    nearest = sum(float(distances.min(1).sum()) for distances in _cosine_distances(generated, target_crops))
    # the mean of all cosines is the product of the two mean rows
    mean = 1.0 - float(generated.mean(0) @ target_crops.mean(0))
    return Alignment(max(mean, 0.0), nearest / len(generated))


def standard_error(measure: Callable[[np.ndarray], float], x: Float[np.ndarray, "n d"], *, seed: int = 0) -> float:
    """Returns the standard error of `measure(x)` over at least 4 rows, from 200 random halves of the rows.

    Over halves drawn without replacement a mean scatters exactly as the mean of whole samples would. A bootstrap draws
    rows twice, and a measure over pairs would count these as images that are alike.
    Source: Politis and Romano 1994.
    """
    x = _features(x, "features", least=4)
    generator = np.random.default_rng(seed)
    halves = (np.sort(generator.permutation(len(x))[: len(x) // 2]) for _ in range(200))
    return float(np.std([measure(x[half]) for half in halves], ddof=1))


def _features(values: Float[np.ndarray, "n d"], what: str, least: int) -> Float[np.ndarray, "n d"]:
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or len(values) < least or values.shape[1] == 0:
        raise UserError(f"{what}: shape {values.shape}; give one row of features an image, at least {least}")
    broken = np.flatnonzero(~np.isfinite(values).all(1))
    if broken.size:
        raise UserError(f"{what}: row {broken[0]} is not finite; look at that image and the encoder's precision")
    return values


def _pair(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"], least: int
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "m d"]]:
    a, b = _features(a, "first set", least), _features(b, "second set", least)
    if a.shape[1] != b.shape[1]:
        raise UserError(f"features of {a.shape[1]} and {b.shape[1]} columns; encode both sets with one model")
    return a, b


def _unit(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    length = np.linalg.norm(x, axis=1, keepdims=True)
    if not length.all():
        raise UserError(f"features: row {int(np.argmin(length))} is zero and has no direction; look at that image")
    return x / length


def _covariance_root(centred: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "r d"]:
    """Returns R of min(n, d) rows with R^T R the sample covariance."""
    return np.asarray(np.linalg.qr(centred / np.sqrt(len(centred) - 1), mode="r"))


def _cosine_distances(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> Iterator[Float[np.ndarray, "s m"]]:
    """Yields the distances of a few unit rows of `a` at a time to all unit rows of `b`."""
    size = max(BLOCK // len(b), 1)
    for first in range(0, len(a), size):
        yield np.maximum(1 - a[first : first + size] @ b.T, 0.0)


def _mean_kernel(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"], sigma: float) -> float:
    """Returns the mean over all pairs of unit rows of the Gaussian kernel, less 1."""
    # |x - y|^2 = 2 (1 - cosine)
    total = sum(float(np.expm1(-distances / sigma**2).sum()) for distances in _cosine_distances(a, b))
    return total / (len(a) * len(b))
