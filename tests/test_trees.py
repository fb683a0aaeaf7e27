"""Trees: paths, patterns, sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmda import trees

TREE = {"text": {"blocks": {0: {"kernel": 1, "norm1": {"scale": 2}}, 1: {"kernel": 3}}}, "norm": {"scale": 4}}


def test_flatten_writes_slash_paths_and_integer_keys():
    assert trees.flatten(TREE) == {
        "text/blocks/0/kernel": 1,
        "text/blocks/0/norm1/scale": 2,
        "text/blocks/1/kernel": 3,
        "norm/scale": 4,
    }


def test_unflatten_restores_integer_keys():
    assert trees.unflatten(trees.flatten(TREE)) == TREE


keys = st.one_of(st.integers(0, 20), st.text("abc_", min_size=1, max_size=3))
nested = st.recursive(st.integers(), lambda inner: st.dictionaries(keys, inner, min_size=1, max_size=3), max_leaves=8)


@settings(deadline=None)
@given(st.dictionaries(keys, nested, max_size=3))
def test_unflatten_inverts_flatten(tree):
    assert trees.unflatten(trees.flatten(tree)) == tree


@pytest.mark.parametrize("key", ["a/b", "", "12"])
def test_flatten_refuses_keys_that_are_no_path_part(key):
    with pytest.raises(ValueError, match="cannot be part of a path"):
        trees.flatten({"x": {key: 1}})


@pytest.mark.parametrize("flat", [{"a": 1, "a/b": 2}, {"a/b": 2, "a": 1}])
def test_unflatten_refuses_a_leaf_that_is_also_a_node(flat):
    with pytest.raises(ValueError, match="'a"):
        trees.unflatten(flat)


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("*/norm*/*", {"text/blocks/0/norm1/scale", "norm/scale"}),
        ("norm/*", {"norm/scale"}),
        ("*/kernel", {"text/blocks/0/kernel", "text/blocks/1/kernel"}),
        ("*/0/*", {"text/blocks/0/kernel", "text/blocks/0/norm1/scale"}),
        ("kernel", set()),
    ],
)
def test_select_takes_what_the_glob_covers(pattern, paths):
    assert set(trees.flatten(trees.select(TREE, pattern))) == paths


def test_select_takes_the_leaves_of_any_pattern():
    assert set(trees.flatten(trees.select(TREE, "norm/*", "text/blocks/1/*"))) == {"norm/scale", "text/blocks/1/kernel"}


def test_leaf_paths_of_an_optimizer_state_end_with_the_parameter_path():
    params = {"up": {0: {"kernel": jnp.ones((2,))}}}
    paths = trees.leaf_paths({"opt": optax.adam(1e-3).init(params)})
    assert list(paths) == ["opt/0/count", "opt/0/mu/up/0/kernel", "opt/0/nu/up/0/kernel"]


def test_sizes_need_only_shapes():
    shapes = {"a": jax.ShapeDtypeStruct((2, 3), jnp.float32), "b": {"c": jax.ShapeDtypeStruct((4,), jnp.bfloat16)}}
    assert (trees.count(shapes), trees.size_bytes(shapes)) == (10, 32)


def test_norm_is_taken_over_all_leaves_in_float32():
    value = trees.norm({"a": jnp.asarray([3.0], jnp.bfloat16), "b": {"c": jnp.asarray([[4.0]])}})
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, 5.0)


def test_norm_of_nothing_is_zero():
    assert trees.norm({}) == 0
