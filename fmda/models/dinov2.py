"""DINOv2's vision transformers (Oquab et al. 2024), also with registers (Darcet et al. 2024)."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from fmda.models.clip.transformer import Mlp
from fmda.models.module import apply_blocks
from fmda.nn.attention import memory_efficient_attention
from fmda.nn.conv import conv
from fmda.nn.drop import drop
from fmda.nn.norm import LayerScale, layer_norm
from fmda.nn.resize import resize, resized_positions


@dataclass(frozen=True)
class Dinov2Config:
    """Shape of the network; the defaults are ViT-B/14.

    Attributes:
        image_size: side of the images that the position table was trained for, pixels.
        mlp_ratio: hidden channels of a block's MLP per channel.
        registers: tokens without a place, between class token and patches.
        gated: whether the MLP is gated (SwiGLU); it then has two thirds of the hidden channels.
        drop_path: probability that a branch is dropped in training, the same in every block.
        maps: numbers of blocks after which `stages` returns a map, ascending.
    """

    image_size: int = 518
    patch_size: int = 14
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_ratio: int = 4
    registers: int = 0
    gated: bool = False
    norm_eps: float = 1e-6
    drop_path: float = 0.0
    maps: tuple[int, ...] = (3, 6, 9, 12)


DINOV2: dict[str, Dinov2Config] = {
    "dinov2-vit-s14": Dinov2Config(width=384, heads=6),
    "dinov2-vit-b14": Dinov2Config(),
    "dinov2-vit-l14": Dinov2Config(width=1024, layers=24, heads=16, maps=(6, 12, 18, 24)),
    "dinov2-vit-g14": Dinov2Config(width=1536, layers=40, heads=24, gated=True, maps=(10, 20, 30, 40)),
}
DINOV2 |= {f"{name}-registers": replace(config, registers=4) for name, config in DINOV2.items()}


class Attention(nnx.Module):
    """Multi-head self-attention that holds no weights of a long sequence. x: [B, T, width] -> [B, T, width]."""

    def __init__(self, width: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.query = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.key = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.value = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t width"]) -> Float[Array, "b t width"]:
        b, t, width = x.shape
        query, key, value = (
            layer(x).reshape(b, t, self.heads, width // self.heads) for layer in (self.query, self.key, self.value)
        )
        return self.out(memory_efficient_attention(query, key, value).reshape(x.shape))


class GatedMlp(nnx.Module):
    """SwiGLU (Shazeer 2020): down(SiLU(gate(x)) * up(x)). x: [..., width] -> [..., width].

    Two thirds of `hidden`, rounded up to a multiple of 8, are its hidden channels.
    """

    def __init__(self, width: int, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        hidden = -(-(hidden * 2 // 3) // 8) * 8
        self.gate = nnx.Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Scaled residual attention and MLP. x: [B, T, width] -> the same; with a key each branch of an example is dropped
    with probability `rate`."""

    def __init__(self, config: Dinov2Config, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width, eps, hidden = config.width, config.norm_eps, config.width * config.mlp_ratio
        self.norm1 = layer_norm(width, eps=eps, dtype=dtype, rngs=rngs)
        self.attention = Attention(width, config.heads, dtype=dtype, rngs=rngs)
        self.scale1 = LayerScale(width, initial=1.0, dtype=dtype)
        self.norm2 = layer_norm(width, eps=eps, dtype=dtype, rngs=rngs)
        self.mlp = (
            GatedMlp(width, hidden, dtype=dtype, rngs=rngs) if config.gated
            else Mlp(width, hidden, config.layers, "gelu", dtype=dtype, rngs=rngs)
        )  # fmt: skip
        self.scale2 = LayerScale(width, initial=1.0, dtype=dtype)

    def __call__(
        self, x: Float[Array, "b t width"], key: Key[Array, ""] | None = None, rate: float | Array = 0.0
    ) -> Float[Array, "b t width"]:
        first, second = (None, None) if key is None else jax.random.split(key)
        x = x + drop(self.scale1(self.attention(self.norm1(x))), rate, (0,), first)
        return x + drop(self.scale2(self.mlp(self.norm2(x))), rate, (0,), second)


class Dinov2(nnx.Module):
    """Image -> maps at the stride of a patch. `dtype` is what it computes in; parameters are drawn in float32.

    `mask_token` belongs to pre-training: nothing here reads it, and a saved network is complete with it. `with_blocks`
    sets `remat` and `scan` of `apply_blocks`.
    """

    def __init__(self, config: Dinov2Config, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config, self.dtype = config, dtype
        width, patch, draw = config.width, config.patch_size, nnx.initializers.normal(0.02)
        self.patch = conv(3, width, patch, stride=patch, dtype=dtype, rngs=rngs)
        self.class_token = nnx.Param(draw(rngs.params(), (width,), jnp.float32))
        self.mask_token = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.registers = (
            nnx.Param(draw(rngs.params(), (config.registers, width), jnp.float32)) if config.registers else None
        )
        rows = 1 + (config.image_size // patch) ** 2
        self.position = nnx.Param(draw(rngs.params(), (rows, width), jnp.float32))
        self.blocks = nnx.List(Block(config, dtype=dtype, rngs=rngs) for _ in range(config.layers))
        self.norm_post = layer_norm(width, eps=config.norm_eps, dtype=dtype, rngs=rngs)
        self.remat = self.scan = False

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns (h, w), the patches of an image of that size; a part of a patch counts as one."""
        return -(-height // self.config.patch_size), -(-width // self.config.patch_size)

    def tokens(self, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b 1+r+h*w width"]:
        """Returns what enters the first block: class token, registers, patches; registers alone have no position.

        Images are stretched to whole patches. Positions are resized as in transformers, without the offset of 0.1 that
        the authors' code adds to a network without registers.
        """
        h, w = self.grid(*pixels.shape[1:3])
        x = resize(pixels.astype(self.dtype), (h * self.config.patch_size, w * self.config.patch_size))
        patches = self.patch(x).reshape(len(x), h * w, -1)
        # only networks with registers antialias their positions
        positions = resized_positions(self.position[...], (h, w), antialias=self.registers is not None)
        first = (self.class_token[...] + positions[0])[None]
        if self.registers is not None:
            first = jnp.concatenate([first, self.registers[...]])
        first = jnp.broadcast_to(first.astype(self.dtype), (len(x), *first.shape))
        return jnp.concatenate([first, patches + positions[None, 1:].astype(self.dtype)], axis=1)

    def stages(
        self, pixels: Float[Array, "b H W 3"], key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "b h w width"], ...]:
        """Returns the patches after the blocks that `config.maps` counts, normalised, all at the stride of a patch.

        `pixels` are RGB, ImageNet-normalised, of any size; h and w are rounded up. With a key, as in training, branches
        are dropped.
        """
        h, w = self.grid(*pixels.shape[1:3])
        x, maps, first = self.tokens(pixels), [], 0
        for end in self.config.maps:
            blocks = list(self.blocks)[first:end]
            rates = [self.config.drop_path] * len(blocks)
            x = apply_blocks(blocks, x, key, rates, first=first, remat=self.remat, scan=self.scan)
            maps.append(self.norm_post(x)[:, -h * w :].reshape(len(x), h, w, -1))
            first = end
        return tuple(maps)
