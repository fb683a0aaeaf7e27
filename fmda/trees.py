"""Nested plain dicts of arrays, and the slash paths of their leaves.

A tree is a dict of dicts whose leaves are arrays (or anything with a shape and a dtype). The leaf
`tree["text"]["blocks"][0]["kernel"]` has the path `text/blocks/0/kernel`. Lists of layers appear as dicts with
integer keys, as `flax.nnx` writes them; a path part made of digits stands for an integer key.

Patterns are globs over the whole path: `*` also crosses slashes, and a leading `*/` may stand for nothing, so that
`*/norm*/*` finds `norm/scale` as well as `text/blocks/0/norm1/scale`.
"""

import fnmatch
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Tree = dict[Any, Any]


def flatten(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """Returns {path: leaf} in the tree's own order. Empty dicts leave no trace.

    Raises ValueError for a key that would not survive the way back: one that holds a slash, is empty, or is a string of
    digits (integer keys are what digits stand for).
    """
    flat: dict[str, Any] = {}

    def visit(node: Mapping[Any, Any], prefix: str) -> None:
        for key, value in node.items():
            if isinstance(key, str) and (not key or "/" in key or key.isdecimal()):
                raise ValueError(f"tree key {key!r} under '{prefix}' cannot be part of a path")
            path = f"{prefix}/{key}" if prefix else str(key)
            if isinstance(value, Mapping):
                visit(value, path)
            else:
                flat[path] = value

    visit(tree, "")
    return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """Returns the nested dict of {path: leaf}, the inverse of `flatten`.

    Raises ValueError where one path is both a leaf and the beginning of another.
    """
    tree: Tree = {}
    for path, leaf in flat.items():
        keys = [int(part) if part.isdecimal() else part for part in path.split("/")]
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"'{path}' lies below a leaf")
        if keys[-1] in node:
            raise ValueError(f"'{path}' occurs twice, or is the beginning of another path")
        node[keys[-1]] = leaf
    return tree


def joined(one: Tree, other: Tree) -> Tree:
    """Returns the tree with the leaves of both; where both have one, that of the second."""
    return unflatten(flatten(one) | flatten(other))


def matches(path: str, pattern: str) -> bool:
    """Returns whether the glob `pattern` covers the whole `path` (see the head of this file)."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase("/" + path, pattern)


def select(tree: Mapping[Any, Any], *patterns: str) -> Tree:
    """Returns the part of the tree whose leaf paths match any pattern; empty if none does."""
    return unflatten({path: leaf for path, leaf in flatten(tree).items() if any(matches(path, p) for p in patterns)})


def leaf_paths(tree: Any) -> dict[str, Any]:
    """Returns {path: leaf} of any pytree, named tuples and optimizer states included, in jax's leaf order.

    Attribute names, dict keys and positions all become path parts: an optimizer moment of the parameter `up/kernel`
    has a path such as `opt/0/mu/up/kernel`.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


def count(tree: Any) -> int:
    """Returns the number of scalars in the tree; leaves need only a shape."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def size_bytes(tree: Any) -> int:
    """Returns the bytes that the leaves hold, over all devices once; leaves need only a shape and a dtype."""
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def norm(tree: Any) -> Float[Array, ""]:
    """Returns the Euclidean norm over all leaves together, summed in float32."""
    squares = [jnp.sum(jnp.square(jnp.abs(leaf).astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))
