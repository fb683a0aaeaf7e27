import numpy as np
import pytest
from scipy import linalg

from fmda.errors import UserError
from fmda.evaluate import quality
from fmda.evaluate.quality import alignment, cmmd, frechet_distance, pairwise_diversity, standard_error


def normal(seed, rows, columns, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1.0, (rows, columns)).astype(np.float32)


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def kernel(a, b, sigma):
    return np.array([[np.exp(-np.sum((x - y) ** 2) / (2 * sigma**2)) for y in b] for x in a])


@pytest.mark.parametrize("sigma", [10.0, 0.7])
def test_cmmd_is_the_mean_over_pairs_of_different_unit_rows(sigma):
    a, b = normal(0, 6, 4), normal(1, 8, 4)
    x, y = unit(a), unit(b)
    xx, yy = kernel(x, x, sigma), kernel(y, y, sigma)
    within = (xx.sum() - 6) / 30 + (yy.sum() - 8) / 56
    by_hand = 1000 * (within - 2 * kernel(x, y, sigma).mean())
    assert cmmd(a, b, sigma) == pytest.approx(by_hand, rel=1e-8)
    assert cmmd(3 * a, 0.1 * b, sigma) == pytest.approx(by_hand, rel=1e-6)


def test_cmmd_of_two_points_by_hand():
    # right angle: |x - y|^2 = 2
    a, b = np.array([[2.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 3.0], [0.0, 1.0]])
    assert cmmd(a, b) == pytest.approx(2000 * (1 - np.exp(-0.01)))


def test_cmmd_of_equal_distributions_is_zero_on_average():
    values = [cmmd(normal(seed, 40, 64), normal(seed + 100, 60, 64)) for seed in range(30)]
    assert abs(np.mean(values)) < 0.02


def test_blocks_change_nothing(monkeypatch):
    a, b = normal(0, 37, 6), normal(1, 23, 6, shift=0.3)
    whole = cmmd(a, b), alignment(a, b)
    monkeypatch.setattr(quality, "BLOCK", 100)
    parts = cmmd(a, b), alignment(a, b)
    assert parts[0] == pytest.approx(whole[0], rel=1e-9)
    assert parts[1] == pytest.approx(whole[1])


@pytest.mark.parametrize(("rows", "columns"), [(50, 6), (9, 30)])
def test_frechet_distance_meets_the_matrix_root(rows, columns):
    a, b = normal(0, rows, columns), 1.5 * normal(1, rows + 3, columns, shift=0.4)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # the root of the symmetric form, which always exists: tr (C_a C_b)^1/2 = tr (C_a^1/2 C_b C_a^1/2)^1/2
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(linalg.eigvalsh(root @ second @ root), 0)).sum()
    by_hand = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(first) + np.trace(second) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(by_hand, rel=1e-4)


def test_frechet_distance_of_shifts_and_scales():
    a = normal(0, 40, 5).astype(np.float64)
    shift = np.arange(5.0)
    assert frechet_distance(a, a + shift) == pytest.approx(np.sum(shift**2))
    assert frechet_distance(a, 3 * (a - a.mean(0)) + a.mean(0)) == pytest.approx(4 * np.trace(np.cov(a.T)))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_diversity_is_the_mean_over_pairs():
    x = normal(0, 12, 5, shift=0.5)
    rows = unit(x)
    pairs = [1 - rows[i] @ rows[j] for i in range(12) for j in range(i + 1, 12)]
    assert pairwise_diversity(x) == pytest.approx(np.mean(pairs))
    assert pairwise_diversity(np.ones((5, 3))) == 0
    assert pairwise_diversity(np.array([[1.0, 0], [-1.0, 0]])) == 2


def test_alignment_by_hand():
    crops = np.array([[1.0, 0.0], [0.0, 2.0]])
    generated = np.array([[1.0, 0.0], [1.0, 1.0]])
    near = 1 - np.sqrt(0.5)
    found = alignment(generated, crops)
    assert found.mean == pytest.approx((0 + 1 + near + near) / 4)
    assert found.nearest == pytest.approx(near / 2)


def test_standard_error_of_a_mean():
    x = normal(0, 400, 1)
    error = standard_error(np.mean, x)
    assert error == pytest.approx(x.std() / 20, rel=0.12)
    assert error == standard_error(np.mean, x)
    assert error != standard_error(np.mean, x, seed=1)


def test_errors_cover_the_truth_as_often_as_they_claim():
    # rows of length 1 in equal directions of 16 dimensions are at cosine distance 1 on average
    covered = 0
    for seed in range(60):
        x = normal(seed, 40, 16)
        covered += abs(pairwise_diversity(x) - 1) <= 1.96 * standard_error(pairwise_diversity, x, seed=seed)
    assert 50 <= covered <= 60


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: cmmd(np.ones((3, 4)), np.ones((3, 5))), "4 and 5 columns"),
        (lambda: cmmd(np.ones(3), np.ones((3, 5))), r"shape \(3,\)"),
        (lambda: cmmd(np.ones((2, 2)), np.array([[1.0, 1.0], [0.0, 0.0]])), "row 1 is zero"),
        (lambda: frechet_distance(np.ones((1, 2)), np.ones((2, 2))), "at least 2"),
        (lambda: pairwise_diversity(np.array([[1.0, 2.0], [np.nan, 1.0]])), "row 1 is not finite"),
        (lambda: standard_error(pairwise_diversity, np.ones((3, 2))), "at least 4"),
    ],
)
def test_bad_input_is_one_line(call, word):
    with pytest.raises(UserError, match=word) as caught:
        call()
    assert "\n" not in str(caught.value)
