import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmda.nn.attention import attention


def rendering(q, k, v, allowed=None, bias=0.0):
    """Softmax attention in float64 NumPy."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5 + np.asarray(bias, np.float64)
    if allowed is not None:
        logits = np.where(allowed, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)


def draw(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("size", [8, 40, 64, 80, 160])
def test_equals_a_plain_rendering_for_every_head_size(size):
    q, k, v = draw((2, 5, 3, size), (2, 7, 3, size), (2, 7, 3, size))
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(attention(q, k, v), rendering(q, k, v), atol=2e-6)


def test_causal_mask_and_bias():
    q, k, v, bias = draw((2, 6, 3, 8), (2, 6, 3, 8), (2, 6, 3, 8), (1, 1, 6, 6))
    lower = np.tril(np.ones((6, 6), bool))[None, None]
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(attention(q, k, v, causal=True), rendering(q, k, v, lower), atol=2e-6)
        np.testing.assert_allclose(attention(q, k, v, bias=bias), rendering(q, k, v, bias=bias), atol=2e-6)


def test_bfloat16_stays_bfloat16_and_softmax_is_taken_in_float32():
    q, k, v = (x.astype(jnp.bfloat16) for x in draw((1, 300, 2, 8), (1, 300, 2, 8), (1, 300, 2, 8)))
    out = attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), rendering(q, k, v), atol=0.01)
