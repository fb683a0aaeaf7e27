"""Normalisation layers with the conventions of PyTorch checkpoints."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def layer_norm(width: int, *, eps: float = 1e-5, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Returns a LayerNorm over the last axis with torch's epsilon (flax defaults to 1e-6).

    The variance is the mean of squared deviations, not E[x^2] - E[x]^2: the quick form loses digits where the mean is
    large beside the spread, as it is in CLIP's deeper blocks. Statistics are taken in float32 whatever `dtype` is.
    """
    return nnx.LayerNorm(width, epsilon=eps, dtype=dtype, use_fast_variance=False, rngs=rngs)


def group_norm(width: int, groups: int, *, eps: float, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Returns a GroupNorm over all places and the channels of a group (Wu and He 2018). x: [B, ..., width].

    The variance is the mean of squared deviations and statistics are float32, as in `layer_norm`.
    """
    return nnx.GroupNorm(width, groups, epsilon=eps, dtype=dtype, use_fast_variance=False, rngs=rngs)


def unit(x: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """Returns x with unit length along an axis, in float32; zeros stay zeros."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.maximum((x * x).sum(axis, keepdims=True), 1e-24))


class BatchNorm(nnx.Module):
    """Batch normalisation (Ioffe and Szegedy 2015) as torch does it. x: [..., width] -> [..., width].

    Stored statistics normalise, unless the attribute `batch_statistics` is set: then the batch's own do, and the stored
    ones move towards them by a share of `momentum`. Both are float32, over all devices that the batch is split on.
    `mean` and `var` are `nnx.BatchStat`, so that parameters can be split from them (`models.module.separated`).
    """

    def __init__(
        self, width: int, *, eps: float = 1e-5, momentum: float = 0.1, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        del rngs  # taken for the common signature; every initial value is a constant
        self.eps, self.momentum, self.dtype = eps, momentum, dtype
        self.batch_statistics = False
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros((width,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((width,), jnp.float32))

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        """Returns (x - mean) / sqrt(var + eps) * scale + bias."""
        wide = x.astype(jnp.float32)
        axes = tuple(range(x.ndim - 1))
        if self.batch_statistics:
            mean, var = wide.mean(axes), wide.var(axes)
            count = x.size // x.shape[-1]
            # torch normalises by the biased variance and stores the unbiased one
            self._move(self.mean, mean)
            self._move(self.var, var * (count / max(count - 1, 1)))
        else:
            mean, var = self.mean[...].astype(jnp.float32), self.var[...].astype(jnp.float32)
        factor = self.scale[...].astype(jnp.float32) * lax.rsqrt(var + self.eps)
        shift = self.bias[...].astype(jnp.float32) - mean * factor
        return (wide * jnp.expand_dims(factor, axes) + jnp.expand_dims(shift, axes)).astype(self.dtype)

    def _move(self, stored: nnx.BatchStat, new: Float[Array, "width"]) -> None:
        # an assignment by index compares shardings, which takes seconds on values that are traced
        stored.set_value((1 - self.momentum) * stored[...] + self.momentum * lax.stop_gradient(new))


class LayerScale(nnx.Module):
    """A learned factor per channel (Touvron et al. 2021, CaiT, eq. 3). x: [..., width] -> [..., width]."""

    def __init__(self, width: int, *, initial: float = 1e-6, dtype: DTypeLike = jnp.float32) -> None:
        self.dtype = dtype
        self.gamma = nnx.Param(jnp.full((width,), initial, jnp.float32))

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        gamma = self.gamma[...].astype(self.dtype)
        return x.astype(self.dtype) * jnp.expand_dims(gamma, tuple(range(x.ndim - 1)))
