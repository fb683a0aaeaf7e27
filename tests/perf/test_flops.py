import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fmda.models.clip import TextConfig, VitConfig
from fmda.models.clip.text import TextTransformer
from fmda.models.clip.vision import VisionTransformer
from fmda.perf.flops import (
    compiled_flops,
    count_flops,
    text_flops,
    training_flops,
    transformer_flops,
    value_path_flops,
    vit_flops,
)

VIT_B16 = {"patch_size": 16, "width": 768, "layers": 12, "mlp_width": 3072}
TEXT_B = {"width": 512, "layers": 12, "mlp_width": 2048}


@pytest.mark.parametrize(("size", "gflop"), [(448, 157.0), (224, 35.1), ((448, 896), 359.0), ((448, 336), 113.5)])
def test_vision_tower_at_full_size(size, gflop):
    assert vit_flops(size, **VIT_B16) / 1e9 == pytest.approx(gflop, rel=2e-3)


def test_blocks_and_value_path_at_full_size():
    assert transformer_flops(785, 768, 1, 3072) / 1e9 == pytest.approx(13.0, abs=0.05)
    assert value_path_flops(785, 768, 3072) / 1e9 == pytest.approx(9.3, abs=0.05)
    maskclip = vit_flops(448, **VIT_B16 | {"layers": 11}) + value_path_flops(785, 768, 3072)
    assert maskclip / 1e9 == pytest.approx(153, abs=0.5)


@pytest.mark.parametrize(("tokens", "gflop"), [(77, 5.96), (16, 1.2)])
def test_text_tower_at_full_size(tokens, gflop):
    assert text_flops(tokens, **TEXT_B) / 1e9 == pytest.approx(gflop, rel=0.02)


def abstract(build):
    """Returns (graph, parameter shapes) without making any array."""
    graph, state = nnx.split(nnx.eval_shape(build))
    return graph, nnx.to_pure_dict(state)


@pytest.mark.parametrize("size", [224, 448])
def test_count_of_the_full_vision_tower_meets_the_formula(size):
    config = VitConfig(image_size=224, patch_size=16, width=768, layers=12, heads=12, mlp_width=3072)
    graph, params = abstract(lambda: VisionTransformer(config, 512, rngs=nnx.Rngs(0)))
    pixels = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    counted = count_flops(lambda p, x: nnx.merge(graph, p)(x), params, pixels)
    assert counted == pytest.approx(vit_flops(size, **VIT_B16, embed_dim=512), rel=0.02)


def test_count_of_the_full_text_tower_meets_the_formula():
    config = TextConfig(vocab_size=49408, context=77, width=512, layers=12, heads=8, mlp_width=2048)
    graph, params = abstract(lambda: TextTransformer(config, 512, rngs=nnx.Rngs(0)))
    ids = jax.ShapeDtypeStruct((1, 77), jnp.int32)
    counted = count_flops(lambda p, x: nnx.merge(graph, p)(x), params, ids)
    assert counted == pytest.approx(text_flops(77, **TEXT_B, embed_dim=512), rel=0.02)


def test_lowered_program_meets_the_count():
    config = VitConfig(image_size=64, patch_size=16, width=256, layers=2, heads=4, mlp_width=1024)
    graph, params = abstract(lambda: VisionTransformer(config, 64, rngs=nnx.Rngs(0)))
    pixels = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    arguments = (lambda p, x: nnx.merge(graph, p)(x), params, pixels)
    assert compiled_flops(*arguments) == pytest.approx(count_flops(*arguments), rel=0.02)


def test_products_by_hand():
    a, b = jnp.ones((5, 3, 4)), jnp.ones((5, 4, 7))
    assert count_flops(jnp.matmul, a, b) == 2 * 5 * 3 * 4 * 7
    assert count_flops(lambda x: x + 1, a) == 0
    assert count_flops(jax.checkpoint(jax.jit(lambda x, y: jnp.tanh(x @ y))), a, b) == 2 * 5 * 3 * 4 * 7


@pytest.mark.parametrize(("groups", "stride", "flops"), [(1, 1, 2 * 64 * 6 * 9 * 4), (2, 2, 2 * 16 * 6 * 9 * 2)])
def test_convolution_by_hand(groups, stride, flops):
    x, k = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4 // groups, 6))

    def convolve(x, k):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, k, (stride, stride), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    assert count_flops(convolve, x, k) == flops


def test_backward_of_products_is_twice_the_forward():
    x, w = jnp.ones((6, 5)), jnp.ones((5, 4))
    forward = count_flops(lambda x, w: x @ w, x, w)
    both = count_flops(jax.grad(lambda x, w: jnp.sum((x @ w) ** 2), argnums=(0, 1)), x, w)
    assert both == training_flops(forward) == 3 * forward


def test_scan_counts_each_turn_and_branch_the_dearest():
    w = jnp.ones((4, 4))

    def scanned(x):
        return jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=12)[0]

    def branched(x):
        return jax.lax.cond(x[0, 0] > 0, lambda v: v @ w @ w, lambda v: v, x)

    assert count_flops(scanned, w) == 12 * 2 * 64
    assert count_flops(branched, w) == 2 * 2 * 64


def test_loop_of_unknown_length_is_refused():
    w = jnp.ones((4, 4))
    with pytest.raises(ValueError, match="unknown length"):
        count_flops(lambda x: jax.lax.while_loop(lambda c: jnp.sum(c) < 9, lambda c: c @ w, x), w)
    assert count_flops(lambda x: jax.lax.while_loop(lambda c: jnp.sum(c) < 9, lambda c: c + 1, x), w) == 0
    assert np.isfinite(w).all()
