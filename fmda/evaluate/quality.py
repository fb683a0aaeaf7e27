"""Quality of generated image sets without labels: distance to a target, and diversity.

All measures read features, one row an image, of any encoder, and are computed on the host in float64: the kernel
values of `cmmd` lie so close to 1 that float32 would leave it four digits. No measure holds more than a block of rows
against the other set at a time, so sets of tens of thousands of images fit.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from fmda.errors import UserError

BLOCK = 2**22
"""Distances that are held at once, 32 MiB of them."""


def cmmd(
    a: Float[np.ndarray, "n d"],
    b: Float[np.ndarray, "m d"],
    sigma: float = 10.0,
    scale: float = 1000.0,
    *,
    unbiased: bool = False,
) -> float:
    """Returns `scale` times the squared maximum mean discrepancy of two sets of embeddings, 0 for equal sets.

    Rows are brought to length 1 first; the kernel is exp(-|x - y|^2 / (2 sigma^2)). As the authors' published code
    does it, means run over all pairs, those of a row with itself included (the V-statistic, biased): two samples of
    one distribution come out at about 10 (1 - mean cosine) (1/n + 1/m) at the default constants, so compare sets of
    equal sizes, or ask for the unbiased form, which averages over different rows and may fall below 0.

    With a sigma this wide the kernel is nearly linear and the value close to scale / sigma^2 times the squared
    distance between the mean embeddings: it detects a shift of the whole set, but hardly any loss of diversity.
    Source: Jayasumana et al. 2024 ("Rethinking FID"), eq. 4, with its constants; Gretton et al. 2012, eq. 3 and 5.
    """
    a, b = _pair(a, b, least=2 if unbiased else 1)
    a, b = _unit(a), _unit(b)
    # k - 1 in place of k: the ones cancel in the sum, and what remains keeps all its digits
    within = []
    for rows in (a, b):
        mean = _mean_kernel(rows, rows, sigma)
        within.append(mean * len(rows) / (len(rows) - 1) if unbiased else mean)
    return float(scale * (within[0] + within[1] - 2 * _mean_kernel(a, b, sigma)))


def frechet_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Returns the squared Frechet (2-Wasserstein) distance of the Gaussians fitted to two sets of features, >= 0.

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), with sample covariances. The last trace is the sum of the
    singular values of A B^T, where A^T A = C_a and B^T B = C_b: no root of a product of rank-deficient matrices is
    taken, so fewer rows than columns need no special care. The value itself falls with the number of rows, so compare
    equal ones. Not FID unless the features are Inception's. Source: Heusel et al. 2017, eq. 6.
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
    nearest = sum(float(squared.min(1).sum()) for _, squared in _blocks(generated, target_crops)) / 2
    # the mean of all cosines is the product of the two mean rows
    mean = 1.0 - float(generated.mean(0) @ target_crops.mean(0))
    return Alignment(max(mean, 0.0), nearest / len(generated))


class Spread(NamedTuple):
    """A measure of a sample and its sampling error.

    Attributes:
        value: of the whole sample.
        low, high: the interval.
        error: standard error.
    """

    value: float
    low: float
    high: float
    error: float


def spread(
    measure: Callable[..., float],
    *sets: Float[np.ndarray, "n d"],
    rounds: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Spread:
    """Returns `measure(*sets)` with the interval that resampling the rows of every set gives.

    Each round takes a random half of the rows of each set, none twice; over such halves a mean scatters exactly as
    the mean of whole samples would. A bootstrap draws rows twice, which a measure over pairs takes for images that
    are alike. Deviations are taken from the mean of the rounds, so a bias that grows in smaller samples stays out.
    Close `measure` over what shall not be resampled (the crops of the one target image).
    Source: Politis and Romano 1994.

    Args:
        measure: arrays of rows -> number.
        sets: of at least 4 rows each.
        rounds: resamples, at least 2.
        level: share of the resamples inside the interval, in (0, 1).
        seed: same seed, same interval.
    """
    arrays = [np.asarray(rows) for rows in sets]
    if not arrays or min(len(rows) for rows in arrays) < 4 or rounds < 2 or not 0 < level < 1:
        raise UserError(
            f"spread: {[len(rows) for rows in arrays]} rows, {rounds} rounds, level {level}; "
            "give sets of at least 4 rows, 2 rounds, and a level between 0 and 1"
        )
    generator = np.random.default_rng(seed)
    values = np.empty(rounds)
    for turn in range(rounds):
        halves = [rows[np.sort(generator.permutation(len(rows))[: len(rows) // 2])] for rows in arrays]
        values[turn] = measure(*halves)
    value = float(measure(*arrays))
    low, high = np.quantile(values - values.mean(), [(1 - level) / 2, (1 + level) / 2])
    return Spread(value, value - float(high), value - float(low), float(values.std(ddof=1)))


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


def _squared_distances(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    squares = np.sum(a**2, axis=1)[:, None] + np.sum(b**2, axis=1)[None, :]
    return np.maximum(squares - 2 * (a @ b.T), 0.0)


def _blocks(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]
) -> Iterator[tuple[Float[np.ndarray, "s d"], Float[np.ndarray, "s m"]]]:
    """Yields runs of rows of `a` with their squared distances to all rows of `b`."""
    size = max(BLOCK // len(b), 1)
    for first in range(0, len(a), size):
        rows = a[first : first + size]
        yield rows, _squared_distances(rows, b)


def _mean_kernel(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"], sigma: float) -> float:
    """Returns the mean over all pairs of the Gaussian kernel, less 1."""
    total = sum(float(np.expm1(-squared / (2 * sigma**2)).sum()) for _, squared in _blocks(a, b))
    return total / (len(a) * len(b))
