"""Grouped convolution, also depthwise, that is fast on a CPU too, where XLA's own takes up to fifty times as long."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Pair = tuple[int, int]


def grouped(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw i o"],
    strides: Sequence[int],
    padding: Any,
    *,
    rhs_dilation: Sequence[int] | None = None,
    precision: Any = None,
    **_: Any,
) -> Float[Array, "b h2 w2 o"]:
    """Returns `jax.lax.conv_general_dilated` of NHWC in c / i groups; stands in for it in `nnx.Conv`.

    On a CPU it is a sum of shifted products, elsewhere the convolution itself. Options of `nnx.Conv` that follow from
    the form, such as the number of groups, are ignored.
    """
    strides = (strides[0], strides[1])
    dilation = (1, 1) if rhs_dilation is None else (rhs_dilation[0], rhs_dilation[1])
    reach = [(size - 1) * step + 1 for size, step in zip(kernel.shape[:2], dilation, strict=True)]
    pads = jax.lax.padtype_to_pads(x.shape[1:3], reach, strides, padding) if isinstance(padding, str) else padding
    (top, bottom), (left, right) = pads
    return _grouped(_Form(strides, ((top, bottom), (left, right)), dilation, precision), x, kernel)


class _Form(NamedTuple):
    """What a convolution is besides its arrays."""

    strides: Pair
    pads: tuple[Pair, Pair]
    dilation: Pair
    precision: Any


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(form: _Form, x: Array, kernel: Array) -> Array:
    return jax.lax.platform_dependent(x, kernel, cpu=partial(_shifted, form), default=partial(_convolved, form))


def _forward(form: _Form, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _grouped(form, x, kernel), (x, kernel)


def _backward(form: _Form, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    depthwise = kernel.shape[2] == 1 and x.shape[-1] == kernel.shape[3]
    return jax.lax.platform_dependent(
        x,
        kernel,
        gradient,
        cpu=partial(_depthwise_gradients, form) if depthwise else partial(_transposed, _shifted, form),
        default=partial(_transposed, _convolved, form),
    )


_grouped.defvjp(_forward, _backward)


# jitted, so that the many equal layers of a network are traced once
@partial(jax.jit, static_argnums=(0, 1))
def _transposed(
    product: Callable[[_Form, Array, Array], Array], form: _Form, x: Array, kernel: Array, gradient: Array
) -> tuple[Array, Array]:
    """Returns the gradients of a product that is linear in each factor: no forward pass is needed."""
    (dx,) = jax.linear_transpose(lambda x: product(form, x, kernel), x)(gradient)
    (dk,) = jax.linear_transpose(lambda kernel: product(form, x, kernel), kernel)(gradient)
    return dx, dk


# the transpose of `_shifted` would be one kernel of the CPU for each tap and each factor, which takes long to compile
@partial(jax.jit, static_argnums=0)
def _depthwise_gradients(form: _Form, x: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
    """Returns the gradients of `_shifted` where each channel has a filter of its own."""
    (rows, columns), strides, dilation = kernel.shape[:2], form.strides, form.dilation
    edges = [(0, 0, 0)]
    for side, size, stride, step, (before, _), out in zip(
        x.shape[1:3], (rows, columns), strides, dilation, form.pads, gradient.shape[1:3], strict=True
    ):
        reach = (size - 1) * step
        edges.append((reach - before, side + before - (out - 1) * stride - 1, stride - 1))
    spread = jax.lax.pad(gradient, jnp.zeros((), gradient.dtype), [*edges, (0, 0, 0)])
    plain = _Form((1, 1), ((0, 0), (0, 0)), dilation, form.precision)
    dx = _shifted(plain, spread, kernel[::-1, ::-1])

    padded = jnp.pad(x, ((0, 0), *form.pads, (0, 0)))
    window = [(side - 1) * stride + 1 for side, stride in zip(gradient.shape[1:3], strides, strict=True)]
    exact = jnp.promote_types(x.dtype, jnp.float32)

    def of_tap(corner: Array) -> Array:
        tap = jax.lax.dynamic_slice(padded, (0, corner[0], corner[1], 0), (len(x), *window, x.shape[-1]))
        return (tap[:, :: strides[0], :: strides[1]].astype(exact) * gradient.astype(exact)).sum((0, 1, 2))

    corners = jnp.indices((rows, columns)).reshape(2, -1).T * jnp.asarray([dilation])
    return dx, jax.lax.map(of_tap, corners).reshape(kernel.shape).astype(kernel.dtype)


def _convolved(form: _Form, x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, form.strides, form.pads, rhs_dilation=form.dilation, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2], precision=form.precision,
    )  # fmt: skip


@partial(jax.jit, static_argnums=0)
def _shifted(form: _Form, x: Array, kernel: Array) -> Array:
    padded = jnp.pad(x, ((0, 0), *form.pads, (0, 0)))
    (rows, columns), (down, right), strides = kernel.shape[:2], form.dilation, form.strides
    h, w = (
        (side - (size - 1) * step - 1) // stride + 1
        for side, size, step, stride in zip(padded.shape[1:3], (rows, columns), form.dilation, strides, strict=True)
    )
    exact = jnp.promote_types(x.dtype, jnp.float32)
    taps = []
    for i in range(rows):
        for j in range(columns):
            corner = (0, i * down, j * right, 0)
            end = (len(x), corner[1] + (h - 1) * strides[0] + 1, corner[2] + (w - 1) * strides[1] + 1, x.shape[-1])
            taps.append(jax.lax.slice(padded, corner, end, (1, *strides, 1)))
    of_group, filters = kernel.shape[2:]
    groups = x.shape[-1] // of_group
    if groups == x.shape[-1] == filters:
        out = jnp.zeros((), exact)
        for tap, weight in zip(taps, kernel.reshape(-1, 1, 1, 1, filters), strict=True):
            out = out + tap.astype(exact) * weight.astype(exact)
    else:
        # one product: one for each tap takes longer to run and to compile
        stacked = jnp.stack(taps, 3).reshape(len(x), h, w, rows * columns, groups, of_group)
        weights = kernel.reshape(rows * columns, of_group, groups, filters // groups)
        out = jnp.einsum(
            "bhwtgi,tigo->bhwgo", stacked, weights, precision=form.precision, preferred_element_type=exact
        ).reshape(len(x), h, w, filters)
    return out.astype(x.dtype)
