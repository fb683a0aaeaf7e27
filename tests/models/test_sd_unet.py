"""The UNet by hand and against recorded Flax releases (1e-5 relative); types and rematerialisation."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_diffusion import UNET, deviation, operand_types, quickly, unet

from fmda.data import data_root
from fmda.models import sd_unet
from fmda.models.sd_unet import UNetConfig, time_sinusoid
from fmda.weights.load import load_unet

FIXTURES = Path(__file__).parent.parent / "fixtures"
ONE_LEVEL = UNetConfig(channels=(8,), layers=1, attention=(False,), heads=(2,), context_width=6, groups=4)


def inputs(config, height=8, width=8, batch=2):
    rng = np.random.default_rng(3)
    latents = rng.normal(size=(batch, height, width, config.in_channels)).astype(np.float32)
    context = rng.normal(size=(batch, 5, config.context_width)).astype(np.float32)
    return latents, np.arange(1, batch + 1, dtype=np.int32) * 300, context


def predict(loaded, params, *given):
    return nnx.merge(loaded.graphdef, params)(*given)


def deviation_from_record(folder):
    loaded = load_unet(folder)
    with np.load(folder / "io.npz") as io:
        given = io["sample"].transpose(0, 2, 3, 1), io["timesteps"], io["encoder_hidden_states"]
        out = quickly(lambda params, *given: predict(loaded, params, *given), loaded.params, *given)
        return deviation(out, io["out"].transpose(0, 2, 3, 1))


@pytest.mark.parametrize("name", ["flax-hf-sd1", "flax-hf-sd2"])
def test_equals_recorded_flax_releases(name):
    assert deviation_from_record(FIXTURES / name / "unet") < 1e-5


@pytest.mark.slow
def test_equals_larger_records_beside_the_data_root():
    """Records of four levels, too large for the repository, are looked for in `fixtures/flax-hf` beside the data."""
    root = data_root()
    large = sorted((root.parent / "fixtures" / "flax-hf").glob("sd*/unet")) if root else []
    found = [deviation_from_record(folder) for folder in [FIXTURES / "flax-hf-sd1" / "unet", *large]]
    assert len(found) == 1 + len(large) and max(found) < 1e-5


def test_flax_checkpoints_keep_their_own_arithmetic():
    sd1, sd2 = (load_unet(FIXTURES / name / "unet").config for name in ("flax-hf-sd1", "flax-hf-sd2"))
    assert (sd1.gate, sd1.transformer_eps, sd1.linear_projection, sd1.heads) == ("gelu_tanh", 1e-5, False, (4, 4))
    assert (sd2.linear_projection, sd2.heads, sd2.attention) == (True, (2, 4, 8), (True, True, False))


def test_time_sinusoid_by_hand():
    found = time_sinusoid(jnp.array([0, 1, 500]), 4)
    expected = [[1, 1, 0, 0], *([np.cos(t), np.cos(t / 100), np.sin(t), np.sin(t / 100)] for t in (1, 500))]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert found.dtype == jnp.float32


def test_sides_may_differ_and_half_as_many_heads_change_no_shape():
    loaded = unet()
    out = jax.eval_shape(loaded, *inputs(UNET, 6, 14))
    assert out.shape == (2, 6, 14, 4) and out.dtype == jnp.float32
    assert UNET.factor == 2 and UNetConfig().factor == 8


@pytest.mark.slow
def test_rematerialised_blocks_give_the_same_values_and_gradients():
    given = inputs(ONE_LEVEL)
    found = []
    for remat in ("none", "dots", "blocks"):
        loaded = unet(ONE_LEVEL, remat=remat)

        def loss(params, latents, loaded=loaded):
            out = predict(loaded, params, latents, *given[1:])
            return jnp.sum(out**2), out

        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)).trace(loaded.params, given[0])
        again = [e for e in program.jaxpr.eqns if e.primitive.name in ("checkpoint", "remat2")]
        assert len(again) == (0 if remat == "none" else 6)
        compiled = program.lower().compile(compiler_options={"xla_backend_optimization_level": 0})
        found.append(compiled(loaded.params, given[0]))
    (value, out), grads = found[0]
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
    for (value_again, out_again), grads_again in found[1:]:
        assert deviation(out_again, out) < 2e-6 and float(value_again) == pytest.approx(float(value), rel=2e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * scale), grads, grads_again)


@pytest.mark.parametrize(("dtype", "expected"), [(jnp.float32, "float32"), (jnp.bfloat16, "bfloat16")])
def test_compute_type_reaches_every_product_and_the_output_is_float32(dtype, expected, monkeypatch):
    loaded, kept = unet(dtype=dtype), []

    def keep(remat, block, x, other):
        kept.append(block(x, other))
        return kept[-1]

    monkeypatch.setattr(sd_unet, "_run", keep)
    graph = jax.make_jaxpr(lambda *given: predict(loaded, *given))(loaded.params, *inputs(UNET))
    assert operand_types(graph.jaxpr) == {expected}
    # ResBlocks and transformers: 2 + 1 down, 3 in the middle, 2 + 4 up
    assert [str(x.dtype) for x in kept] == [expected] * 12
    assert [str(x.dtype) for x in graph.out_avals] == ["float32"]
