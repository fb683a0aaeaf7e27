"""SAM's prompt encoder: points and boxes become tokens, a mask becomes a map that is added to the image's."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from fmda.nn.activation import gelu
from fmda.nn.conv import conv
from fmda.nn.norm import layer_norm

BACKGROUND, OBJECT, TOP_LEFT, BOTTOM_RIGHT, NOTHING = 0, 1, 2, 3, -1
"""Labels of points: outside of the object, on it, corners of its box, and no point at all."""


class MaskEmbedding(nnx.Module):
    """Mask logits at four times the embedding's size -> a map of its size. x: [n, 4h, 4w, 1] -> [n, h, w, channels]."""

    def __init__(self, channels: int, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.conv1 = conv(1, hidden // 4, 2, stride=2, dtype=dtype, rngs=rngs)
        self.norm1 = layer_norm(hidden // 4, eps=1e-6, dtype=dtype, rngs=rngs)
        self.conv2 = conv(hidden // 4, hidden, 2, stride=2, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(hidden, eps=1e-6, dtype=dtype, rngs=rngs)
        self.conv3 = conv(hidden, channels, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n h4 w4 1"]) -> Float[Array, "n h w channels"]:
        x = gelu(self.norm1(self.conv1(x)))
        return self.conv3(gelu(self.norm2(self.conv2(x))))


class PromptEncoder(nnx.Module):
    """Points -> tokens by random Fourier features (Tancik et al. 2020) and a learned vector per label; masks -> maps.

    Coordinates are encoded in float32 whatever `dtype` is.
    """

    def __init__(
        self, image_size: int, channels: int, mask_channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:  # fmt: skip
        self.image_size, self.dtype = image_size, dtype
        draw = nnx.initializers.normal(1.0)
        self.frequencies = nnx.Param(draw(rngs.params(), (2, channels // 2), jnp.float32))
        self.labels = nnx.List(
            nnx.Param(draw(rngs.params(), (channels,), jnp.float32))
            for _ in (BACKGROUND, OBJECT, TOP_LEFT, BOTTOM_RIGHT)
        )
        self.nothing = nnx.Param(draw(rngs.params(), (channels,), jnp.float32))
        self.no_mask = nnx.Param(draw(rngs.params(), (channels,), jnp.float32))
        self.mask = MaskEmbedding(channels, mask_channels, dtype=dtype, rngs=rngs)

    def positions(self, places: Float[Array, "*n 2"]) -> Float[Array, "*n channels"]:
        """Returns the code of places (x, y) in [0, 1], float32."""
        angles = 2 * np.pi * ((2 * places.astype(jnp.float32) - 1) @ self.frequencies[...].astype(jnp.float32))
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

    def grid(self, side: int) -> Float[Array, "side side channels"]:
        """Returns the codes of the embedding's places."""
        centre = (np.arange(side, dtype=np.float32) + 0.5) / side
        return self.positions(jnp.asarray(np.stack(np.meshgrid(centre, centre), axis=-1))).astype(self.dtype)

    def points(self, points: Num[Array, "*n 2"], labels: Num[Array, "*n"]) -> Float[Array, "*n channels"]:
        """Returns the tokens of points (x, y) in pixels of the encoded image and their labels.

        A point below NOTHING becomes zeros, as transformers' padding does.
        """
        code, label = self.positions((points + 0.5) / self.image_size), labels[..., None]
        code = jnp.where(label > NOTHING, code, 0.0)
        for kind, vector in ((NOTHING, self.nothing), *enumerate(self.labels)):
            code = code + jnp.where(label == kind, jnp.broadcast_to(vector[...], code.shape), 0.0)
        return code.astype(self.dtype)
