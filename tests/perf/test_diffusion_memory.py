import contextlib
import io
import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals

from fmda.models.clip import TextConfig
from fmda.models.clip.text import TextTransformer
from fmda.models.sd_unet import UNet, UNetConfig
from fmda.models.sd_vae import Vae, VaeConfig
from fmda.nn.attention import LONG
from fmda.perf.diffusion_memory import (
    PART,
    generation_memory,
    personalisation_memory,
    text_training_bytes,
    unet_sampling_bytes,
    unet_training_bytes,
    vae_decode_bytes,
    vae_encode_bytes,
)
from fmda.perf.memory import compiled_memory

GB = 1e9
UNET = {"channels": (320, 640, 1280, 1280), "layers": 2, "attention": (True, True, True, False), "heads": (8, 8, 8, 8)}
VAE = (128, 256, 512, 512)
TEXT = {"width": 768, "layers": 12, "mlp_width": 3072, "heads": 12}
TRAINABLE, FROZEN, UNET_ALONE = 859_520_964 + 123_060_480, 83_653_863, 859_520_964
SMALL = UNetConfig(channels=(64, 128), layers=1, attention=(True, False), heads=(2, 4), context_width=48)
BYTES = {"f32": 4, "bf16": 2, "bool": 1, "i32": 4, "u32": 4}


def sizes(config):
    return {name: getattr(config, name) for name in ("channels", "layers", "attention", "heads")}


def abstract(build):
    """Returns (graph, parameter shapes) without making any array."""
    graph, state = nnx.split(nnx.eval_shape(build))
    return graph, nnx.to_pure_dict(state)


def unet(batch, side, dtype=jnp.float32, remat="none"):
    """Returns (function, parameter shapes, argument shapes) of the small network."""
    graph, params = abstract(lambda: UNet(SMALL, dtype=dtype, remat=remat, rngs=nnx.Rngs(0)))
    shapes = [(batch, side, side, 4), (batch,), (batch, 9, 48)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return lambda p, x, t, c: nnx.merge(graph, p)(x, t, c).sum(), params, *arguments


def kept_maps(function, params, *arguments):
    """Returns the bytes of what reverse-mode keeps of the traced program, parameters and their copies left out."""
    weights = {tuple(leaf.shape) for leaf in jax.tree.leaves(params)}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        print_saved_residuals(function, params, *arguments)
    total = 0
    for kind, shape in re.findall(r"^(\w+)\[([\d,]*)\] (?!from the argument)", printed.getvalue(), re.M):
        shape = tuple(int(number) for number in shape.split(",") if number)
        total += 0 if shape in weights else BYTES[kind] * math.prod(shape)
    return total


@pytest.mark.parametrize(("side", "dtype"), [(32, "float32"), (64, "bfloat16")])
def test_kept_maps_are_those_of_the_traced_unet(side, dtype):
    # at 32 all attention is taken whole, at 64 the first level's goes in parts
    formula = unet_training_bytes(side, 9, **sizes(SMALL), dtype=dtype)
    working = 8 * 2 * 1024 * side**2 + 16 * 64 * side**2 * jnp.dtype(dtype).itemsize
    assert formula - working == pytest.approx(kept_maps(*unet(1, side, dtype)), rel=0.02)
    size = jnp.dtype(dtype).itemsize
    first = side**2 * (64 * (44 + 35 * size) + 2 * (9 + (side**2 if side == 32 else 0)) * (4 + size))
    middle = side**2 // 4 * (128 * (44 + 35 * size) + 4 * (9 + side**2 // 4) * (4 + size))
    largest = max(first, middle)
    for remat in ("dots", "blocks"):
        again = unet_training_bytes(side, 9, **sizes(SMALL), dtype=dtype, remat=remat)
        assert again - working - largest == pytest.approx(kept_maps(*unet(1, side, dtype, remat)), rel=0.02)


def test_kept_maps_are_those_of_the_traced_text_encoder():
    config = TextConfig(vocab_size=100, context=40, width=64, layers=3, heads=4, mlp_width=224)
    graph, params = abstract(lambda: TextTransformer(config, None, rngs=nnx.Rngs(0)))
    ids = jax.ShapeDtypeStruct((1, 40), jnp.int32)
    kept = kept_maps(lambda p, i: nnx.merge(graph, p).hidden(i).sum(), params, ids)
    assert text_training_bytes(40, width=64, layers=3, mlp_width=224, heads=4) == pytest.approx(kept, rel=0.05)


@pytest.mark.slow
def test_compiled_backward_grows_by_the_formula():
    one, five = (compiled_memory(jax.jit(jax.grad(f)).lower(*a).compile()) for f, *a in (unet(1, 64), unet(5, 64)))
    slope = (five["temporaries"] - one["temporaries"]) / 4
    assert slope == pytest.approx(unet_training_bytes(64, 9, **sizes(SMALL)), rel=0.25)


def test_attention_in_parts_is_that_of_the_network():
    assert PART == LONG
    whole, parts = (unet_training_bytes(64, **UNET, part=part) for part in (None, PART))
    # five layers keep weights and their copy, and the largest works on all rows at once
    assert whole - parts == 5 * 2 * 8 * 4096**2 * 4 + 2 * 8 * (4096 - 1024) * 4096 * 4
    assert unet_training_bytes(32, **UNET) == unet_training_bytes(32, **UNET, part=None)
    assert unet_training_bytes(60, **UNET) < unet_training_bytes(60, **UNET, part=None)


def test_personalisation_of_stable_diffusion_1():
    text, encoding = text_training_bytes(**TEXT), vae_encode_bytes(512, channels=VAE)

    def total(dtype="float32", **options):
        activations = unet_training_bytes(64, **UNET, dtype=dtype, **options) + text
        return personalisation_memory(TRAINABLE, FROZEN, activations=activations, encoding=encoding, dtype=dtype)

    rows = total()
    states = rows["parameters"] + rows["gradients"] + rows["optimizer moments"]
    assert states / GB == pytest.approx(15.7, abs=0.05)
    assert rows["frozen parameters"] / GB == pytest.approx(0.33, abs=0.01)
    assert 25 < sum(total(part=None).values()) / GB < 28
    assert sum(rows.values()) / GB == pytest.approx(20, rel=0.02)
    assert sum(total(remat="blocks").values()) / GB == pytest.approx(17, rel=0.02)
    assert total("bfloat16")["weights as computed with"] == 2 * TRAINABLE


def test_personalisation_of_the_unet_alone():
    rows = personalisation_memory(UNET_ALONE, FROZEN, activations=unet_training_bytes(64, **UNET))
    assert (sum(rows.values()) - rows["activations"] - rows["frozen parameters"]) / GB == pytest.approx(13.75, abs=0.01)
    # a public report of PyTorch with memory-efficient attention: 17.7 GB
    assert sum(rows.values()) / GB == pytest.approx(17.7, rel=0.03)


def test_shards_divide_what_is_stored_and_nothing_else():
    options = {"activations": 1000, "dtype": "bfloat16", "ema": True, "images": 3, "accumulate": 2}
    one, eight = (personalisation_memory(800, 80, **options, shards=shards) for shards in (1, 8))
    assert one == {
        "parameters": 3200,
        "gradients": 6400,
        "optimizer moments": 6400,
        "average of parameters": 3200,
        "frozen parameters": 320,
        "weights as computed with": 1600,
        "activations": 3000,
    }
    same = ("weights as computed with", "activations")
    assert eight == {name: value if name in same else value // 8 for name, value in one.items()}


def test_encoder_counts_only_where_it_needs_more_than_the_unet():
    assert personalisation_memory(8, 0, activations=10, encoding=4, images=2)["activations"] == 20
    assert personalisation_memory(8, 0, activations=10, encoding=40, images=2)["activations"] == 80


def test_v5e_slice_holds_what_one_chip_does_not():
    activations = unet_training_bytes(64, **UNET, dtype="bfloat16", remat="blocks") + text_training_bytes(**TEXT)
    one, eight = (
        sum(personalisation_memory(TRAINABLE, FROZEN, activations=activations, dtype="bfloat16", shards=n).values())
        for n in (1, 8)
    )
    assert one > 16 * 2**30 > eight


def test_decoder_sets_the_memory_of_a_batch():
    networks = TRAINABLE + FROZEN
    unet_bytes, decode = unet_sampling_bytes(64, **UNET), vae_decode_bytes(512, channels=VAE)
    assert decode == int(3.5 * 256 * 512**2 * 4)
    rows = generation_memory(networks, unet=unet_bytes, decode=decode, images=16)
    assert rows == {"parameters": 4 * networks, "activations": 16 * decode}
    cut = generation_memory(networks, unet=unet_bytes, decode=decode, dtype="bfloat16", shards=4)
    assert cut["parameters"] == -(-2 * networks // 4)
    assert cut["weights as computed with"] == 2 * networks
    assert generation_memory(networks, unet=decode, decode=decode)["activations"] == 2 * decode
    alone = generation_memory(networks, unet=unet_bytes, decode=0, images=16, guidance=False)
    assert alone["activations"] == 16 * unet_bytes


@pytest.mark.slow
def test_compiled_decoder_and_sampler_meet_the_formulas():
    config = VaeConfig(channels=(32, 64), layers=1)
    graph, params = abstract(lambda: Vae(config, rngs=nnx.Rngs(0)))
    latents = jax.ShapeDtypeStruct((1, 48, 48, 4), jnp.float32)
    decoder = jax.jit(lambda p, z: nnx.merge(graph, p).decode(z)).lower(params, latents).compile()
    function, *arguments = unet(1, 64)
    sampler = jax.jit(function).lower(*arguments).compile()
    measured = [compiled_memory(program)["temporaries"] for program in (decoder, sampler)]
    formulas = [vae_decode_bytes(96, channels=(32, 64)), unet_sampling_bytes(64, **sizes(SMALL))]
    assert measured == pytest.approx(formulas, rel=0.25)
