from functools import lru_cache

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fmda.models.sd_unet import UNet, UNetConfig
from fmda.models.sd_vae import Vae, VaeConfig
from fmda.perf.diffusion_flops import (
    dreambooth_step_flops,
    sampling_flops,
    unet_attention_flops,
    unet_flops,
    vae_decode_flops,
    vae_encode_flops,
)
from fmda.perf.flops import compiled_flops, count_flops, text_flops

GMAC = 2e9
UNET = {"channels": (320, 640, 1280, 1280), "layers": 2, "attention": (True, True, True, False), "context_width": 768}
VAE = {"channels": (128, 256, 512, 512), "layers": 2}
TEXT = {"width": 768, "layers": 12, "mlp_width": 3072}
# wide and few blocks: there XLA's elementwise operations, and the taps on padding that it leaves out, weigh little
SMALL_UNET = UNetConfig(channels=(256, 512), layers=1, attention=(False, True), heads=(4, 4), context_width=64)
SMALL_VAE = VaeConfig(channels=(96, 192), layers=1)


@lru_cache
def abstract(module, config):
    """Returns (graph, parameter shapes) without making any array."""
    graph, state = nnx.split(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def unet_sizes(config):
    return {name: getattr(config, name) for name in ("channels", "layers", "attention", "context_width")}


def vae_sizes(config):
    return {name: getattr(config, name) for name in ("channels", "layers")}


def unet_program(config, height, width, tokens):
    """Returns (function, parameter shapes, argument shapes) of one call of the network on one sample."""
    graph, params = abstract(UNet, config)
    shapes = [(1, height, width, config.in_channels), (1,), (1, tokens, config.context_width)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return lambda p, x, t, c: nnx.merge(graph, p)(x, t, c), params, *arguments


def vae_programs(config, height, width):
    """Returns the same of encoder and decoder on one image of height x width pixels."""
    graph, params = abstract(Vae, config)
    image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    latents = jax.ShapeDtypeStruct((1, height // config.factor, width // config.factor, 4), jnp.float32)
    encode = (lambda p, x: nnx.merge(graph, p).encode(x), params, image)
    return encode, (lambda p, z: nnx.merge(graph, p).decode(z), params, latents)


@pytest.mark.parametrize(
    ("value", "gmac"),
    [
        (unet_flops(64, 77, **UNET), 401.6),
        (unet_flops((64, 64), **UNET), 401.6),
        (unet_flops(128, 77, **UNET), 2337),
        (vae_encode_flops(512, **VAE), 558),
        (vae_decode_flops(512, **VAE), 1257),
        (text_flops(77, **TEXT), 6.6),
    ],
)
def test_stable_diffusion_1_at_full_size(value, gmac):
    assert value / GMAC == pytest.approx(gmac, rel=0.01)


def test_attention_products_of_the_unet():
    # by hand: 4 T (T + 77) W over the transformers, 5 in each of three levels and one in the middle
    products = (
        sum(5 * 4 * places * (places + 77) * width for places, width in ((4096, 320), (1024, 640), (256, 1280)))
        + 4 * 64 * (64 + 77) * 1280
    )
    assert products / GMAC == pytest.approx(63, rel=0.01)
    assert (unet_flops(64, 77, **UNET) - products) / GMAC == pytest.approx(338.6, rel=0.01)


def test_one_image_and_one_personalisation_step():
    unet, text = unet_flops(64, 77, **UNET), text_flops(77, **TEXT)
    encode, decode = vae_encode_flops(512, **VAE), vae_decode_flops(512, **VAE)
    image = sampling_flops(51, unet=unet, decode=decode, text=text)
    assert image / GMAC == pytest.approx(42_240, rel=0.01)
    assert 2975 * image / 1e15 == pytest.approx(251, rel=0.01)
    assert sampling_flops(50, unet=unet, guidance=False) == 50 * unet
    step = dreambooth_step_flops(unet=unet, text=text, encode=encode)
    assert step / GMAC == pytest.approx(1783, rel=0.01)
    low_rank = dreambooth_step_flops(unet=unet, encode=encode, adapted=unet_attention_flops(64, **UNET))
    # counted on the traced program, attention in one part: 2.256 times the forward
    assert (low_rank - encode) / unet == pytest.approx(2.256, abs=0.001)


@pytest.mark.slow
def test_count_of_the_full_networks_meets_the_formulas():
    assert count_flops(*unet_program(UNetConfig(), 64, 64, 77)) == unet_flops(64, 77, **UNET)
    encode, decode = vae_programs(VaeConfig(), 512, 512)
    assert count_flops(*encode) == vae_encode_flops(512, **VAE)
    assert count_flops(*decode) == vae_decode_flops(512, **VAE)


def test_count_of_other_shapes_meets_the_formula():
    config = UNetConfig(
        in_channels=9, channels=(32, 64, 64), layers=1, attention=(False, True, True), heads=(1, 2, 4),
        context_width=40, linear_projection=True,
    )  # fmt: skip
    counted = count_flops(*unet_program(config, 12, 20, 9))
    assert counted == unet_flops((12, 20), 9, **unet_sizes(config), in_channels=9)


@pytest.fixture
def attention_in_one_part(monkeypatch):
    # XLA counts the body of a loop once, however many parts of the queries pass through it
    monkeypatch.setattr("fmda.nn.attention.LONG", 10**6)


def test_lowered_unet_meets_the_formula(attention_in_one_part):
    formula = unet_flops((100, 92), 20, **unet_sizes(SMALL_UNET))
    assert compiled_flops(*unet_program(SMALL_UNET, 100, 92, 20)) == pytest.approx(formula, rel=0.02)


def test_lowered_autoencoder_meets_the_formulas(attention_in_one_part):
    encode, decode = vae_programs(SMALL_VAE, 200, 184)
    assert compiled_flops(*encode) == pytest.approx(vae_encode_flops((200, 184), **vae_sizes(SMALL_VAE)), rel=0.02)
    assert compiled_flops(*decode) == pytest.approx(vae_decode_flops((200, 184), **vae_sizes(SMALL_VAE)), rel=0.02)


def test_backward_of_the_unet_is_twice_its_forward():
    # gradients of latents, time and text, which no parameter asks for, fall away
    function, params, *arguments = unet_program(SMALL_UNET, 32, 32, 20)
    counted = count_flops(jax.grad(lambda p, *a: jnp.sum(function(p, *a) ** 2)), params, *arguments)
    formula = unet_flops(32, 20, **unet_sizes(SMALL_UNET))
    assert counted == pytest.approx(dreambooth_step_flops(unet=formula), rel=0.02)
