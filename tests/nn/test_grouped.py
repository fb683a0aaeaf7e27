"""Grouped convolution: the CPU's sum of shifted products against XLA's convolution, gradients and FLOPs included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmda.nn import grouped as module
from fmda.nn.grouped import grouped
from fmda.perf import count_flops

# image, side of the kernel, (channels, filters) of a group, strides, dilation, padding
CASES = {
    "depthwise": ((2, 9, 11, 6), 3, (1, 1), (1, 1), None, ((1, 1), (1, 1))),
    "strided, padded as TensorFlow does": ((2, 10, 13, 6), 5, (1, 1), (2, 2), None, "SAME"),
    "dilated": ((1, 9, 11, 6), 3, (1, 1), (1, 2), (2, 3), ((2, 2), (3, 3))),
    "two filters a channel": ((1, 9, 11, 6), 3, (1, 2), (1, 1), None, ((1, 1), (1, 1))),
    "groups": ((1, 9, 11, 6), 3, (3, 5), (2, 1), (1, 2), ((1, 1), (2, 2))),
}


def both(case):
    shape, size, (channels, filters), strides, dilation, padding = CASES[case]
    groups, rng = shape[-1] // channels, np.random.default_rng(0)
    kernel_shape = (size, size, channels, groups * filters)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (shape, kernel_shape))

    def theirs(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, rhs_dilation=dilation, dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )  # fmt: skip

    return x, kernel, theirs, lambda x, kernel: grouped(x, kernel, strides, padding, rhs_dilation=dilation)


def with_gradients(function):
    return jax.jit(jax.value_and_grad(lambda x, kernel: (jnp.sin(function(x, kernel))).sum(), (0, 1)))


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_convolution(case):
    x, kernel, theirs, ours = both(case)
    np.testing.assert_allclose(ours(x, kernel), theirs(x, kernel), atol=1e-5)
    for a, b in zip(*(jax.tree.leaves(with_gradients(f)(x, kernel)) for f in (ours, theirs)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5)


def test_flops_are_those_of_the_convolution():
    x, kernel, theirs, ours = both("depthwise")
    assert count_flops(ours, x, kernel) == count_flops(theirs, x, kernel) == 2 * 2 * 9 * 11 * 6 * 9
    assert count_flops(with_gradients(ours), x, kernel) == count_flops(with_gradients(theirs), x, kernel)
    x, kernel, theirs, ours = both("groups")
    assert count_flops(ours, x, kernel) == count_flops(theirs, x, kernel) == 2 * 5 * 11 * 10 * 3 * 9


def test_other_devices_get_the_convolution(monkeypatch):
    x, kernel, *_, ours = both("depthwise")
    lowered = jax.jit(ours).trace(x, kernel).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.convolution" in lowered and "stablehlo.slice" not in lowered
    assert "stablehlo.convolution" not in jax.jit(ours).lower(x, kernel).as_text()
    # faulty twin: rows and columns exchanged
    shifted = module._shifted
    monkeypatch.setattr(module, "_shifted", lambda *a: shifted(*a[:-1], a[-1].swapaxes(0, 1)))
    assert np.abs(ours(x, kernel) - both("depthwise")[2](x, kernel)).max() > 0.1
