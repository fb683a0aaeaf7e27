"""Floating-point operations of latent diffusion by closed formulas: UNet, autoencoder, sampling, personalisation.

As in `fmda.perf.flops` a multiply and an add count as two, attention products are in, and everything that is no matrix
product or convolution is left out. All values are of one image; sizes are those of the networks' configurations.

Taps of a convolution that fall on padding count like all others. XLA's analysis leaves them out, which is a few percent
on the UNet's small maps, and counts attention in parts (a loop) once.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fmda.perf.flops import training_flops


class UNetPart(NamedTuple):
    """One part of a UNet, in the order in which parts run.

    Attributes:
        kind: "residual", "transformer", or "down" and "up" for the convolution between two levels.
        level: of the map that comes in; of the repeated one for "up".
        width_in, width_out: channels.
    """

    kind: str
    level: int
    width_in: int
    width_out: int


def unet_parts(channels: Sequence[int], layers: int, attention: Sequence[bool]) -> Iterator[UNetPart]:
    """Yields the parts between the first and the last convolution; arguments as of `unet_flops`."""
    last = len(channels) - 1
    before, skips = channels[0], [channels[0]]
    for level, width in enumerate(channels):
        for _ in range(layers):
            yield UNetPart("residual", level, before, width)
            if attention[level]:
                yield UNetPart("transformer", level, width, width)
            before = width
            skips.append(width)
        if level < last:
            yield UNetPart("down", level, width, width)
            skips.append(width)
    yield UNetPart("residual", last, before, before)
    yield UNetPart("transformer", last, before, before)
    yield UNetPart("residual", last, before, before)
    for level in reversed(range(last + 1)):
        width = channels[level]
        for _ in range(layers + 1):
            yield UNetPart("residual", level, before + skips.pop(), width)
            if attention[level]:
                yield UNetPart("transformer", level, width, width)
            before = width
        if level > 0:
            yield UNetPart("up", level - 1, width, width)


def unet_flops(
    latent_size: int | tuple[int, int],
    tokens: int = 77,
    *,
    channels: Sequence[int],
    layers: int,
    attention: Sequence[bool],
    context_width: int,
    in_channels: int = 4,
    out_channels: int = 4,
) -> int:
    """Returns the FLOPs of one call of a Stable Diffusion UNet on one sample.

    How the heads divide a width and how the transformers' outer projections are stored change nothing.

    Args:
        latent_size: side, or (height, width), of the latents.
        tokens: length of the text.
        channels: width of each level.
        layers: residual blocks of a level on the way down; one more on the way up.
        attention: which levels have transformers; the middle always has one.
        context_width: width of the text states.
        in_channels, out_channels: of the latents.
    """
    places = level_places(latent_size, len(channels))
    first = channels[0]
    time_width = 4 * first
    total = _linear(1, first, time_width) + _linear(1, time_width, time_width)
    total += _convolution(places[0], in_channels, first) + _convolution(places[0], first, out_channels)
    for kind, level, before, width in unet_parts(channels, layers, attention):
        if kind == "residual":
            total += _residual(places[level], before, width) + _linear(1, time_width, width)
        elif kind == "transformer":
            total += _transformer(places[level], width, tokens, context_width)
        else:
            total += _convolution(places[level + (kind == "down")], before, width)
    return total


def unet_attention_flops(
    latent_size: int | tuple[int, int],
    tokens: int = 77,
    *,
    channels: Sequence[int],
    layers: int,
    attention: Sequence[bool],
    context_width: int,
) -> int:
    """Returns what attention takes of `unet_flops`, its four projections and its products; arguments as there."""
    places = level_places(latent_size, len(channels))
    return sum(
        _attention(places[part.level], part.width_out, tokens, context_width)
        for part in unet_parts(channels, layers, attention)
        if part.kind == "transformer"
    )


def vae_encode_flops(
    image_size: int | tuple[int, int],
    *,
    channels: Sequence[int],
    layers: int,
    latent_channels: int = 4,
    in_channels: int = 3,
) -> int:
    """Returns the FLOPs from an image to the mean and log-variance of its latents.

    Args:
        image_size: side, or (height, width), in pixels.
        channels: width of each level.
        layers: residual blocks of a level.
        latent_channels, in_channels: of a latent and of a pixel.
    """
    places = level_places(image_size, len(channels))
    moments = 2 * latent_channels
    before = channels[0]
    total = _convolution(places[0], in_channels, before)
    for level, width in enumerate(channels):
        for _ in range(layers):
            total += _residual(places[level], before, width)
            before = width
        if level < len(channels) - 1:
            total += _convolution(places[level + 1], width, width)
    total += _middle(places[-1], before) + _convolution(places[-1], before, moments)
    return total + _linear(places[-1], moments, moments)


def vae_decode_flops(
    image_size: int | tuple[int, int],
    *,
    channels: Sequence[int],
    layers: int,
    latent_channels: int = 4,
    in_channels: int = 3,
) -> int:
    """Returns the FLOPs from latents to an image of `image_size` pixels; arguments as of `vae_encode_flops`."""
    places = level_places(image_size, len(channels))
    before = channels[-1]
    total = _linear(places[-1], latent_channels, latent_channels)
    total += _convolution(places[-1], latent_channels, before) + _middle(places[-1], before)
    for level in reversed(range(len(channels))):
        for _ in range(layers + 1):
            total += _residual(places[level], before, channels[level])
            before = channels[level]
        if level > 0:
            total += _convolution(places[level - 1], before, before)
    return total + _convolution(places[0], before, in_channels)


def sampling_flops(calls: int, *, unet: float, decode: float = 0, text: float = 0, guidance: bool = True) -> float:
    """Returns the FLOPs of one generated image.

    Args:
        calls: of the network, which are not always the steps (PLMS takes one more, second-order solvers two a step).
        unet, decode, text: FLOPs of one call of each. The prompt is read once; the empty prompt belongs to the run.
        guidance: whether each call runs with the prompt and without.
    """
    return calls * (2 if guidance else 1) * unet + decode + text


def dreambooth_step_flops(*, unet: float, text: float = 0, encode: float = 0, adapted: float | None = None) -> float:
    """Returns the FLOPs of one image of a DreamBooth step: forward, backward, and the frozen encoder forward.

    An image of the prior preservation term costs the same once more.

    Args:
        unet, text: FLOPs of one forward call of each; 0 for a text encoder that does not train.
        encode: of the autoencoder's encoder; 0 where latents come from a bank.
        adapted: where low-rank adapters of attention's projections are all that trains, the FLOPs of attention in one
            forward call of all networks that have them. Gradients still pass through all layers: twice the forward.
            Those of the weights fall away but for the adapted ones', which are computed in full, since the adapters
            are added to the weights first; and attention's products have no weights, but gradients of both sides. The
            adapters' own products, below one percent at common ranks, are left out.
    """
    trained = unet + text
    return (training_flops(trained) if adapted is None else 2 * trained + adapted) + encode


def level_places(size: int | tuple[int, int], levels: int) -> list[int]:
    """Returns the places of each level's map, for a side or (height, width) that halves, rounded up."""
    height, width = (size, size) if isinstance(size, int) else size
    return [-(-height // 2**level) * -(-width // 2**level) for level in range(levels)]


def _linear(places: int, width_in: int, width_out: int) -> int:
    return 2 * places * width_in * width_out


def _convolution(places: int, width_in: int, width_out: int) -> int:
    return 9 * _linear(places, width_in, width_out)


def _residual(places: int, width_in: int, width_out: int) -> int:
    """Returns the FLOPs of two 3x3 convolutions, and of the 1x1 on the shortcut where widths differ."""
    shortcut = _linear(places, width_in, width_out) if width_in != width_out else 0
    return _convolution(places, width_in, width_out) + _convolution(places, width_out, width_out) + shortcut


def _products(queries: int, keys: int, width: int) -> int:
    """Returns the FLOPs of scores and of the mixture of values, all heads together."""
    return 4 * queries * keys * width


def _transformer(places: int, width: int, tokens: int, context_width: int) -> int:
    """Returns the FLOPs of a spatial transformer.

    Of width x width there is one product on each end; the gated MLP has 8 up and 4 down.
    """
    return 14 * _linear(places, width, width) + _attention(places, width, tokens, context_width)


def _attention(places: int, width: int, tokens: int, context_width: int) -> int:
    """Returns the FLOPs of self-attention, with 4 products of width x width, and attention to the text, with 2."""
    text = 2 * _linear(tokens, context_width, width)
    return 6 * _linear(places, width, width) + text + _products(places, places + tokens, width)


def _middle(places: int, width: int) -> int:
    """Returns the FLOPs of the autoencoder's middle: two residual blocks and attention with four projections."""
    return 2 * _residual(places, width, width) + 4 * _linear(places, width, width) + _products(places, places, width)
