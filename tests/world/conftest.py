"""Pictures shared by the tests of the street world: the renderer compiles once."""

from typing import Any

import jax
import numpy as np
import pytest

from fmda.world.names import DOMAINS

HEIGHT, WIDTH, BATCH = 64, 128, 4


def drawn(seed: int, domain: str) -> Any:
    """Returns a batch of small pictures of a domain as NumPy arrays."""
    from fmda.world.renderer import render_batch

    keys = jax.random.split(jax.random.key(seed), BATCH)
    domains = np.full(BATCH, DOMAINS.index(domain), np.int32)
    return jax.tree.map(np.asarray, render_batch(keys, domains, height=HEIGHT, width=WIDTH))


@pytest.fixture(scope="session")
def draw() -> Any:
    """The function (seed, domain) -> four pictures."""
    return drawn


@pytest.fixture(scope="session")
def pictures() -> dict[str, Any]:
    """Four pictures of each domain."""
    return {domain: drawn(3, domain) for domain in DOMAINS}
