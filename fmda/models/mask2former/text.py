"""Text in Mask2Former: classes and queries from text embeddings, and the ensemble with CLIP's own classification."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from fmda.nn.mlp import ThreeLayers
from fmda.nn.norm import layer_norm, unit
from fmda.nn.resize import resize

TORCH = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""What torch draws for a linear layer."""

MOST = 100.0
"""Largest factor of the cosines."""


class TextClassifier(nnx.Module):
    """Class logits of queries: scaled cosines of an embedding with those of the classes' names, and of "no object".

    The embedding comes from the query and from the mask features under its mask. `void` is the learned embedding of
    "no object". Source: Yu et al. 2023 (FC-CLIP).
    """

    def __init__(self, width: int, mask_width: int, text_width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm = layer_norm(mask_width, dtype=dtype, rngs=rngs)
        self.project = nnx.Linear(mask_width, width, dtype=dtype, rngs=rngs)
        self.mlp = ThreeLayers(width, width, text_width, kernel_init=TORCH, dtype=dtype, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(math.log(1 / 0.07), jnp.float32))
        self.void = nnx.Param(jax.random.normal(rngs.params(), (1, text_width)))

    def __call__(
        self,
        x: Float[Array, "b q width"],
        features: Float[Array, "b h w mask"],
        masks: Float[Array, "b q h w"],
        names: Float[Array, "k s e"],
    ) -> Float[Array, "b q k+1"]:
        """Returns float32 logits; of a class the largest over its names."""
        embedding = unit(self.mlp(x + self.project(self.norm(mask_pooled(features, masks)))))
        void = jnp.einsum("bqe,ke->bqk", embedding, unit(self.void[...]))
        scale = jnp.minimum(jnp.exp(self.logit_scale[...].astype(jnp.float32)), MOST)
        return scale * jnp.concatenate([cosines(embedding, names), void], axis=-1)


class TextQueries(nnx.Module):
    """One query per class, made of its text embedding. [k, s, e] -> (queries [k, width], positions [k, width]).

    Source: Pak et al. 2024 (tqdm): query k stands for class k.
    """

    def __init__(self, text_width: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.query = nnx.Linear(text_width, width, dtype=dtype, rngs=rngs)
        self.position = nnx.Linear(text_width, width, dtype=dtype, rngs=rngs)

    def __call__(self, names: Float[Array, "k s e"]) -> tuple[Float[Array, "k width"], Float[Array, "k width"]]:
        # unit vectors would enter with a mean square of 1 / e
        text = unit(unit(names).mean(1)) * math.sqrt(names.shape[-1])
        return self.query(text), self.position(text)


def cosines(x: Float[Array, "b q e"], names: Float[Array, "k s e"]) -> Float[Array, "b q k"]:
    """Returns cosines of embeddings with those of the classes' names, of a class the largest over its names."""
    return jnp.einsum("bqe,kse->bqks", unit(x), unit(names)).max(-1)


def mask_pooled(features: Float[Array, "b h w c"], masks: Float[Array, "b q h2 w2"]) -> Float[Array, "b q c"]:
    """Returns the mean of features where a mask's logit is above 0, zeros where it is nowhere; masks are resized."""
    size = (features.shape[1], features.shape[2])
    inside = resize(jnp.moveaxis(jax.lax.stop_gradient(masks), 1, -1), size) > 0
    inside = inside.astype(jnp.float32)
    share = inside / (inside.sum((1, 2), keepdims=True) + 1e-8)
    return jnp.einsum("bhwq,bhwc->bqc", share, features.astype(jnp.float32)).astype(features.dtype)


def geometric_ensemble(
    logits: Float[Array, "*s k+1"],
    clip_logits: Float[Array, "*s k"],
    seen: Bool[Array, "k"],
    seen_share: float = 0.4,
    unseen_share: float = 0.8,
) -> Float[Array, "*s k+1"]:
    """Returns log-probabilities of the geometric mean of a head's and CLIP's probabilities, float32.

    The head alone decides on "no object". Source: Yu et al. 2023 (FC-CLIP), section 3.3.

    Args:
        logits: of the head, "no object" last.
        clip_logits: of CLIP's features under the masks.
        seen: classes that occur in training.
        seen_share, unseen_share: CLIP's weight in the mean, for classes that occur in training and for others.
    """
    logits = logits.astype(jnp.float32)
    own, clip = (jax.nn.log_softmax(x) for x in (logits[..., :-1], clip_logits.astype(jnp.float32)))
    share = jnp.where(seen, seen_share, unseen_share).reshape(*(1,) * (own.ndim - 1), -1)
    classes = jax.nn.log_softmax((1 - share) * own + share * clip)
    void = jax.nn.log_softmax(logits)[..., -1:]
    return jnp.concatenate([classes + jnp.log1p(-jnp.exp(void)), void], axis=-1)
