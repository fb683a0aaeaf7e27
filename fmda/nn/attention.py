"""Scaled dot-product attention: the one function every network here calls, and forms of it for long sequences."""

import os

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s h d"],
    value: Float[Array, "b s h d"],
    *,
    bias: Float[Array, "#b #h #t #s"] | None = None,
    causal: bool = False,
) -> Float[Array, "b t h d"]:
    """Returns softmax(d ** -0.5 * q k^T + bias) v per head, in the dtype of `query`.

    The softmax is taken in float32. The XLA form is requested by name: it serves every device, dtype and head size, and
    its FLOPs are counted, unlike those of cuDNN's fused kernel.
    Source: Vaswani et al. 2017, eq. 1.
    """
    return jax.nn.dot_product_attention(query, key, value, bias=bias, is_causal=causal, implementation="xla")


LONG = 1024
"""Most queries that `attention_in_parts` takes at a time."""


def memory_efficient_attention(
    query: Float[Array, "b t h d"], key: Float[Array, "b s h d"], value: Float[Array, "b s h d"]
) -> Float[Array, "b t h d"]:
    """Returns what `attention` returns, without ever holding all t x s weights of a long sequence.

    Where `fusible` holds, this is `fused_attention`; else, and with FMDA_FUSED_ATTENTION=0, `attention_in_parts`. The
    choice is made while tracing, from jax's default device. `benchmarks/attention.py` checks on a GPU that both agree.
    """
    device = _default_device()
    head, queries, keys = query.shape[-1], query.shape[1], key.shape[1]
    if (
        os.environ.get("FMDA_FUSED_ATTENTION", "1") != "0"
        and query.dtype == key.dtype == value.dtype
        and fusible(_platform(device), _capability(device), query.dtype, head, queries, keys)
    ):
        return fused_attention(query, key, value)
    return attention_in_parts(query, key, value)


def attention_in_parts(
    query: Float[Array, "b t h d"], key: Float[Array, "b s h d"], value: Float[Array, "b s h d"]
) -> Float[Array, "b t h d"]:
    """Returns what `attention` returns; queries go in ceil(t / LONG) equal parts, the last one filled up with zeros.

    A part's weights are computed again for its gradients. Up to `LONG` queries, or below `LONG` keys, all go at once.
    This serves every device, dtype and head size. Source: Rabe and Staats 2021.
    """
    b, t, h, d = query.shape
    if t <= LONG or key.shape[1] < LONG:
        return attention(query, key, value)
    # 64 x 64 places go in 4 parts of 1024, 48 x 48 in 3 of 768, 53 x 59 in 4 of 782 with one row of zeros
    parts = -(-t // LONG)
    length = -(-t // parts)
    spare = parts * length - t
    if spare:
        query = jnp.pad(query, ((0, 0), (0, spare), (0, 0), (0, 0)))
    rows = jnp.moveaxis(query.reshape(b, parts, length, h, d), 1, 0)
    attended = jax.lax.map(jax.checkpoint(lambda part: attention(part, key, value)), rows)
    return jnp.moveaxis(attended, 0, 1).reshape(b, parts * length, h, d)[:, :t]


FUSED_LENGTH = 256
"""Fewest queries, and keys, of the fused kernel: the weights of shorter sequences are too few to matter."""

FUSED_MULTIPLE = 64
"""What numbers of queries and keys must be multiples of: the side of the kernel's tiles, so that none is cut."""

FUSED_HEADS = (((9, 0), 256), ((8, 0), 128))
"""(compute capability, largest head size from there on), newest first."""


def fused_attention(
    query: Float[Array, "b t h d"], key: Float[Array, "b s h d"], value: Float[Array, "b s h d"]
) -> Float[Array, "b t h d"]:
    """Returns what `attention` returns, from cuDNN's flash attention, which holds no weights in the device's memory.

    Raises an exception of jax's, here or while compiling, on devices and shapes that cuDNN does not serve. Batches and
    heads may be split over devices, places and channels of a head may not. Its gradients can differ in the last bits
    from run to run unless XLA is set to deterministic operations (XLA_FLAGS=--xla_gpu_deterministic_ops=true).
    Source: Dao 2023.
    """
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def fusible(
    platform: str, capability: tuple[int, int] | None, dtype: DTypeLike, head: int, queries: int, keys: int
) -> bool:
    """Returns whether `fused_attention` is worth trying: a CUDA device, a half type, sizes that cuDNN serves well.

    `capability` is the device's compute capability, such as (9, 0), `head` the size of a head; `queries` and `keys` are
    counts.
    """
    if platform not in ("cuda", "gpu") or capability is None:
        return False
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return False
    largest = next((size for least, size in FUSED_HEADS if capability >= least), 0)
    fits = min(queries, keys) >= FUSED_LENGTH and queries % FUSED_MULTIPLE == keys % FUSED_MULTIPLE == 0
    return fits and 0 < head <= largest and head % 8 == 0


def _default_device() -> jax.Device:
    """Returns the device where uncommitted computations go, always one of this process's."""
    chosen = getattr(jax.config, "jax_default_device", None)
    return chosen if isinstance(chosen, jax.Device) else jax.local_devices(backend=chosen)[0]


def _platform(device: jax.Device) -> str:
    """Returns "cuda", "rocm", "cpu", "tpu", ...: jax calls the first two "gpu"."""
    if device.platform != "gpu":
        return device.platform
    return "cuda" if "cuda" in device.client.platform_version.lower() else "rocm"


def _capability(device: jax.Device) -> tuple[int, int] | None:
    """Returns the compute capability of a CUDA device; None where the device has none of that form."""
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None
