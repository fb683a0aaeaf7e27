"""SegFormer against transformers' with the same weights: 1e-5 relative after each block, 1e-4 end to end."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from torch_shaken import shaken

import fmda
from fmda.models import segformer
from fmda.models.mit import MIT
from fmda.models.module import parameter_count
from fmda.models.segformer import SegFormer, SegFormerConfig
from fmda.weights.checkpoint import network_graph
from fmda.weights.load import load_mit
from fmda.weights.network import save

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def peer():
    """Returns transformers' network whose first norms leave small numbers, so that epsilons matter."""
    import torch
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 1, 1], num_attention_heads=[1, 2, 3, 4], decoder_hidden_size=12,
        num_labels=5, layer_norm_eps=1e-5,
    )  # fmt: skip
    model = shaken(SegformerForSemanticSegmentation(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "patch_embeddings.layer_norm" in name:
                parameter.mul_(0.01)
    return model


@pytest.fixture(scope="module")
def folder(peer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("segformer")
    peer.save_pretrained(folder)
    return folder


def outputs(model, pixels):
    """Returns ({block: map}, stage maps, logits) of transformers' network."""
    import torch

    blocks = []
    hooks = [
        block.register_forward_hook(lambda _m, _i, out: blocks.append(out))
        for stage in model.segformer.stages
        for block in stage.blocks
    ]
    with torch.no_grad():
        out = model(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return blocks, out.hidden_states, out.logits


def worst(net, params, pixels, theirs):
    """Returns the largest relative deviations (of blocks and stage maps, of logits)."""
    from torch_clip import deviation

    blocks, maps, logits = theirs

    @jax.jit
    def run(params):
        module = nnx.merge(net, params)
        inner, x = [], pixels
        for level in module.encoder.levels:
            x = level.patch(x)
            for block in level.blocks:
                x = block(x)
                inner.append(x.reshape(len(x), -1, x.shape[-1]))
            x = level.norm(x)
        return inner, module.encoder.stages(pixels), module(pixels)

    with jax.default_matmul_precision("highest"):
        ours = run(params)
    pairs = [*zip(ours[0], blocks, strict=True), *zip(ours[1], maps, strict=True)]
    return max(deviation(*pair) for pair in pairs), deviation(ours[2], logits)


def test_equals_transformers_segformer(peer, folder):
    pixels = np.random.default_rng(0).normal(size=(2, 64, 96, 3)).astype(np.float32)
    theirs, seg = outputs(peer, pixels), fmda.load_segmentation(folder)
    layers, logits = worst(seg.graphdef, seg.params, pixels, theirs)
    assert layers < 1e-5 and logits < 1e-5
    # faulty twins: the epsilon of the original code, the tanh form of GELU, maps joined first stage first
    other = network_graph("segformer", replace(seg.config, encoder=replace(seg.config.encoder, norm_eps=1e-6)))[0]
    assert worst(other, seg.params, pixels, theirs)[0] > 1e-3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fmda.models.mit.gelu", lambda x: jax.nn.gelu(x, approximate=True))
        assert worst(seg.graphdef, seg.params, pixels, theirs)[0] > 1e-5
    with pytest.MonkeyPatch.context() as patch:
        embed = segformer.LinearEmbedding.__call__
        patch.setattr(segformer.LinearEmbedding, "__call__", lambda self, maps: embed(self, maps)[::-1])
        assert worst(seg.graphdef, seg.params, pixels, theirs)[1] > 1e-2


def test_sides_that_reductions_do_not_divide_are_as_in_transformers(peer, folder):
    pixels = np.random.default_rng(0).normal(size=(1, 75, 99, 3)).astype(np.float32)
    seg = fmda.load_segmentation(folder)
    layers, logits = worst(seg.graphdef, seg.params, pixels, outputs(peer, pixels))
    assert layers < 1e-5 and logits < 1e-5


def test_encoders_of_networks_and_of_classifiers_are_the_same(peer, folder, tmp_path):
    import torch
    from torch_clip import deviation
    from transformers import SegformerForImageClassification

    classifier = SegformerForImageClassification(peer.config).eval()
    classifier.segformer.load_state_dict(peer.segformer.state_dict())
    classifier.save_pretrained(tmp_path / "classifier")
    peer.segformer.save_pretrained(tmp_path / "bare")
    pixels = np.random.default_rng(0).normal(size=(1, 32, 64, 3)).astype(np.float32)
    with torch.no_grad():
        maps = classifier(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True).hidden_states
    for source in (folder, tmp_path / "classifier", tmp_path / "bare"):
        with jax.default_matmul_precision("highest"):
            assert max(map(deviation, load_mit(source).stages(pixels), maps)) < 1e-5
    with pytest.raises(fmda.UserError, match="family 'mit', which does not segment"):
        fmda.load_segmentation(tmp_path / "classifier")


def test_transformers_opens_what_is_saved(peer, folder, tmp_path):
    from transformers import SegformerForSemanticSegmentation, SegformerModel

    seg = fmda.load_segmentation(folder)
    save("segformer", tmp_path / "net", seg.config, seg.params)
    save("mit", tmp_path / "encoder", seg.config.encoder, seg.params["encoder"])
    theirs = peer.state_dict()
    for name, array in SegformerForSemanticSegmentation.from_pretrained(tmp_path / "net").state_dict().items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(array.numpy(), theirs[name].numpy())
    for name, array in SegformerModel.from_pretrained(tmp_path / "encoder").state_dict().items():
        np.testing.assert_array_equal(array.numpy(), theirs[f"segformer.{name}"].numpy())
    assert isinstance(nnx.merge(seg.graphdef, seg.params), SegFormer)


@pytest.mark.parametrize("name", MIT)
def test_parameter_counts_are_those_of_transformers(name):
    import torch
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    encoder, width = MIT[name], 256 if name in ("mit-b0", "mit-b1") else 768
    config = SegformerConfig(
        hidden_sizes=encoder.widths, depths=encoder.depths, decoder_hidden_size=width, num_labels=19,
        num_attention_heads=encoder.heads, sr_ratios=encoder.reductions,
    )  # fmt: skip
    with torch.device("meta"):
        model = SegformerForSemanticSegmentation(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert parameter_count(lambda rngs: SegFormer(SegFormerConfig(encoder, width), rngs=rngs)) == count
    # published with the paper, in millions, for ADE20K's 150 classes
    published = {"mit-b0": 3.8, "mit-b1": 13.7, "mit-b2": 27.5, "mit-b3": 47.3, "mit-b4": 64.1, "mit-b5": 84.7}
    assert (count + 131 * (width + 1)) / 1e6 == pytest.approx(published[name], abs=0.1)
