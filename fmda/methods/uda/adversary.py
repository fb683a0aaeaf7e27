"""Discriminators of source and target: small convolutional networks that are trained beside the student.

Their parameters, and those of an auxiliary classifier, are `params["adversary"]`. The network itself, its teacher and
its export never see them. Their learning rate is a multiplier of the optimizer, `adversary/*`; `Optimizer` has 10, as
for heads.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from fmda.methods.dense import convolved, init_convolution
from fmda.trees import Tree

ADVERSARY = "adversary"
"""Name of what is trained beside the network among the parameters."""

SOURCE, TARGET = 0.0, 1.0
"""Labels of the two domains."""


def without_adversary(params: Tree) -> Tree:
    """Returns the parameters of the network alone."""
    return {name: part for name, part in params.items() if name != ADVERSARY}


def init_layers(key: Any, size: int, widths: Sequence[int]) -> Tree:
    """Returns parameters of convolutions size x size from each width to the next (`init_convolution`)."""
    pairs = zip(widths[:-1], widths[1:], strict=True)
    return {i: init_convolution(jax.random.fold_in(key, i), size, *pair) for i, pair in enumerate(pairs)}


def domain_logits(params: Tree, x: Float[Array, "b h w c"], stride: int, padding: int) -> Float[Array, "b h2 w2 1"]:
    """Returns the logits of the target domain, leaky ReLU (0.2) between the layers."""
    for i in range(len(params)):
        x = x if i == 0 else jax.nn.leaky_relu(x, 0.2)
        x = convolved(params[i], x, stride, [(padding, padding)] * 2)
    return x


def domain_cross_entropy(logits: Float[Array, "..."], domain: float) -> Float[Array, ""]:
    """Returns the mean binary cross-entropy (nats) of logits of the target domain."""
    return optax.sigmoid_binary_cross_entropy(logits, jnp.full_like(logits, domain)).mean()
