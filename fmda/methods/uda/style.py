"""The style of the target put on source images before the student sees them."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from fmda.augment.photometric import colour_jitter
from fmda.augment.style import adain, fourier_style
from fmda.config import FolderOrName, NonNegativeFloat, Share
from fmda.errors import UserError
from fmda.weights.load import load_vae
from fmda.weights.network import Loaded


@dataclass(frozen=True)
class StyleConfig:
    """Each source image takes the style of the target image at its place in the batch.

    Attributes:
        method: "fda", amplitudes of low frequencies (Yang and Soatto 2020), or "adain", mean and deviation of each
            channel (Huang and Belongie 2017) of an autoencoder's latents.
        share: see `fourier_style`; 0.01, 0.05 and 0.09 in the paper.
        autoencoder: folder or hub id of the autoencoder of a Stable Diffusion, or of the whole model.
        alpha: share of the target's statistics in the latents; the source's own are the rest.
        detail: share of what the autoencoder loses of a source image that is added again; a small autoencoder blurs.
        jitter: strength of random changes of colour of the target images whose style is taken, so that one image gives
            many styles; 0 takes its own.
    """

    method: Literal["fda", "adain"] = "fda"
    share: Share = 0.01
    autoencoder: FolderOrName | None = None
    alpha: Share = 1.0
    detail: Share = 0.0
    jitter: NonNegativeFloat = 0.0


def open_autoencoder(config: StyleConfig | None, crop: int) -> Loaded | None:
    """Returns the autoencoder, None where the method needs none.

    Raises UserError where none is named, or the side of the crops does not fit.
    """
    if config is None or config.method != "adain":
        return None
    if config.autoencoder is None:
        raise UserError(
            "learn.style.autoencoder: the method 'adain' needs one; name the folder or hub id of a Stable Diffusion"
        )
    autoencoder = load_vae(str(config.autoencoder))
    if crop % autoencoder.config.factor:
        raise UserError(f"crop: {crop} is no multiple of {autoencoder.config.factor}, as learn.style.autoencoder needs")
    return autoencoder


def styled(
    config: StyleConfig,
    source: Num[Array, "b H W 3"],
    target: Num[Array, "b H W 3"],
    key: Any,
    autoencoder: nnx.Module | None = None,
) -> Float[Array, "b H W 3"]:
    """Returns source images in the style of target images, RGB in 0..255; AdaIN needs the autoencoder."""
    source, target = source.astype(jnp.float32), target.astype(jnp.float32)
    if config.jitter:
        target = colour_jitter(key, target, config.jitter)
    if config.method == "fda":
        return fourier_style(source, target, config.share)
    network: Any = autoencoder
    ours, theirs = (network.encode(images / 127.5 - 1)[0] for images in (source, target))
    images = (network.decode(adain(ours, theirs, config.alpha)) + 1) * 127.5
    if config.detail:
        images += config.detail * (source - (network.decode(ours) + 1) * 127.5)
    return jax.lax.stop_gradient(jnp.clip(images, 0, 255))
