"""The plan of a training, by hand, from two traces of its gradient."""

import jax
import jax.numpy as jnp
import optax

from fmda.methods.planning import Training, training_plan
from fmda.train import Outcome, create_state


def test_the_plan_of_one_layer_traces_its_gradient_twice():
    calls = []

    def objective(params, state, frozen, batch, key):
        calls.append(batch.shape)
        return Outcome(jnp.sin(batch @ params["w"]).mean(), {}, {})

    def init(key):
        return create_state({"w": jnp.zeros((8, 4))}, optax.identity(), teacher=False)

    training = Training(objective, init, {}, lambda rows: jax.ShapeDtypeStruct((rows, 8), jnp.float32))
    plan = training_plan(training, stages=[], batch=6, steps=10, parameters={})
    assert dict(plan.parameters) == {"trained": 32}
    # a product forward, one for the gradient of w
    assert dict(plan.flops) == {"one example in training": 2 * 2 * 8 * 4}
    assert dict(plan.memory)["parameters"] == 4 * 32
    # the cosine
    assert training.residuals(6) == 4 * 6 * 4
    assert calls == [(61, 8), (62, 8)]
