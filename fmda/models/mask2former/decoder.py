"""Mask2Former's transformer decoder: queries that attend to the places of their own masks."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from fmda.models.mask2former.config import HeadConfig
from fmda.models.mask2former.pixel_decoder import LEVELS
from fmda.models.mask2former.text import TORCH, TextClassifier, TextQueries
from fmda.nn.cross_attention import CrossAttention
from fmda.nn.mlp import ThreeLayers
from fmda.nn.norm import layer_norm
from fmda.nn.position import sine_positions
from fmda.nn.resize import resize

XAVIER = nnx.initializers.xavier_uniform()
PACKED = nnx.initializers.variance_scaling(0.5, "fan_in", "uniform")
"""Xavier's values for query, key and value that are stored as one array."""
BLOCKED = -1e9


class Predictions(NamedTuple):
    """What the initial queries (first) and each layer predict.

    Attributes:
        classes: logits of the classes and, last, of "no object", float32.
        masks: logits at stride 4, float32.
    """

    classes: Float[Array, "l b q k+1"]
    masks: Float[Array, "l b q h w"]


class DecoderLayer(nnx.Module):
    """Masked attention to a level, attention among queries, a two-layer network; each added and then normalised."""

    def __init__(self, config: HeadConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width = config.width
        self.cross, self.attention = (
            CrossAttention(width, config.heads, kernel_init=PACKED, out_init=XAVIER, dtype=dtype, rngs=rngs)
            for _ in range(2)
        )
        self.norm1 = layer_norm(width, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(width, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, config.hidden, kernel_init=XAVIER, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(config.hidden, width, kernel_init=XAVIER, dtype=dtype, rngs=rngs)
        self.norm3 = layer_norm(width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b q width"],
        position: Float[Array, "b q width"],
        key: Float[Array, "b n width"],
        value: Float[Array, "b n width"],
        bias: Float[Array, "b 1 q n"],
    ) -> Float[Array, "b q width"]:
        x = self.norm1(x + self.cross(x + position, key, value, bias))
        x = self.norm2(x + self.attention(x + position, x + position, x))
        return self.norm3(x + self.down(jax.nn.relu(self.up(x))))


class Decoder(nnx.Module):
    """Mask features and memories of the pixel decoder -> `Predictions`.

    `queries` and `positions` are [queries, width]; `level` is a learned code per memory.
    Source: Cheng et al. 2022 (Mask2Former), 3.2; text classifier: Yu et al. 2023 (FC-CLIP).
    """

    def __init__(self, config: HeadConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width = config.width
        self.dtype = dtype
        self.text_queries = TextQueries(config.text_width, width, dtype=dtype, rngs=rngs) if config.fixed else None
        if not config.fixed:
            self.queries, self.positions = (
                nnx.Param(jax.random.normal(rngs.params(), (config.queries, width))) for _ in range(2)
            )
        self.level = nnx.Param(jax.random.normal(rngs.params(), (LEVELS, width)))
        self.layers = nnx.List(DecoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.layers))
        self.norm = layer_norm(width, dtype=dtype, rngs=rngs)
        self.classifier: nnx.Linear | TextClassifier
        if config.text_classes:
            self.classifier = TextClassifier(width, config.mask_width, config.text_width, dtype=dtype, rngs=rngs)
        else:
            self.classifier = nnx.Linear(width, config.classes + 1, kernel_init=TORCH, dtype=dtype, rngs=rngs)
        self.mask = ThreeLayers(width, width, config.mask_width, kernel_init=TORCH, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        features: Float[Array, "b h w mask"],
        memories: Sequence[Float[Array, "b h w width"]],
        text: Float[Array, "k s e"] | None = None,
    ) -> Predictions:
        """Returns the predictions of all layers.

        Args:
            features: mask features.
            memories: of the pixel decoder, the coarsest first.
            text: embeddings of s names of each of k classes, needed by text queries and by a text classifier. A class
                with fewer names repeats one.
        """
        b = len(features)
        x, position = (
            jnp.broadcast_to(part.astype(self.dtype), (b, *part.shape)) for part in self._first_queries(text)
        )
        keys, values, small = [], [], []
        for index, memory in enumerate(memories):
            size, width = (memory.shape[1], memory.shape[2]), memory.shape[-1]
            value = memory.reshape(b, -1, width) + self.level[...][index].astype(self.dtype).reshape(1, 1, -1)
            code = jnp.asarray(sine_positions(size, width)).reshape(1, -1, width).astype(self.dtype)
            keys.append(value + code)
            values.append(value)
            # resized features give the resized masks of all layers, at a fraction of their cost
            small.append(jax.lax.stop_gradient(resize(features, size)).reshape(b, -1, features.shape[-1]))
        queries = self.norm(x)
        predicted = [self._predict(queries, features, text)]
        for index, layer in enumerate(self.layers):
            level = index % LEVELS
            x = layer(x, position, keys[level], values[level], self._bias(queries, small[level]))
            queries = self.norm(x)
            predicted.append(self._predict(queries, features, text))
        return Predictions(*(jnp.stack(parts) for parts in zip(*predicted, strict=True)))

    def _first_queries(self, text: Float[Array, "k s e"] | None) -> tuple[Array, Array]:
        if self.text_queries is None:
            return self.queries[...], self.positions[...]
        assert text is not None
        return self.text_queries(text)

    def _predict(
        self, x: Float[Array, "b q width"], features: Float[Array, "b h w mask"], text: Float[Array, "k s e"] | None
    ) -> tuple[Float[Array, "b q k+1"], Float[Array, "b q h w"]]:
        """Returns logits of classes and of masks, from normalised queries."""
        masks = jnp.einsum("bqc,bhwc->bqhw", self.mask(x), features, preferred_element_type=jnp.float32)
        if isinstance(self.classifier, TextClassifier):
            assert text is not None
            return self.classifier(x, features, masks, text), masks
        return self.classifier(x).astype(jnp.float32), masks

    def _bias(self, x: Float[Array, "b q width"], features: Float[Array, "b n mask"]) -> Float[Array, "b 1 q n"]:
        """Returns what keeps each query inside its own mask: `BLOCKED` outside, 0 inside and where no place is."""
        embedding = jax.lax.stop_gradient(self.mask(x))
        blocked: Bool[Array, "b q n"] = jnp.einsum("bqc,bnc->bqn", embedding, features) < 0
        blocked &= ~blocked.all(-1, keepdims=True)
        return jnp.where(blocked, BLOCKED, 0.0).astype(self.dtype)[:, None]
