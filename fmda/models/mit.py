"""Mix Transformer (MiT), the encoder of SegFormer (Xie et al. 2021): four stages of attention at falling resolution."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from fmda.models.module import apply_blocks
from fmda.nn.activation import gelu
from fmda.nn.attention import memory_efficient_attention
from fmda.nn.conv import check_sides, conv
from fmda.nn.drop import drop
from fmda.nn.norm import layer_norm

CONV_EPS = 1e-5
"""Epsilon of the norms behind convolutions (patches, reduced keys and values); that of the others is in the config."""

Four = tuple[int, int, int, int]


@dataclass(frozen=True)
class MitConfig:
    """Shape of the network, one number for each stage; the defaults are MiT-B5.

    Attributes:
        reductions: factor by which keys and values have fewer rows and columns than queries.
        patches, strides: sizes and strides of the convolutions between stages.
        mlp_ratios: hidden channels of a block's MLP per channel.
        norm_eps: of the norms in the blocks and behind each stage.
        drop_path: probability that a branch of the last block is dropped in training; it rises linearly from 0.
    """

    widths: Four = (64, 128, 320, 512)
    depths: Four = (3, 6, 40, 3)
    heads: Four = (1, 2, 5, 8)
    reductions: Four = (8, 4, 2, 1)
    patches: Four = (7, 3, 3, 3)
    strides: Four = (4, 2, 2, 2)
    mlp_ratios: Four = (4, 4, 4, 4)
    norm_eps: float = 1e-6
    drop_path: float = 0.1


MIT: dict[str, MitConfig] = {
    "mit-b0": MitConfig(widths=(32, 64, 160, 256), depths=(2, 2, 2, 2)),
    "mit-b1": MitConfig(depths=(2, 2, 2, 2)),
    "mit-b2": MitConfig(depths=(3, 4, 6, 3)),
    "mit-b3": MitConfig(depths=(3, 4, 18, 3)),
    "mit-b4": MitConfig(depths=(3, 8, 27, 3)),
    "mit-b5": MitConfig(),
}


class ConvNorm(nnx.Module):
    """Strided convolution with bias, and LayerNorm. x: [B, h, w, before] -> [B, h/stride, w/stride, after]."""

    def __init__(
        self, before: int, after: int, size: int, stride: int, padding: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.conv = conv(before, after, size, stride=stride, padding=padding, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(after, eps=CONV_EPS, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w before"]) -> Float[Array, "b h2 w2 after"]:
        return self.norm(self.conv(x))


class ReducedAttention(nnx.Module):
    """Self-attention whose keys and values come from a strided convolution. x: [B, h, w, width] -> the same."""

    def __init__(self, width: int, heads: int, reduction: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.query = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.key = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.value = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.reduce = ConvNorm(width, width, reduction, reduction, 0, dtype=dtype, rngs=rngs) if reduction > 1 else None

    def __call__(self, x: Float[Array, "b h w width"]) -> Float[Array, "b h w width"]:
        b, _, _, width = x.shape
        reduced = x if self.reduce is None else self.reduce(x)
        query, key, value = (
            layer(source).reshape(b, -1, self.heads, width // self.heads)
            for layer, source in ((self.query, x), (self.key, reduced), (self.value, reduced))
        )
        return self.out(memory_efficient_attention(query, key, value).reshape(x.shape))


class MixMlp(nnx.Module):
    """MLP with a depth-wise 3x3 convolution, which takes the place of positions. x: [B, h, w, width] -> the same."""

    def __init__(self, width: int, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.depthwise = conv(hidden, hidden, 3, padding=1, groups=hidden, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w width"]) -> Float[Array, "b h w width"]:
        return self.down(gelu(self.depthwise(self.up(x))))


class Block(nnx.Module):
    """Residual attention and MLP. x: [B, h, w, width] -> the same; with a key each branch of an example is dropped with
    probability `rate`."""

    def __init__(self, config: MitConfig, stage: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width, eps = config.widths[stage], config.norm_eps
        self.norm1 = layer_norm(width, eps=eps, dtype=dtype, rngs=rngs)
        self.attention = ReducedAttention(width, config.heads[stage], config.reductions[stage], dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(width, eps=eps, dtype=dtype, rngs=rngs)
        self.mlp = MixMlp(width, width * config.mlp_ratios[stage], dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w width"], key: Key[Array, ""] | None = None, rate: float | Array = 0.0
    ) -> Float[Array, "b h w width"]:
        first, second = (None, None) if key is None else jax.random.split(key)
        x = x + drop(self.attention(self.norm1(x)), rate, (0,), first)
        return x + drop(self.mlp(self.norm2(x)), rate, (0,), second)


class Stage(nnx.Module):
    """Strided convolution, blocks and a norm. x: [B, h, w, before] -> [B, h/stride, w/stride, width].

    `with_blocks` sets `remat` and `scan` of `apply_blocks`.
    """

    def __init__(self, config: MitConfig, stage: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        before = config.widths[stage - 1] if stage else 3
        width, size = config.widths[stage], config.patches[stage]
        first, last = sum(config.depths[:stage]), max(sum(config.depths) - 1, 1)
        self.patch = ConvNorm(before, width, size, config.strides[stage], size // 2, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(Block(config, stage, dtype=dtype, rngs=rngs) for _ in range(config.depths[stage]))
        self.rates = tuple(config.drop_path * (first + index) / last for index in range(config.depths[stage]))
        self.norm = layer_norm(width, eps=config.norm_eps, dtype=dtype, rngs=rngs)
        self.remat = self.scan = False

    def __call__(self, x: Float[Array, "b h w before"], key: Key[Array, ""] | None = None) -> Float[Array, "b h2 w2 c"]:
        x = apply_blocks(list(self.blocks), self.patch(x), key, self.rates, remat=self.remat, scan=self.scan)
        return self.norm(x)


class Mit(nnx.Module):
    """Image -> four stage maps. `dtype` is what it computes in; parameters are drawn in float32."""

    def __init__(self, config: MitConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config, self.dtype = config, dtype
        self.levels = nnx.List(Stage(config, stage, dtype=dtype, rngs=rngs) for stage in range(4))

    def stages(
        self, pixels: Float[Array, "b H W 3"], key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "b h w c"], ...]:
        """Returns the maps at strides 4, 8, 16 and 32. `pixels` are RGB, ImageNet-normalised.

        With a key, as in training, branches are dropped. Raises UserError where a side is below 32.
        """
        check_sides(pixels, 32, "the 32 pixels of a MiT's last stride")
        x, maps = pixels.astype(self.dtype), []
        for index, stage in enumerate(self.levels):
            x = stage(x, None if key is None else jax.random.fold_in(key, index))
            maps.append(x)
        return tuple(maps)
