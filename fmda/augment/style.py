"""The style of one batch put on another, without training."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num


def adain(
    content: Float[Array, "b h w c"], style: Float[Array, "b h2 w2 c"], alpha: float = 1.0, eps: float = 1e-5
) -> Float[Array, "b h w c"]:
    """Returns the features of `content` with the mean and deviation that each channel has in `style`.

    Blended with `alpha` of the result and 1 - alpha of the content (Huang and Belongie 2017, eq. 8 and 14). Variances
    are over the pixels of one image, `eps` is added to them.
    """

    def moments(x: Array) -> tuple[Array, Array]:
        return x.mean((1, 2), keepdims=True), jnp.sqrt(x.var((1, 2), keepdims=True) + eps)

    (mean, deviation), (style_mean, style_deviation) = moments(content), moments(style)
    return alpha * (style_deviation * (content - mean) / deviation + style_mean) + (1 - alpha) * content


def fourier_style(
    source: Num[Array, "b h w c"], target: Num[Array, "b h w c"], share: float = 0.01
) -> Float[Array, "b h w c"]:
    """Returns source images with the amplitudes of the target's lowest frequencies (Yang and Soatto 2020, FDA, eq. 3).

    Replaced are the frequencies from -b to b along both sides, b = floor(share * shorter side); the phase stays.
    Images are RGB in 0..255, not normalised; the result is float32 and may leave this range a little.
    """
    h, w = source.shape[1:3]
    half = int(share * min(h, w))
    rows, columns = (np.abs(np.fft.fftfreq(side) * side) < half + 0.5 for side in (h, w))
    low = jnp.asarray(rows[:, None] & columns[None])[None, ..., None]
    ours, theirs = (jnp.fft.fft2(x.astype(jnp.float32), axes=(1, 2)) for x in (source, target))
    amplitude = jnp.where(low, jnp.abs(theirs), jnp.abs(ours))
    return jnp.fft.ifft2(amplitude * jnp.exp(1j * jnp.angle(ours)), axes=(1, 2)).real
