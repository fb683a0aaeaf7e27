import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fmda.nn.activation import ACTIVATIONS, gelu, quick_gelu
from fmda.nn.conv import average_pool, conv
from fmda.nn.norm import BatchNorm, LayerScale, layer_norm

RNGS = nnx.Rngs(0)


def test_gelu_is_the_error_function_form():
    # The tanh form gives 0.841192 here.
    np.testing.assert_allclose(gelu(jnp.array(1.0)), 0.5 * (1 + math.erf(math.sqrt(0.5))), atol=1e-6)


def test_quick_gelu_is_the_sigmoid_form():
    np.testing.assert_allclose(quick_gelu(jnp.array(1.0)), 1 / (1 + math.exp(-1.702)), rtol=1e-6)
    assert ACTIVATIONS["quick_gelu"] is quick_gelu


def test_layer_norm_has_torchs_epsilon():
    y = layer_norm(2, rngs=RNGS)(jnp.array([[0.001, -0.001]]))
    np.testing.assert_allclose(y, [[0.001 / math.sqrt(1e-6 + 1e-5), -0.001 / math.sqrt(1e-6 + 1e-5)]], rtol=1e-5)


def test_layer_norm_keeps_its_digits_beside_a_large_mean():
    x = np.random.default_rng(0).normal(size=(4, 64)) + 1000
    exact = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(layer_norm(64, rngs=RNGS)(jnp.asarray(x, jnp.float32)), exact, atol=2e-4)


def test_batch_norm_uses_its_statistics():
    norm = BatchNorm(2, rngs=RNGS)
    norm.mean[...], norm.var[...] = jnp.array([1.0, 2.0]), jnp.array([4.0, 9.0])
    norm.scale[...], norm.bias[...] = jnp.array([2.0, 3.0]), jnp.array([0.5, 0.0])
    np.testing.assert_allclose(norm(jnp.array([[[3.0, 5.0]]])), [[[2.5, 3.0]]], rtol=1e-5)


def test_batch_norm_keeps_statistics_apart_from_parameters():
    norm = BatchNorm(2, rngs=RNGS)
    assert set(nnx.to_pure_dict(nnx.state(norm, nnx.Param))) == {"scale", "bias"}
    assert set(nnx.to_pure_dict(nnx.state(norm, nnx.BatchStat))) == {"mean", "var"}


def test_layer_scale_multiplies_by_channel():
    layer = LayerScale(2, initial=0.5)
    np.testing.assert_array_equal(layer(jnp.ones((1, 3, 2))), np.full((1, 3, 2), 0.5))


def test_strided_convolution_pads_both_sides():
    layer = conv(1, 1, 3, stride=2, padding=1, use_bias=False, rngs=RNGS)
    layer.kernel[...] = jnp.ones((3, 3, 1, 1))
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    # Window centres lie at 0 and 2; padding at the far side only would centre them at 1 and 3.
    np.testing.assert_array_equal(layer(x)[0, :, :, 0], [[10, 24], [51, 90]])


def test_average_pool_drops_the_remainder():
    x = jnp.arange(15.0).reshape(1, 3, 5, 1)
    np.testing.assert_array_equal(average_pool(x, 2)[0, :, :, 0], [[3, 5]])
    assert average_pool(x, 1) is x


def test_layers_return_the_dtype_they_were_built_with():
    x = jnp.ones((1, 8, 8, 4), jnp.bfloat16)
    layers = [
        layer_norm(4, dtype=jnp.bfloat16, rngs=RNGS),
        BatchNorm(4, dtype=jnp.bfloat16, rngs=RNGS),
        LayerScale(4, dtype=jnp.bfloat16),
        conv(4, 4, 3, dtype=jnp.bfloat16, rngs=RNGS),
        lambda x: average_pool(x, 2),
        gelu,
        quick_gelu,
    ]
    assert [jax.eval_shape(layer, x).dtype for layer in layers] == [jnp.bfloat16] * len(layers)
