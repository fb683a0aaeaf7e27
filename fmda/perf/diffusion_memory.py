"""Bytes per device of latent diffusion before anything runs: personalisation and sampling, by closed formulas.

What reverse-mode differentiation keeps is counted array by array, as the networks' traced programs keep it:

* a GroupNorm with SiLU and convolution: two float32 maps of its input's size and four in the compute type;
* a transformer: eleven float32 maps and thirty-five in the compute type (its MLP is eight times as wide);
* attention: float32 weights and their copy in the compute type; nothing where long queries go in parts;
* with `remat="blocks"` the input of each block, and for one block at a time all of the above;
* with `remat="dots"` the same, and of each block a residual one's first convolution, or sixteen maps of a transformer
  (its MLP's first projection is eight) and two of its text, all in the compute type.

To this comes the working set of the largest block, which any pass needs while it runs: of a transformer two maps of
attention weights and sixteen of its width; of a residual block its input, the same normalised (float32) and after SiLU,
and its output.

The sums lie above what XLA's buffers take by a few percent, since gradients grow while kept arrays shrink. Not in them:
workspaces of convolution libraries, fragmentation, and what the process and its driver hold. Where activations are
small beside the parameters, XLA's CPU compiler needs more: it holds a second copy of clipped gradients during Adam.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from fmda.perf.diffusion_flops import UNetPart, level_places, unet_parts
from fmda.perf.memory import training_bytes

PART = 1024
"""Most queries that attention takes at once."""


def unet_training_bytes(
    latent_size: int | tuple[int, int],
    tokens: int = 77,
    *,
    channels: Sequence[int],
    layers: int,
    attention: Sequence[bool],
    heads: Sequence[int],
    dtype: Any = "float32",
    remat: str = "none",
    part: int | None = PART,
) -> int:
    """Returns the bytes of activations for one sample through a UNet, forward and backward.

    Args:
        latent_size: side, or (height, width), of the latents.
        tokens: length of the text.
        channels, layers, attention, heads: sizes of the network.
        dtype: of the computation.
        remat: what is kept, as the network takes it: "none", "dots" or "blocks".
        part: most queries that attention takes at once; None for all.
    """
    places = level_places(latent_size, len(channels))
    size = jnp.dtype(dtype).itemsize
    kept, largest, working = _norm_and_convolution(channels[0], places[0], size), 0, 0
    for block in unet_parts(channels, layers, attention):
        entry = block.width_in * places[block.level] * size
        if block.kind in ("down", "up"):
            kept += entry
            continue
        whole = _kept(block, places[block.level], tokens, heads[block.level], size, part)
        products = _products(block, places[block.level], tokens) * size
        kept += {"none": whole, "dots": entry + products, "blocks": entry}[remat]
        largest = max(largest, whole)
        working = max(working, _working(block, places[block.level], heads[block.level], size, part))
    return kept + working + (0 if remat == "none" else largest)


def unet_sampling_bytes(
    latent_size: int | tuple[int, int],
    *,
    channels: Sequence[int],
    layers: int,
    attention: Sequence[bool],
    heads: Sequence[int],
    dtype: Any = "float32",
    part: int | None = PART,
) -> int:
    """Returns the bytes of activations for one sample through a UNet, forward alone.

    All maps that wait for the way up are counted as if they waited until the largest block. Arguments as of
    `unet_training_bytes`.
    """
    places = level_places(latent_size, len(channels))
    size = jnp.dtype(dtype).itemsize
    waiting, working = channels[0] * places[0], 0
    for level, width in enumerate(channels):
        below = places[level + 1] if level + 1 < len(channels) else 0
        waiting += width * (layers * places[level] + below)
    for block in unet_parts(channels, layers, attention):
        if block.kind in ("residual", "transformer"):
            working = max(working, _working(block, places[block.level], heads[block.level], size, part))
    return waiting * size + working


def vae_encode_bytes(
    image_size: int | tuple[int, int], *, channels: Sequence[int], dtype: Any = "float32", part: int | None = PART
) -> int:
    """Returns the bytes of activations for one image through the autoencoder's encoder, forward alone."""
    widths = list(zip([channels[0], *channels[:-1]], channels, strict=True))
    return _vae_working(image_size, widths, jnp.dtype(dtype).itemsize, part)


def vae_decode_bytes(
    image_size: int | tuple[int, int], *, channels: Sequence[int], dtype: Any = "float32", part: int | None = PART
) -> int:
    """Returns the bytes of activations for one image through the autoencoder's decoder, forward alone."""
    widths = list(zip([*channels[1:], channels[-1]], channels, strict=True))
    return _vae_working(image_size, widths, jnp.dtype(dtype).itemsize, part)


def text_training_bytes(
    tokens: int = 77, *, width: int, layers: int, mlp_width: int, heads: int, dtype: Any = "float32"
) -> int:
    """Returns the bytes of activations for one prompt through a text transformer, forward and backward.

    A layer keeps six float32 maps and six in the compute type, four inside its MLP, and three maps of attention weights
    with their mask.
    """
    size = jnp.dtype(dtype).itemsize
    maps = heads * tokens**2 * (9 + size)
    return layers * (tokens * width * (24 + 6 * size) + 4 * tokens * mlp_width * size + maps)


def personalisation_memory(
    trainable: int,
    frozen: int,
    *,
    activations: int,
    encoding: int = 0,
    images: int = 1,
    moments: int = 2,
    ema: bool = False,
    accumulate: int = 1,
    dtype: Any = "float32",
    frozen_dtype: Any = "float32",
    shards: int = 1,
) -> dict[str, int]:
    """Returns what each device holds during DreamBooth training, in bytes by name; the sum is the whole.

    Parameters, gradients, moments and the average are float32 and divided over `shards` devices, frozen parameters in
    their own type too. Weights that are stored in parts or in another type than the computation's are counted once
    more, whole and in that type, as each device has them while it computes.

    Args:
        trainable, frozen: numbers of parameters.
        activations: bytes of one image (UNet and, where it trains, text encoder).
        encoding: bytes of one image in the frozen autoencoder, which is done before the UNet begins.
        images: on one device at once, those of the prior preservation term included.
        moments: of the optimizer, per parameter.
        ema: whether an average of the parameters is kept.
        accumulate: parts of a batch; more than one need a second set of gradients.
        dtype, frozen_dtype: of the computation and of the frozen parameters.
        shards: size of the fsdp axis.
    """
    one = training_bytes(trainable, moments=0, ema=False, shards=shards) // 2
    size = jnp.dtype(dtype).itemsize
    rows = {
        "parameters": one,
        "gradients": one * (2 if accumulate > 1 else 1),
        "optimizer moments": one * moments,
        "average of parameters": one if ema else 0,
        "frozen parameters": -(-frozen * jnp.dtype(frozen_dtype).itemsize // shards),
        "weights as computed with": trainable * size if shards > 1 or size < 4 else 0,
        "activations": images * max(activations, encoding),
    }
    return {name: value for name, value in rows.items() if value}


def generation_memory(
    parameters: int,
    *,
    unet: int,
    decode: int,
    images: int = 1,
    guidance: bool = True,
    dtype: Any = "float32",
    shards: int = 1,
) -> dict[str, int]:
    """Returns what each device holds while it generates images, in bytes by name; the sum is the whole.

    Args:
        parameters: number of them, of all three networks, stored in `dtype`.
        unet, decode: bytes of activations of one sample and of one image.
        images: on one device at once.
        guidance: whether each image is two samples.
        dtype: of parameters and computation.
        shards: devices that the parameters are divided over; while computing each has them whole.
    """
    stored = parameters * jnp.dtype(dtype).itemsize
    rows = {
        "parameters": -(-stored // shards),
        "weights as computed with": stored if shards > 1 else 0,
        "activations": images * max((2 if guidance else 1) * unet, decode),
    }
    return {name: value for name, value in rows.items() if value}


def _norm_and_convolution(width: int, places: int, size: int) -> int:
    """Returns the kept bytes of GroupNorm, SiLU and the convolution's input."""
    return width * places * (8 + 4 * size)


def _in_parts(queries: int, part: int | None) -> bool:
    return part is not None and queries > part


def _kept(block: UNetPart, places: int, tokens: int, heads: int, size: int, part: int | None) -> int:
    """Returns what the backward pass of a block needs."""
    if block.kind == "residual":
        shortcut = block.width_in * places * size if block.width_in != block.width_out else 0
        first = _norm_and_convolution(block.width_in, places, size)
        return first + _norm_and_convolution(block.width_out, places, size) + shortcut
    weights = tokens + (0 if _in_parts(places, part) else places)
    return block.width_in * places * (44 + 35 * size) + heads * places * weights * (4 + size)


def _products(block: UNetPart, places: int, tokens: int) -> int:
    """Returns the size of the products of a block that its gradients need."""
    return block.width_out * (places if block.kind == "residual" else 16 * places + 2 * tokens)


def _working(block: UNetPart, places: int, heads: int, size: int, part: int | None) -> int:
    """Returns what one pass of a block holds at once."""
    if block.kind == "residual":
        return _residual_working(block.width_in, block.width_out, places, size)
    return _weights(places, heads, part) + 16 * block.width_in * places * size


def _weights(places: int, heads: int, part: int | None) -> int:
    """Returns scores and weights of self-attention, float32, as many as are held at once."""
    rows = part if part is not None and _in_parts(places, part) else places
    return 8 * heads * rows * places


def _residual_working(width_in: int, width_out: int, places: int, size: int) -> int:
    return places * (width_in * (4 + 2 * size) + width_out * size)


def _vae_working(
    image_size: int | tuple[int, int], widths: Sequence[tuple[int, int]], size: int, part: int | None
) -> int:
    """Returns the largest working set among the first blocks of all levels and the attention in the middle."""
    places = level_places(image_size, len(widths))
    blocks = [_residual_working(before, after, p, size) for (before, after), p in zip(widths, places, strict=True)]
    middle = _weights(places[-1], 1, part) + 6 * widths[-1][1] * places[-1] * size
    return max(*blocks, middle)
