"""Casts of trees."""

import jax
import jax.numpy as jnp

from fmda.precision import cast


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
