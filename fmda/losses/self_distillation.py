"""Self-distillation losses: the student's prediction for one view should match the teacher's for another view.

Predictions are distributions over K prototypes. Teacher and student differ in view, masking and temperature; the
teacher is an average of students. Sources: Caron et al. 2021 (DINO), Zhou et al. 2022 (iBOT), and
Sablayrolles et al. 2019 (KoLeo).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def teacher_distribution(
    logits: Float[Array, "... k"], centre: Float[Array, " k"], temperature: Float[Array, ""] | float
) -> Float[Array, "... k"]:
    """Returns softmax((logits - centre) / temperature), without a gradient (DINO, eq. 1 and algorithm 1).

    Centring alone collapses all outputs to the flat distribution, a low temperature alone to one prototype.
    """
    centred = logits.astype(jnp.float32) - jnp.expand_dims(centre, tuple(range(logits.ndim - 1)))
    return jax.lax.stop_gradient(jax.nn.softmax(centred / temperature, axis=-1))


def updated_centre(centre: Float[Array, " k"], logits: Float[Array, "... k"], momentum: float) -> Float[Array, " k"]:
    """Returns momentum * centre + (1 - momentum) * (mean of the teacher's logits), without a gradient (DINO, eq. 4).

    Under jit the mean is over the whole batch, however it is split over devices.
    """
    mean = logits.astype(jnp.float32).reshape(-1, logits.shape[-1]).mean(0)
    return jax.lax.stop_gradient(momentum * centre + (1 - momentum) * mean)


def view_loss(targets: Float[Array, "b t k"], logits: Float[Array, "b s k"], temperature: float) -> Float[Array, ""]:
    """Returns the cross-entropy (nats) of the student's views against the teacher's views of the same image.

    Args:
        targets: the teacher's distributions for t views.
        logits: the student's outputs for s >= t views, of which the first t are the teacher's; a view is not compared
            with itself.
        temperature: of the student's softmax.

    Returns:
        The mean over images and pairs of different views (DINO, eq. 3).
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)
    pairs = -jnp.einsum("btk,bsk->ts", targets, log_probs) / len(targets)
    other = 1.0 - jnp.eye(pairs.shape[0], pairs.shape[1])
    return (pairs * other).sum() / other.sum()


def masked_patch_loss(
    targets: Float[Array, "n p k"], logits: Float[Array, "n p k"], masked: Bool[Array, "n p"], temperature: float
) -> Float[Array, ""]:
    """Returns the cross-entropy (nats) of the student's masked patches against the teacher, which sees them.

    The mean over the masked patches of a view, then over the views with any masked patch; 0 without any (iBOT, eq. 2).
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)
    each = -(targets * log_probs).sum(-1)
    count = masked.sum(-1)
    view = (each * masked).sum(-1) / jnp.maximum(count, 1)
    return view.sum() / jnp.maximum((count > 0).sum(), 1)


def koleo_loss(x: Float[Array, "b d"], eps: float = 1e-8) -> Float[Array, ""]:
    """Returns the mean of -log(distance to the nearest other row), rows brought to unit length (KoLeo).

    It spreads a batch over the sphere. Needs at least two rows.
    """
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + eps)
    cosines = x @ x.T - 2.0 * jnp.eye(len(x))
    nearest = x[jnp.argmax(jax.lax.stop_gradient(cosines), axis=1)]
    squared = jnp.square(x - nearest).sum(-1)
    return -0.5 * jnp.log(squared + eps).mean()


def perplexity(distribution: Float[Array, "... k"]) -> Float[Array, ""]:
    """Returns how many prototypes are in use: exp of the entropy of the mean distribution, between 1 and k.

    1 means equal predictions for everything, one of the two ways in which self-distillation can collapse.
    """
    mean = distribution.reshape(-1, distribution.shape[-1]).mean(0)
    return jnp.exp(jax.scipy.special.entr(mean).sum())
