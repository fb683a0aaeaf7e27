"""Scaled dot-product attention: the one function every network here calls."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s h d"],
    value: Float[Array, "b s h d"],
    *,
    mask: Bool[Array, "#b #h #t #s"] | None = None,
    bias: Float[Array, "#b #h #t #s"] | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Array, "b t h d"]:
    """Returns softmax(scale * q k^T + bias) v per head, in the dtype of `query`.

    `mask` is true where attention is allowed; `scale` defaults to d ** -0.5. The softmax is taken in float32.
    The XLA form is asked for by name: it serves every device, dtype and head size (cuDNN's fused kernel takes neither
    float32 nor the head size 160 of Stable Diffusion 1.x), and its FLOPs are counted, which a fused kernel's are not.
    Source: Vaswani et al. 2017, eq. 1.
    """
    return jax.nn.dot_product_attention(
        query, key, value, bias=bias, mask=mask, is_causal=causal, scale=scale, implementation="xla"
    )


LONG = 1024
"""Most queries that `memory_efficient_attention` takes at a time."""


def memory_efficient_attention(
    query: Float[Array, "b t h d"], key: Float[Array, "b s h d"], value: Float[Array, "b s h d"]
) -> Float[Array, "b t h d"]:
    """Returns what `attention` returns, without ever holding all t x s weights: queries go in parts of at most `LONG`.

    A part's weights are computed again for its gradients. This serves every device, dtype and head size, 40, 80 and 160
    of Stable Diffusion 1.x among them. Source: Rabe and Staats 2021.
    """
    b, t, h, d = query.shape
    if t <= LONG or key.shape[1] < LONG:
        return attention(query, key, value)
    # the fewest equal parts: 64 x 64 places go in 4 of 1024, 48 x 48 in 3 of 768
    parts = next(n for n in range(-(-t // LONG), t + 1) if t % n == 0)
    rows = jnp.moveaxis(query.reshape(b, parts, t // parts, h, d), 1, 0)
    found = jax.lax.map(jax.checkpoint(lambda part: attention(part, key, value)), rows)
    return jnp.moveaxis(found, 0, 1).reshape(b, t, h, d)
