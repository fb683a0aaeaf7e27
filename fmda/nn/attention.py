"""Scaled dot-product attention: the one function every network here calls."""

import jax
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
