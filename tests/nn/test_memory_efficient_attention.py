"""Attention in parts gives what attention at once gives, gradients too, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmda.nn.attention import LONG, attention, attention_in_parts, memory_efficient_attention


def draw(t, s, heads, size, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(1, n, heads, size)), jnp.float32) for n in (t, s, s)]


def value_and_gradients(function, given):
    def loss(q, k, v):
        out = function(q, k, v)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    with jax.default_matmul_precision("highest"):
        (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*given)
    return [out, *gradients]


def program(given):
    return jax.make_jaxpr(memory_efficient_attention)(*given)


def parts(given):
    """(number, length) of the parts that queries are taken in, None where they are taken at once."""
    scans = [e for e in program(given).eqns if e.primitive.name == "scan"]
    return next((v.aval.shape[0:3:2] for e in scans for v in e.invars if v.aval.ndim == 5), None)


@pytest.mark.parametrize(
    ("size", "t", "expected"),
    [
        (40, 2048, (2, 1024)), (80, 2304, (3, 768)), (160, 1100, (2, 550)),
        # no whole number of queries a part: two primes, and one whose divisors 29 and 53 are far from 4
        (8, 1031, (2, 516)), (8, 3127, (4, 782)), (8, 3074, (4, 769)),
    ],
)  # fmt: skip
def test_long_sequences_give_the_same_values_and_gradients(size, t, expected):
    given = draw(t, LONG, 1, size)
    assert parts(given) == expected
    ours, plain = (value_and_gradients(function, given) for function in (memory_efficient_attention, attention))
    for x, y in zip(ours, plain, strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-6 * float(jnp.abs(y).max()))


def test_nothing_is_filled_up_or_cut_where_the_parts_are_equal():
    def grown(t):
        return any(v.aval.shape[1:2] == (t + 1,) for e in program(draw(t, LONG, 1, 8)).eqns for v in e.outvars)

    assert not grown(2304)
    assert grown(3 * 769 - 1)


@pytest.mark.parametrize(("t", "s"), [(2 * LONG, 77), (LONG, LONG)])
def test_short_texts_and_short_sequences_are_taken_at_once(t, s):
    given = draw(t, s, 1, 8)
    assert parts(given) is None
    np.testing.assert_array_equal(memory_efficient_attention(*given), attention(*given))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_on_a_cpu_it_is_attention_in_parts_bit_for_bit(dtype):
    given = [x.astype(dtype) for x in draw(2 * LONG, LONG, 1, 8)]
    ours, plain = (
        value_and_gradients(function, given) for function in (memory_efficient_attention, attention_in_parts)
    )
    for x, y in zip(ours, plain, strict=True):
        np.testing.assert_array_equal(x, y)


def temporary_bytes(function, given):
    return jax.jit(function).lower(*given).compile().memory_analysis().temp_size_in_bytes


def test_it_needs_less_memory_forward_and_backward():
    given = [jax.ShapeDtypeStruct((1, 4 * LONG, 2, 40), jnp.float32)] * 3

    def gradients(function):
        return jax.grad(lambda q, k, v: jnp.sum(function(q, k, v) ** 2), argnums=(0, 1, 2))

    for wrap in (lambda f: f, gradients):
        ours, plain = (temporary_bytes(wrap(f), given) for f in (memory_efficient_attention, attention))
        assert 3 * ours < plain


def test_bfloat16_comes_out_as_bfloat16():
    given = [x.astype(jnp.bfloat16) for x in draw(2 * LONG, LONG, 1, 8)]
    found = memory_efficient_attention(*given)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), attention(*given).astype(jnp.float32), atol=4e-3)
