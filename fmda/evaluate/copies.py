"""Copy score: how near images come to the one image that a model was trained on, in features of patches."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fmda.nn.norm import unit


def copy_scores(
    images: Float[np.ndarray, "n p d"], crops: Float[np.ndarray, "m q d"]
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Returns each image's similarity to the crop it resembles most, -1..1, and the index of that crop.

    The similarity of image g and crop t is mean_p max_q cos(g_p - m, t_q - m), where m is the mean of all patches of
    the crops: every patch of the image is compared with its best match in the crop, wherever that lies. 1 means that
    each patch of the image occurs in the crop. Without m all patches of a domain look alike to many encoders.
    """

    @jax.jit
    def scores(images: Float[Array, "n p d"], crops: Float[Array, "m q d"]) -> Float[Array, "n m"]:
        mean = crops.mean((0, 1), keepdims=True)
        images, crops = unit(images - mean), unit(crops - mean)
        return jax.lax.map(lambda image: jnp.einsum("pd,mqd->mpq", image, crops).max(-1).mean(-1), images)

    similar = np.asarray(scores(images, crops))
    return similar.max(1), similar.argmax(1)
