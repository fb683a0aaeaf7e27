"""MobileSAM's image encoder against PyTorch with the same weights, its files in both directions, its size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_diffusion import drawn
from torch_shaken import shaken

import fmda
from fmda import trees
from fmda.models.module import parameter_count
from fmda.models.sam import SamConfig, TinyVitConfig, tiny_vit
from fmda.models.sam.network import SAM
from fmda.nn.activation import gelu
from fmda.weights.check import verify
from fmda.weights.checkpoint import network_graph
from fmda.weights.files import read_arrays, write_safetensors
from fmda.weights.network import save
from fmda.weights.sam_tables import mobile_sam

pytestmark = pytest.mark.parity
SMALL = SamConfig(TinyVitConfig(80, (8, 16, 12, 24), (1, 2, 1, 1), (2, 3, 4), (3, 5, 3), 16), 8, 1, 2, 32, 24)
"""Maps of 20, 10, 5 and 5 places: windows of 3 are filled up with zeros."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    import torch_clip
    import torch_tiny_vit

    folder = tmp_path_factory.mktemp("mobile-sam")
    encoder = shaken(torch_tiny_vit.TinyVit(SMALL.encoder, classes=7))
    flat = trees.flatten(drawn(network_graph("sam", SMALL)[1]))
    stored = mobile_sam(SMALL.encoder).write(trees.unflatten(flat))
    theirs = {f"image_encoder.{name}": array for name, array in torch_clip.arrays(encoder).items()}
    kept = {name: array for name, array in stored.items() if not name.startswith("image_encoder.")}
    write_safetensors(folder / "model.safetensors", theirs | kept)
    (folder / "config.json").write_text('{"model_type": "mobile_sam", "image_size": 80, "num_attention_heads": 2}')
    return encoder, fmda.load_sam(folder), folder


def worst(net, maps):
    """Returns the largest relative deviation of (maps, embedding)."""
    from torch_clip import deviation

    pixels = np.random.default_rng(0).normal(size=(2, 80, 80, 3)).astype(np.float32)

    @jax.jit
    def run(params):
        encoder = nnx.merge(net.graphdef, params).encoder
        x = [encoder.stem2(gelu(encoder.stem1(jnp.asarray(pixels))))]
        for stage in range(4):
            y = x[-1] if stage == 0 else encoder.steps[stage - 1](x[-1])
            for block in encoder.convs if stage == 0 else encoder.stages[stage - 1]:
                y = block(y)
            x.append(y)
        return [*x, encoder(pixels)]

    with jax.default_matmul_precision("highest"):
        ours = run(net.params)
    *inner, last = (deviation(*two) for two in zip(ours, maps, strict=True))
    return max(inner), last


def outputs(encoder):
    import torch

    pixels = np.random.default_rng(0).normal(size=(2, 80, 80, 3)).astype(np.float32)
    with torch.no_grad():
        return encoder(torch.tensor(pixels.transpose(0, 3, 1, 2)))


def test_equals_pytorch_and_a_faulty_twin_is_noticed(pair):
    encoder, net, _ = pair
    maps = outputs(encoder)
    inner, last = worst(net, maps)
    assert net.config == SMALL and inner < 1e-5 and last < 1e-5
    with pytest.MonkeyPatch.context() as patch:
        exchanged = tiny_vit.distances
        patch.setattr(tiny_vit, "distances", lambda side: exchanged(side) % side * side + exchanged(side) // side)
        assert worst(net, maps)[0] > 1e-3


def test_files_in_both_directions(pair, tmp_path):
    _, net, folder = pair
    save("sam", tmp_path, net.config, net.params)
    stored, again = (read_arrays(path / "model.safetensors") for path in (folder, tmp_path))
    classifier = {name for name in stored if "head." in name and name.startswith("image_encoder.")}
    counters = {name for name in stored if name.endswith("num_batches_tracked")}
    assert len(classifier) == 4 and again.keys() == stored.keys() - classifier - counters
    for name, array in again.items():
        np.testing.assert_array_equal(array, stored[name])
    report = verify(tmp_path)
    assert report.ok and report.layout == "MobileSAM" and report.fingerprint == net.fingerprint


def test_parameter_counts_are_those_of_pytorch():
    import torch
    import torch_tiny_vit

    config = SAM["mobile-sam"]
    with torch.device("meta"):
        encoder = torch_tiny_vit.TinyVit(config.encoder)
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert parameter_count(lambda rngs: tiny_vit.TinyVit(config.encoder, rngs=rngs)) == count == 5_743_892
