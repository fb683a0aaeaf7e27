"""Fusion by hand, and the fast form against the literal one, label for label."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from fmda.methods.floss import fusion
from fmda.methods.floss.chain import linear_taps


def _vectors(rows):
    """K+1 vectors at one pixel -> [E, K]."""
    return jnp.asarray(rows, jnp.float32)


def test_nobody_claims_the_ordinary_classifier_decides():
    v = _vectors([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7]])
    np.testing.assert_array_equal(fusion.fuse_vectors(v), v[3])


def test_one_claim_gives_its_whole_vector():
    v = _vectors([[0.2, 0.5, 0.3], [0.3, 0.4, 0.3], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7]])
    fused = fusion.fuse_vectors(v)
    np.testing.assert_allclose(fused, [0.3, 0.4, 0.3])
    assert float(fused.max()) < 1  # not one-hot


def test_of_two_claims_the_more_confident_wins():
    v = _vectors([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7]])
    np.testing.assert_array_equal(fusion.fuse_vectors(v), v[1])


def test_equal_claims_go_to_the_lower_class():
    v = _vectors([[0.5, 0.3, 0.2], [0.3, 0.5, 0.2], [0.25, 0.25, 0.5], [0.1, 0.2, 0.7]])
    np.testing.assert_array_equal(fusion.fuse_vectors(v), v[0])


def test_a_tie_inside_a_vector_is_no_claim_of_the_later_class():
    v = _vectors([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7]])
    np.testing.assert_array_equal(fusion.fuse_vectors(v), v[3])  # expert 1's arg max is class 0


def _probabilities(seed, classes, size, smooth, temperature=6.0, levels=None):
    rng = np.random.default_rng(seed)
    h, w = size
    scores = rng.normal(size=(classes + 1, h, w, classes)) + 0.5 * rng.normal(size=(1, h, w, classes))
    if smooth:
        scores = 6 * gaussian_filter(scores, (0, 2, 2, 0))
    if levels:  # few distinct values: exact ties everywhere
        scores = np.round(scores * levels) / levels
    return jax.nn.softmax(jnp.asarray(temperature * scores / 3, jnp.float32), -1)


ROWS, COLUMNS = linear_taps(5, 40), linear_taps(4, 32)


# compiled once: all tests of one size share them
@lru_cache
def _compiled(rows, columns):
    rows, columns = linear_taps(*rows), linear_taps(*columns)
    fast = jax.jit(lambda p: fusion.fuse(p, rows, columns))
    return fast, jax.jit(lambda p: fusion.fuse_reference(p, rows, columns))


def _both(p, rows=(5, 40), columns=(4, 32)):
    return tuple(np.asarray(f(p)) for f in _compiled(rows, columns))


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("levels", [None, 2])
def test_fast_form_equals_the_literal_one(smooth, levels):
    fast, literal = _both(_probabilities(1, 6, (5, 4), smooth, levels=levels))
    np.testing.assert_array_equal(fast.argmax(-1), literal.argmax(-1))
    np.testing.assert_allclose(fast, literal, atol=2e-7)


@pytest.mark.parametrize("out", [(14 * 4, 14 * 3), (37, 50)])
def test_any_patch_size_and_stretched_windows(out):
    fast, literal = _both(_probabilities(2, 5, (4, 3), True), (4, out[0]), (3, out[1]))
    np.testing.assert_array_equal(fast.argmax(-1), literal.argmax(-1))
    assert fast.shape == (*out, 5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), smooth=st.booleans(), levels=st.sampled_from([None, 1, 3]))
def test_labels_are_equal_on_any_scores(seed, smooth, levels):
    p = _probabilities(seed, 6, (5, 4), smooth, levels=levels)
    fast, literal = _both(p)
    np.testing.assert_array_equal(fast.argmax(-1), literal.argmax(-1))
    np.testing.assert_allclose(fast, literal, atol=2e-7)


def test_identical_experts_tie_everywhere():
    one = _probabilities(3, 6, (5, 4), True)[:1]
    fast, literal = _both(jnp.broadcast_to(one, (7, *one.shape[1:])))
    np.testing.assert_array_equal(fast, literal)


def test_of_equal_maps_the_lower_expert_wins():
    # expert e gives its own class 0.4, all experts alike: everybody claims every pixel with the same confidence
    own = jnp.full((6, 6), 0.12).at[jnp.arange(6), jnp.arange(6)].set(0.4)
    p = jnp.broadcast_to(jnp.concatenate([own, jnp.full((1, 6), 1 / 6)])[:, None, None], (7, 5, 4, 6))
    fast, literal = _both(p)
    np.testing.assert_array_equal(fast, literal)
    assert (fast.argmax(-1) == 0).all() and fast.max() == np.float32(0.4)


def test_smooth_maps_leave_few_pairs_open():
    share = jax.jit(lambda p: fusion.undecided(p, ROWS, COLUMNS))
    smooth, rough = (float(share(_probabilities(0, 6, (5, 4), s))) for s in (True, False))
    assert smooth < 0.6 * rough < 0.6
