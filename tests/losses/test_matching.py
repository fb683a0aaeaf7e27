"""Matching: the least sum over all assignments, targets that are not there, scarce queries, broken costs."""

import itertools

import numpy as np
import pytest
from small_diffusion import quickly

from fmda.losses.matching import NONE, match

RNG = np.random.default_rng(0)


def least(costs, present):
    """The least sum over all ways to give as many present targets as possible a query of their own."""
    wanted = np.flatnonzero(present)
    count = min(len(wanted), len(costs))
    return min(
        costs[list(queries), list(targets)].sum()
        for targets in itertools.combinations(wanted, count)
        for queries in itertools.permutations(range(len(costs)), count)
    )


@pytest.mark.parametrize(("queries", "targets"), [(5, 3), (2, 3)], ids=["queries to spare", "scarce queries"])
def test_the_sum_of_costs_is_least(queries, targets):
    costs = RNG.normal(size=(4, queries, targets)).astype(np.float32)
    present = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]], bool)
    costs[0, 0, 0] = np.nan  # of a query that has better targets
    costs[1, :, 1] = np.inf  # of a target that is not there
    owners, broken = quickly(match, costs, present)
    assert broken == 1
    costs[0, 0, 0] = 1e4
    for one, there, owner in zip(costs, present, np.asarray(owners), strict=True):
        matched = np.flatnonzero(owner != NONE)
        assert there[matched].all() and len(set(owner[matched])) == len(matched) == min(there.sum(), queries)
        assert one[owner[matched], matched].sum() == pytest.approx(least(one, there), abs=1e-4)
