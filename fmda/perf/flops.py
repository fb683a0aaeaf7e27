"""Floating-point operations of a function, counted on its traced program; nothing runs.

A multiply and an add count as two. Only matrix products and convolutions are counted: everything else is below one
percent of a transformer. A scan counts its body as often as it runs, a branch counts its most expensive side, the body
of a `shard_map` counts on every device.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

Shape = Callable[[Any], tuple[int, ...]]
"""Variable of a program -> its shape."""


def count_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Returns the FLOPs of matrix products and convolutions in `function(*arguments)`.

    The arguments may be `jax.ShapeDtypeStruct`s. Work that the program repeats to save memory counts as often as it is
    done; `fmda.perf.trace.training_flops` leaves it out.

    Raises:
        ValueError: the program has a `while` loop of unknown length with products inside.
    """
    with on_host():
        return program_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def program_flops(
    program: Any, shape: Shape = lambda variable: variable.aval.shape, length: Callable[[Any], int] | None = None
) -> int:
    """Returns the FLOPs of a traced program (jaxpr).

    Args:
        program: without its constants.
        shape: of a variable, where it is not the traced one.
        length: iterations of a scan, where they are not the traced ones.
    """
    total = 0
    for equation in program.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _dot(equation, shape)
            continue
        if name == "conv_general_dilated":
            total += _convolution(equation, shape)
            continue
        counts = [program_flops(inner, shape, length) for inner in inner_programs(params)]
        if name == "cond":
            total += max(counts)
        elif name == "scan":
            total += sum(counts) * (params["length"] if length is None else length(equation))
        elif name == "shard_map":
            total += sum(counts) * math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
        elif name == "while" and any(counts):
            raise ValueError("a while loop of unknown length holds matrix products; count one iteration and multiply")
        else:
            total += sum(counts)
    return total


def inner_programs(params: Mapping[str, Any]) -> Iterator[Any]:
    """Yields the programs inside an equation (jit, scan, remat, custom derivatives, shard_map, ...)."""
    for value in params.values():
        for item in value if isinstance(value, list | tuple) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


@contextlib.contextmanager
def on_host() -> Iterator[None]:
    """Traces as for the CPU, where there is one: fused kernels of an accelerator hide their products."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(RuntimeError):
            stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
        yield


def _dot(equation: Any, shape: Shape) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = shape(equation.invars[0])
    return 2 * math.prod(shape(equation.outvars[0])) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any, shape: Shape) -> int:
    numbers = equation.params["dimension_numbers"]
    kernel = shape(equation.invars[1])
    # rhs_spec: output channels, input channels of one group, then the window
    per_output = math.prod(kernel[axis] for axis in numbers.rhs_spec[1:])
    # products with the zeros between the elements of a dilated input, as in the gradient of a strided convolution
    per_output //= equation.params["batch_group_count"] * math.prod(equation.params["lhs_dilation"])
    return 2 * math.prod(shape(equation.outvars[0])) * per_output
