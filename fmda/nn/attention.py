"""Scaled dot-product attention: the one function every network here calls."""

from typing import Literal

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
    Source: Vaswani et al. 2017, eq. 1.
    """
    kernel: Literal["cudnn", "xla"] = "cudnn" if mask is None and bias is None and _flash_takes(query) else "xla"
    return jax.nn.dot_product_attention(
        query, key, value, bias=bias, mask=mask, is_causal=causal, scale=scale, implementation=kernel
    )


def _flash_takes(query: Array) -> bool:
    """Returns whether cuDNN's fused kernel serves this call: a GPU, 16-bit numbers, head size 8, 16, ... 128.

    Head sizes beyond 128 (the 160 of Stable Diffusion 1.x), float32 and other devices take the plain XLA form.
    """
    size = query.shape[-1]
    return jax.default_backend() == "gpu" and query.dtype == jnp.bfloat16 and size % 8 == 0 and size <= 128
