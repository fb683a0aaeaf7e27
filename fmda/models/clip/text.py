"""CLIP's text transformer."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fmda.errors import UserError
from fmda.models.clip.config import TextConfig
from fmda.models.clip.transformer import blocks, projection
from fmda.nn.norm import layer_norm

LARGEST_ID = 2
"""The `eos_token_id` of old configuration files, which means: read off at the largest id."""


class TextTransformer(nnx.Module):
    """Text tower. ids: [B, T] with T up to the context length -> [B, embed_dim], not L2-normalised.

    With `embed_dim` None there is no projection; Stable Diffusion reads `hidden`.

    Each token sees only itself and what precedes it, so that ids after the end token change nothing, and a context
    shorter than the position table gives exactly what a padded one gives. Source: Radford et al. 2021, 2.4.
    """

    def __init__(
        self, config: TextConfig, embed_dim: int | None, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        width = config.width
        normal = nnx.initializers.normal
        self.config = config
        self.dtype = dtype
        self.token_embedding = nnx.Embed(config.vocab_size, width, dtype=dtype, embedding_init=normal(0.02), rngs=rngs)
        self.position = nnx.Param(normal(0.01)(rngs.params(), (config.context, width), jnp.float32))
        self.blocks = blocks(config, dtype=dtype, rngs=rngs)
        self.norm_final = layer_norm(width, eps=config.norm_eps, dtype=dtype, rngs=rngs)
        self.projection = projection(width, embed_dim, dtype=dtype, rngs=rngs)

    def tokens(self, ids: Int[Array, "b t"]) -> Float[Array, "b t width"]:
        """Returns token and position embeddings added.

        Raises UserError where there are more ids than positions.
        """
        length = ids.shape[1]
        if length > self.config.context:
            raise UserError(
                f"text of {length} tokens, but the model has {self.config.context} positions; "
                "shorten the prompt or pass a smaller context"
            )
        return self.token_embedding(ids) + self.position[...][None, :length].astype(self.dtype)

    def hidden(self, ids: Int[Array, "b t"]) -> Float[Array, "b t width"]:
        """Returns the last hidden state, after the final norm."""
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x, causal=True)
        return self.norm_final(x)

    def end(self, ids: Int[Array, "b t"]) -> Int[Array, "b"]:
        """Returns the place of the end token in each row, 0 where a row has none (see `TextConfig`)."""
        if self.config.eos_token_id == LARGEST_ID:
            return jnp.argmax(ids, axis=-1)
        return jnp.argmax((ids == self.config.eos_token_id).astype(jnp.int32), axis=-1)

    def __call__(self, ids: Int[Array, "b t"]) -> Float[Array, "b embed"]:
        """Returns the hidden state at the end token, projected where there is a projection."""
        x = self.hidden(ids)
        pooled = jnp.take_along_axis(x, self.end(ids)[:, None, None], axis=1)[:, 0]
        return pooled if self.projection is None else self.projection(pooled)
