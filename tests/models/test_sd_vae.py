"""The autoencoder against a recorded Flax release (1e-5 relative), its limits and types."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_diffusion import VAE, deviation, operand_types, quickly, vae

from fmda import trees
from fmda.data import data_root
from fmda.models.sd_vae import VaeConfig
from fmda.weights.checkpoint import network_graph
from fmda.weights.load import load_text_encoder, load_vae

FIXTURES = Path(__file__).parent.parent / "fixtures"


def deviations_from_record(folder):
    """[mean, logvar, decoded]."""
    loaded = load_vae(folder)

    def both(params, image, latents):
        net = nnx.merge(loaded.graphdef, params)
        return *net.encode(image), net.decode(latents)

    with np.load(folder / "io.npz") as io:
        given = (io[name].transpose(0, 2, 3, 1) for name in ("image", "latents"))
        found = quickly(both, loaded.params, *given)
        recorded = io["mean"], io["logvar"], io["decoded"].transpose(0, 2, 3, 1)
        return [deviation(*pair) for pair in zip(found, recorded, strict=True)]


def test_equals_a_recorded_flax_release():
    assert max(deviations_from_record(FIXTURES / "flax-hf-sd1" / "vae")) < 1e-5


@pytest.mark.slow
def test_equals_a_larger_record_beside_the_data_root():
    root = data_root()
    large = sorted((root.parent / "fixtures" / "flax-hf").glob("sd*/vae")) if root else []
    found = [deviations_from_record(folder) for folder in [FIXTURES / "flax-hf-sd1" / "vae", *large]]
    assert len(found) == 1 + len(large) and max(map(max, found)) < 1e-5


def test_the_text_encoder_equals_a_recorded_flax_release():
    folder = FIXTURES / "flax-hf-sd1" / "text_encoder"
    with np.load(folder / "io.npz") as io, jax.default_matmul_precision("highest"):
        found = load_text_encoder(folder)(io["input_ids"])
        assert deviation(found, io["last_hidden_state"]) < 1e-5
    assert found.dtype == jnp.float32


def test_the_log_variance_is_kept_between_its_limits():
    loaded = vae()
    bias = np.zeros(8, np.float32)
    bias[4:] = 100, -100, 0, 0
    params = trees.unflatten({**trees.flatten(loaded.params), "quant/bias": bias})
    images = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    _, logvar = quickly(lambda params, x: nnx.merge(loaded.graphdef, params).encode(x), params, images)
    assert (logvar[..., 0] == 20).all() and (logvar[..., 1] == -30).all()
    assert logvar.shape == (1, 8, 8, 4) and (np.abs(logvar[..., 2:]) < 20).all()


def test_a_latent_stands_for_a_square_of_pixels():
    assert (VaeConfig().factor, VAE.factor) == (8, 2)
    mean, logvar = jax.eval_shape(vae().encode, jnp.zeros((1, 12, 20, 3)))
    assert mean.shape == logvar.shape == (1, 6, 10, 4)
    assert jax.eval_shape(vae().decode, mean).shape == (1, 12, 20, 3)


def test_compute_type_reaches_every_product_and_the_output_is_float32():
    graphdef, _ = network_graph("vae", VAE, jnp.bfloat16)

    def both(params, images):
        net = nnx.merge(graphdef, params)
        mean, _ = net.encode(images)
        return mean, net.decode(mean)

    graph = jax.make_jaxpr(both)(vae().params, jnp.zeros((1, 8, 8, 3)))
    assert operand_types(graph.jaxpr) == {"bfloat16"}
    assert [str(x.dtype) for x in graph.out_avals] == ["float32", "float32"]
