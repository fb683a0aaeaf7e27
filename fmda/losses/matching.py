"""Assignment of predictions to targets on the device."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

LIMIT = 1e4
"""Largest cost, and what a cost that is not finite becomes."""
NONE = -1


def match(costs: Float[Array, "n q k"], present: Bool[Array, "n k"]) -> tuple[Int[Array, "n k"], Int[Array, ""]]:
    """Returns (the query of each target, -1 where it has none, number of costs that were not finite).

    The sum of the costs of targets that are present is least, each query has one target at most, and with q < k as many
    targets as possible have a query. All n problems run in one vmap: it lasts as long as the slowest of them.
    Source: Carion et al. 2020 (DETR), eq. 1; the Hungarian algorithm of optax.
    """
    costs = jax.lax.stop_gradient(costs).astype(jnp.float32)
    broken = ~jnp.isfinite(costs) & present[:, None]
    costs = jnp.clip(jnp.where(jnp.isfinite(costs), costs, LIMIT), -LIMIT, LIMIT)
    # a target that is not there costs the same everywhere; 0 costs no digits, but would take scarce queries
    costs = jnp.where(present[:, None], costs, 0.0 if costs.shape[1] >= costs.shape[2] else LIMIT)

    def one(costs: Float[Array, "q k"]) -> Int[Array, "k"]:
        query, target = optax.assignment.hungarian_algorithm(costs)
        return jnp.full(costs.shape[1], NONE, jnp.int32).at[target].set(query.astype(jnp.int32))

    return jnp.where(present, jax.vmap(one)(costs), NONE), broken.sum()
