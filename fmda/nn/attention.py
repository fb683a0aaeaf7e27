"""Scaled dot-product attention: the one function every network here calls, and forms of it for long sequences."""

import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
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
    float32 nor head sizes above 256, on GPUs before Hopper above 128), and its FLOPs are counted, which a fused
    kernel's are not.
    Source: Vaswani et al. 2017, eq. 1.
    """
    return jax.nn.dot_product_attention(
        query, key, value, bias=bias, mask=mask, is_causal=causal, scale=scale, implementation="xla"
    )


LONG = 1024
"""Most queries that `attention_in_parts` takes at a time."""


def memory_efficient_attention(
    query: Float[Array, "b t h d"], key: Float[Array, "b s h d"], value: Float[Array, "b s h d"]
) -> Float[Array, "b t h d"]:
    """Returns what `attention` returns, without ever holding all t x s weights of a long sequence.

    Where `fusible` says so, and the kernel has shown once in this process that it computes the same as `attention`
    does (`agrees_with_xla`), this is `fused_attention`; else `attention_in_parts`. The choice is made while tracing,
    from jax's default device.
    """
    device = _default_device()
    head, queries, keys = query.shape[-1], query.shape[1], key.shape[1]
    if (
        query.dtype == key.dtype == value.dtype
        and fusible(_platform(device), _capability(device), query.dtype, head, queries, keys)
        and _verified(query.dtype, head)
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
    found = jax.lax.map(jax.checkpoint(lambda part: attention(part, key, value)), rows)
    found = jnp.moveaxis(found, 0, 1).reshape(b, parts * length, h, d)
    return found[:, :t] if spare else found


FUSED_LENGTH = 256
"""Fewest queries, and keys, of the fused kernel: the weights of shorter sequences are too few to matter."""

FUSED_MULTIPLE = 64
"""What numbers of queries and keys must be multiples of: the side of the kernel's tiles, so that none is cut."""

FUSED_HEADS = (((9, 0), 256), ((8, 0), 128))
"""(compute capability, largest head size from there on), newest first."""

TOLERANCE = 0.02
"""Most that the fused kernel may be off by, as a share of the root mean square; bfloat16 rounds by up to 0.004."""


def fused_attention(
    query: Float[Array, "b t h d"], key: Float[Array, "b s h d"], value: Float[Array, "b s h d"]
) -> Float[Array, "b t h d"]:
    """Returns what `attention` returns, from cuDNN's flash attention, which holds no weights in the device's memory.

    Raises an exception of jax's, here or while compiling, on devices and shapes that cuDNN does not serve. Batches and
    heads may be split over devices, places and channels of a head may not. Its gradients can differ in the last bits
    from run to run unless XLA is asked for determinism (XLA_FLAGS=--xla_gpu_deterministic_ops=true).
    Source: Dao 2023.
    """
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def fusible(
    platform: str, capability: tuple[int, int] | None, dtype: DTypeLike, head: int, queries: int, keys: int
) -> bool:
    """Returns whether `fused_attention` is worth trying: a CUDA device, a half type, sizes that cuDNN serves well.

    Args:
        platform: of the device: "cuda" or "gpu"; all others are refused.
        capability: its compute capability, such as (9, 0); None where it has none.
        dtype: of queries, keys and values.
        head: size of a head, a multiple of 8; at most 256 from Hopper on (9.0), 128 on Ampere and Ada (8.x).
        queries, keys: how many there are; `FUSED_LENGTH` at least, in multiples of `FUSED_MULTIPLE`.
    """
    if platform not in ("cuda", "gpu") or capability is None:
        return False
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return False
    largest = next((size for least, size in FUSED_HEADS if capability >= least), 0)
    lengths = (queries, keys)
    return (
        0 < head <= largest
        and head % 8 == 0
        and min(lengths) >= FUSED_LENGTH
        and all(length % FUSED_MULTIPLE == 0 for length in lengths)
    )


def agrees_with_xla(fused: Callable[[Array, Array, Array], Array], dtype: DTypeLike, head: int) -> bool:
    """Returns whether `fused(query, key, value)` gives the values and gradients that `attention` gives.

    Both run on small random arrays, at once, even when a program is being traced. Where they differ by more than
    `TOLERANCE`, or `fused` raises anything, the answer is False and one warning says that and why.
    """
    try:
        error = _largest_error(fused, dtype, head)
        fault = None if error <= TOLERANCE else f"values or gradients are off by {error:.1%}"
    except Exception as raised:  # whatever a driver, a library or the compiler comes up with
        fault = f"{type(raised).__name__}: {' '.join(str(raised).split())[:200]}"
    if fault is not None:
        warnings.warn(
            f"attention falls back to its slower XLA form for {jnp.dtype(dtype).name} heads of size {head}, since the "
            f"fused kernel failed its check ({fault})",
            stacklevel=2,
        )
    return fault is None


def _largest_error(fused: Callable[[Array, Array, Array], Array], dtype: DTypeLike, head: int) -> float:
    """Returns the largest error of `fused`'s output and three gradients, as shares of their root mean squares."""
    drawn = np.random.default_rng(0).normal(size=(4, 1, FUSED_LENGTH, 2, head)).astype(np.float32)
    # whoever traces may have forbidden transfers, which would fail the check
    with jax.ensure_compile_time_eval(), jax.default_device(_default_device()), jax.transfer_guard("allow"):
        *given, weights = (jnp.asarray(x, dtype) for x in drawn)

        def outcome(function: Callable[[Array, Array, Array], Array], given: list[Array]) -> list[np.ndarray]:
            out, pull = jax.vjp(jax.jit(function), *given)
            return [np.asarray(x, np.float64) for x in (out, *pull(weights.astype(out.dtype)))]

        found = outcome(fused, given)
        # from the same rounded numbers, but in float32
        right = outcome(attention, [x.astype(jnp.float32) for x in given])
    errors = [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(found, right, strict=True)]
    return float(np.max(errors))


@functools.cache
def _verified(dtype: np.dtype, head: int) -> bool:
    """Returns whether cuDNN's kernel passed its check on this machine; checks and warns only the first time."""
    return agrees_with_xla(fused_attention, dtype, head)


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
