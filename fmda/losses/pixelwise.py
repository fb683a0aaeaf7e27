"""Losses and scores of dense predictions, pixel by pixel."""

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
