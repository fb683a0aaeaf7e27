"""Floating-point operations of a model: counted on its program, and by closed formulas that the count must meet.

A multiply and an add count as two. Only matrix products and convolutions are counted: everything else is below one
percent of a transformer. What is counted is the model's own work, so nothing that is computed twice to save memory.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax


def count_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Returns the FLOPs of matrix products and convolutions in `function(*arguments)`.

    Counts on the traced program, so nothing runs and arguments may be `jax.ShapeDtypeStruct`s. A scan counts its body
    as often as it runs (XLA's own analysis counts it once), a branch counts its dearest side.

    Raises:
        ValueError: the program has a `while` loop whose length is not known beforehand, with products inside.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def compiled_flops(function: Callable[..., Any], *arguments: Any) -> float | None:
    """Returns XLA's own estimate for the lowered program, all operations included; None where the backend has none.

    Loops count once and custom kernels nothing: lower the unrolled, un-rematerialised model.
    """
    cost = jax.jit(function).lower(*arguments).cost_analysis()
    cost = cost[0] if isinstance(cost, list | tuple) and cost else cost
    return float(cost["flops"]) if isinstance(cost, Mapping) and "flops" in cost else None


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            total += _dot(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        elif name == "scan":
            total += equation.params["length"] * _count(equation.params["jaxpr"].jaxpr)
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in equation.params["branches"])
        elif name == "while":
            if any(_count(inner) for inner in _inner(equation.params)):
                raise ValueError("a while loop of unknown length holds matrix products; count one turn and multiply")
        else:
            total += sum(_count(inner) for inner in _inner(equation.params))
    return total


def _inner(params: Mapping[str, Any]) -> Iterator[Any]:
    """Yields the programs inside an equation (jit, remat, custom derivatives, shard_map, ...)."""
    for value in params.values():
        for item in value if isinstance(value, list | tuple) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def _dot(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> int:
    numbers = equation.params["dimension_numbers"]
    kernel = equation.invars[1].aval.shape
    # rhs_spec: output channels, input channels of one group, then the window
    per_output = math.prod(kernel[axis] for axis in numbers.rhs_spec[1:])
    return 2 * math.prod(equation.outvars[0].aval.shape) * per_output // equation.params["batch_group_count"]


def transformer_flops(tokens: int, width: int, layers: int, mlp_width: int) -> int:
    """Returns the FLOPs of pre-norm transformer blocks on one sequence.

    A block has four width x width products (8 T W^2), scores and their use (4 T^2 W) and an MLP (4 T W M).
    """
    return layers * (8 * tokens * width**2 + 4 * tokens**2 * width + 4 * tokens * width * mlp_width)


def value_path_flops(tokens: int, width: int, mlp_width: int) -> int:
    """Returns the FLOPs of one block without query, key and attention, as MaskCLIP runs its last one."""
    return 4 * tokens * width**2 + 4 * tokens * width * mlp_width


def vit_flops(
    image_size: int | tuple[int, int],
    *,
    patch_size: int,
    width: int,
    layers: int,
    mlp_width: int,
    projected_tokens: int = 1,
    embed_dim: int = 0,
) -> int:
    """Returns the FLOPs of a vision transformer on one image.

    Args:
        image_size: side, or (height, width), in pixels; what no whole patch covers is dropped.
        patch_size, width, layers, mlp_width: of the tower.
        projected_tokens: how many tokens go through the output projection (1: the class token; all for dense features).
        embed_dim: size of that projection; 0 where there is none.
    """
    height, across = (image_size, image_size) if isinstance(image_size, int) else image_size
    patches = (height // patch_size) * (across // patch_size)
    embedding = 2 * patches * 3 * patch_size**2 * width
    projection = 2 * projected_tokens * width * embed_dim
    return embedding + transformer_flops(patches + 1, width, layers, mlp_width) + projection


def text_flops(tokens: int, *, width: int, layers: int, mlp_width: int, embed_dim: int = 0) -> int:
    """Returns the FLOPs of a text transformer on one prompt of `tokens` tokens, read at one of them.

    The causal mask saves nothing: the whole score matrix is computed.
    """
    return transformer_flops(tokens, width, layers, mlp_width) + 2 * width * embed_dim


def training_flops(forward: float) -> float:
    """Returns the FLOPs of forward and backward where everything trains: three times the forward ones.

    Recomputation (remat) is not the model's work and does not count towards MFU.
    """
    return 3 * forward
