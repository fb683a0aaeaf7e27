"""Precision policies and casting."""

import jax
import jax.numpy as jnp
import pytest

from fmda.errors import UserError
from fmda.precision import Policy, cast


def test_bfloat16_policy_stores_and_returns_float32():
    policy = Policy.named("bfloat16")
    assert (policy.param, policy.compute, policy.output) == (jnp.float32, jnp.bfloat16, jnp.float32)


def test_float32_policy_is_the_default():
    assert Policy.named("float32") == Policy() == Policy(jnp.float32, jnp.float32, jnp.float32)


def test_unknown_policy_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'bfloat16'"):
        Policy.named("bfloat61")


def test_cast_leaves_integers_booleans_and_keys_alone():
    tree = {"w": jnp.ones((2,)), "n": jnp.arange(2), "b": jnp.zeros((2,), bool), "k": jax.random.key(0)}
    result = cast(tree, jnp.bfloat16)
    assert {name: leaf.dtype for name, leaf in result.items()} == {
        "w": jnp.bfloat16,
        "n": jnp.int32,
        "b": jnp.bool_,
        "k": tree["k"].dtype,
    }


def test_cast_works_on_shapes():
    shapes = jax.eval_shape(lambda: {"w": jnp.ones((2, 3)), "n": jnp.arange(4)})
    result = cast(shapes, jnp.bfloat16)
    assert result["w"] == jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)
    assert result["n"].dtype == jnp.int32
