"""Losses and scores of dense predictions, pixel by pixel.

Under jit, means and shares are over the whole batch, however it is split over devices.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

IGNORE = 255


def cross_entropy(
    logits: Float[Array, "b h w k"], labels: Int[Array, "b h w"], ignore: int = IGNORE
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns (mean cross-entropy in nats, share of correct pixels) over the pixels not labelled `ignore`.

    Both are 0 where all pixels are ignored.
    """
    valid = (labels != ignore).astype(jnp.float32)
    count = jnp.maximum(valid.sum(), 1.0)
    targets = jnp.where(labels == ignore, 0, labels).astype(jnp.int32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    correct = (logits.argmax(-1) == targets).astype(jnp.float32)
    return (losses * valid).sum() / count, (correct * valid).sum() / count


def weighted_cross_entropy(
    logits: Float[Array, "b h w k"],
    labels: Int[Array, "b h w"],
    weights: Float[Array, "b h w"] | None = None,
    ignore: int = IGNORE,
) -> Float[Array, ""]:
    """Returns cross-entropy (nats) times weight, 0 where the label is `ignore`, as the mean over all pixels.

    Ignored pixels count in the mean (DACS, DAFormer): an image with few labels weighs little.
    """
    valid = labels != ignore
    targets = jnp.where(valid, labels, 0).astype(jnp.int32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets) * valid
    return (losses if weights is None else losses * weights).mean()


def dice_loss(overlap: Float[Array, "*n"], areas: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns 1 - (2 overlap + 1) / (areas + 1), from the sum of the product of two soft masks and that of both masks.

    Source: Milletari et al. 2016 (V-Net), with Mask2Former's ones, which make it 0 for two empty masks.
    """
    return 1 - (2 * overlap + 1) / (areas + 1)


def pseudo_labels(
    logits: Float[Array, "b h w k"], threshold: float = 0.968
) -> tuple[Int[Array, "b h w"], Float[Array, ""]]:
    """Returns (most probable classes, share of pixels of the whole batch whose probability reaches `threshold`).

    The share is the weight of each pixel of the batch in the loss (Tranheden et al. 2021, DACS). No gradient.
    """
    labels, confidence = _predicted(logits)
    return labels, (confidence >= threshold).mean(dtype=jnp.float32)


def confident_labels(logits: Float[Array, "b h w k"], threshold: float) -> Int[Array, "b h w"]:
    """Returns the most probable classes, 255 where the probability is below `threshold`. No gradient."""
    labels, confidence = _predicted(logits)
    return jnp.where(confidence >= threshold, labels, IGNORE)


def _predicted(logits: Array) -> tuple[Array, Array]:
    """Returns (most probable classes, their probabilities), without a gradient."""
    logits = jax.lax.stop_gradient(logits).astype(jnp.float32)
    return logits.argmax(-1), jax.nn.softmax(logits, axis=-1).max(-1)


def entropy_loss(logits: Float[Array, "b h w k"], power: float = 1.0) -> Float[Array, ""]:
    """Returns the mean over pixels of (entropy / log k) ** power, between 0 and 1.

    Power 1 is MinEnt (Vu et al. 2019, ADVENT; weight 0.001), power 4 the robust entropy of FDA (Yang and Soatto 2020,
    eq. 5: the square to the power 2; weight 0.005).
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    entropy = -(jnp.exp(log_probs) * log_probs).sum(-1) / jnp.log(logits.shape[-1])
    return (entropy**power).mean()
