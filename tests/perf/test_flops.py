import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from fmda.mesh import make_mesh
from fmda.models.clip import TextConfig, VitConfig
from fmda.models.clip.text import TextTransformer
from fmda.models.clip.vision import VisionTransformer
from fmda.models.module import abstract
from fmda.models.sd_unet import UNet, UNetConfig
from fmda.models.sd_vae import Vae, VaeConfig
from fmda.perf.flops import count_flops
from fmda.perf.trace import training_flops

GMAC = 2e9
VIT_B16 = VitConfig(image_size=224, patch_size=16, width=768, layers=12, heads=12, mlp_width=3072)
TEXT_B = TextConfig(vocab_size=49408, context=77, width=512, layers=12, heads=8, mlp_width=2048)


def counted(make, call, *shapes):
    """FLOPs of a call of a network with inputs of these shapes."""
    graph, params = abstract(make)
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count_flops(lambda params, *inputs: call(nnx.merge(graph, params), *inputs), params, *inputs)


@pytest.mark.parametrize(("size", "gflop"), [((224, 224), 35.1), ((448, 448), 157.0), ((448, 336), 113.5)])
def test_vision_tower_at_full_size(size, gflop):
    flops = counted(lambda rngs: VisionTransformer(VIT_B16, 512, rngs=rngs), VisionTransformer.__call__, (1, *size, 3))
    assert flops / 1e9 == pytest.approx(gflop, rel=1e-2)


def test_text_tower_at_full_size():
    graph, params = abstract(lambda rngs: TextTransformer(TEXT_B, 512, rngs=rngs))
    for tokens, gflop in ((77, 5.96), (16, 1.2)):
        ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        flops = count_flops(lambda params, ids: nnx.merge(graph, params)(ids), params, ids)
        assert flops / 1e9 == pytest.approx(gflop, rel=0.02)


def test_stable_diffusion_1_at_full_size():
    unet = counted(lambda rngs: UNet(UNetConfig(), rngs=rngs), UNet.__call__, (1, 64, 64, 4), (1,), (1, 77, 768))
    assert unet == 803_273_441_280
    encode = counted(lambda rngs: Vae(VaeConfig(), rngs=rngs), Vae.encode, (1, 512, 512, 3))
    assert encode / GMAC == pytest.approx(558, rel=0.01)
    decode = counted(lambda rngs: Vae(VaeConfig(), rngs=rngs), Vae.decode, (1, 64, 64, 4))
    assert decode / GMAC == pytest.approx(1257, rel=0.01)


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
    assert count_flops(jax.grad(lambda x, w: jnp.sum((x @ w) ** 2), argnums=(0, 1)), x, w) == 3 * forward


def test_the_gradient_of_a_strided_convolution_leaves_out_the_zeros():
    x, k = jnp.ones((1, 8, 8, 4)), jnp.ones((2, 2, 4, 6))

    def convolve(x, k):
        return jax.lax.conv_general_dilated(x, k, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    both = count_flops(jax.grad(lambda x, k: jnp.sum(convolve(x, k) ** 2), argnums=(0, 1)), x, k)
    assert both == pytest.approx(3 * count_flops(convolve, x, k), rel=0.35)
    assert count_flops(jax.grad(lambda x: jnp.sum(convolve(x, k) ** 2)), x) < 3 * count_flops(convolve, x, k)


def test_training_leaves_out_what_is_computed_again():
    w, x = jnp.ones((5, 5)), jnp.ones((6, 5))

    def block(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    def objective(run):
        def loss(w, x):
            total, _ = jax.lax.scan(lambda x, _: (run(x, w), None), x, None, length=3)
            return jnp.sum(jax.jit(run)(total, w)), {}

        return loss

    plain, again = objective(block), objective(jax.checkpoint(block))
    repeated, once = (count_flops(jax.grad(one, has_aux=True), w, x) for one in (again, plain))
    assert repeated > once == training_flops(again, w, x) == training_flops(plain, w, x)


def test_the_body_of_a_shard_map_counts_on_every_device():
    mesh, rows = make_mesh(), PartitionSpec(("data", "fsdp"))
    x, w = jnp.ones((2 * mesh.size, 3)), jnp.ones((3, 4))
    spread = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)
    assert mesh.size > 1 and count_flops(spread, x, w) == count_flops(jnp.matmul, x, w)


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
