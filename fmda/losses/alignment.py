"""Losses that align two sets of embeddings."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def contrastive_loss(
    images: Float[Array, "b d"],
    texts: Float[Array, "b d"],
    scale: Float[Array, ""],
    also_true: Bool[Array, "b b"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the symmetric cross-entropy of matching each image with its own text, and metrics.

    With the batch split over devices the [b, b] product is still taken over the whole batch: under jit the compiler
    gathers the other devices' embeddings.

    Args:
        images: embeddings, any length; normalised here.
        texts: embeddings of the texts, row i belongs to image i.
        scale: multiplies the cosines (the inverse temperature).
        also_true: entry [i, j] is true where text j also describes image i. Such pairs are no negatives and leave
            the sums; the diagonal always stays.

    Returns:
        The loss in nats and {"accuracy": share of images whose own text scores highest, "positives": mean cosine of
        the true pairs}. Source: Radford et al. 2021 (CLIP), figure 3; the exclusion of true pairs is ours.
    """
    images = images / jnp.linalg.norm(images, axis=-1, keepdims=True)
    texts = texts / jnp.linalg.norm(texts, axis=-1, keepdims=True)
    cosines = images @ texts.T
    logits = scale * cosines
    diagonal = jnp.eye(len(images), dtype=bool)
    if also_true is not None:
        logits = jnp.where(also_true & ~diagonal, -jnp.inf, logits)
    by_image = -jnp.diagonal(jax.nn.log_softmax(logits, axis=1))
    by_text = -jnp.diagonal(jax.nn.log_softmax(logits, axis=0))
    metrics = {
        "accuracy": jnp.mean(jnp.argmax(logits, axis=1) == jnp.arange(len(images))),
        "positives": jnp.mean(jnp.diagonal(cosines)),
    }
    return (jnp.mean(by_image) + jnp.mean(by_text)) / 2, metrics
