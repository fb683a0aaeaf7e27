"""The pre-norm residual block that CLIP's two transformers and DINO share."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fmda.models.clip.config import TextConfig, VitConfig
from fmda.nn.activation import ACTIVATIONS
from fmda.nn.attention import attention
from fmda.nn.norm import layer_norm


class Attention(nnx.Module):
    """Multi-head self-attention. x: [B, T, width] -> [B, T, width].

    `query`, `key`, `value`, `out` are plain linear layers, so that dense methods can read or replace any of them.
    """

    def __init__(self, width: int, heads: int, layers: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.heads = heads
        inward = nnx.initializers.normal(width**-0.5)
        # Residual branches start smaller the deeper the net is (Radford et al. 2019).
        outward = nnx.initializers.normal(width**-0.5 * (2 * layers) ** -0.5)
        self.query = nnx.Linear(width, width, dtype=dtype, kernel_init=inward, rngs=rngs)
        self.key = nnx.Linear(width, width, dtype=dtype, kernel_init=inward, rngs=rngs)
        self.value = nnx.Linear(width, width, dtype=dtype, kernel_init=inward, rngs=rngs)
        self.out = nnx.Linear(width, width, dtype=dtype, kernel_init=outward, rngs=rngs)

    def split(self, x: Float[Array, "b t width"]) -> Float[Array, "b t heads size"]:
        """Returns x with its last axis cut into heads."""
        return x.reshape(*x.shape[:-1], self.heads, x.shape[-1] // self.heads)

    def __call__(self, x: Float[Array, "b t width"], *, causal: bool = False) -> Float[Array, "b t width"]:
        query, key, value = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
        return self.out(attention(query, key, value, causal=causal).reshape(x.shape))


class Mlp(nnx.Module):
    """Two linear layers with an activation between. x: [..., width] -> [..., width]."""

    def __init__(
        self, width: int, hidden: int, layers: int, activation: str, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.activation = activation
        inward = nnx.initializers.normal((2 * width) ** -0.5)
        outward = nnx.initializers.normal(width**-0.5 * (2 * layers) ** -0.5)
        self.up = nnx.Linear(width, hidden, dtype=dtype, kernel_init=inward, rngs=rngs)
        self.down = nnx.Linear(hidden, width, dtype=dtype, kernel_init=outward, rngs=rngs)

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


def blocks(config: VitConfig | TextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.List:
    """Returns the blocks of a transformer, image or text."""
    sizes = (config.width, config.heads, config.mlp_width, config.layers, config.activation)
    return nnx.List(Block(*sizes, eps=config.norm_eps, dtype=dtype, rngs=rngs) for _ in range(config.layers))


def projection(width: int, embed_dim: int | None, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear | None:
    """Returns the layer into the joint space; None without one."""
    if embed_dim is None:
        return None
    normal = nnx.initializers.normal(width**-0.5)
    return nnx.Linear(width, embed_dim, use_bias=False, dtype=dtype, kernel_init=normal, rngs=rngs)


class Block(nnx.Module):
    """Attention and MLP, each after a LayerNorm and added to its input. x: [B, T, width] -> [B, T, width].

    `layers` is the depth of the whole net; only the initial values depend on it.
    """

    def __init__(
        self, width: int, heads: int, mlp_width: int, layers: int, activation: str, *, eps: float = 1e-5,
        dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.norm1 = layer_norm(width, eps=eps, dtype=dtype, rngs=rngs)
        self.attention = Attention(width, heads, layers, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(width, eps=eps, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(width, mlp_width, layers, activation, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t width"], *, causal: bool = False) -> Float[Array, "b t width"]:
        x = x + self.attention(self.norm1(x), causal=causal)
        return x + self.mlp(self.norm2(x))

    def value_path(self, x: Float[Array, "b t width"]) -> Float[Array, "b t width"]:
        """Returns the block's output with each token attending to itself alone; residual and MLP stay.

        Source: Zhou et al. 2022 (MaskCLIP), 3.2.
        """
        x = x + self.attention.out(self.attention.value(self.norm1(x)))
        return x + self.mlp(self.norm2(x))
