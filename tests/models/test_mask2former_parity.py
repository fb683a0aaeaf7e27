"""Mask2Former against transformers' with the same weights: 1e-5 relative in every layer, 1e-4 end to end; its loss."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from small_diffusion import quickly
from torch_shaken import shaken

import fmda
from fmda.losses.masks import MaskLossConfig, Points, matching_costs, prediction_loss
from fmda.losses.matching import match
from fmda.models.mask2former import decoder
from fmda.models.module import abstract
from fmda.nn import deformable
from fmda.nn.deformable import DeformableAttention, centres
from fmda.weights.network import save

pytestmark = pytest.mark.parity
SIZES = ((2, 3), (4, 5), (7, 9))
PLACES = sum(h * w for h, w in SIZES)
CLASSES = 4


@pytest.fixture(scope="module")
def peer():
    """Returns transformers' network: one pixel layer, three decoder layers, one for each level."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 1, 1], layer_type="bottleneck",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=64, mask_feature_size=16, hidden_dim=64, encoder_feedforward_dim=24,
        encoder_layers=1, decoder_layers=4, num_attention_heads=2, dim_feedforward=40, num_queries=6,
        num_labels=CLASSES, train_num_points=40,
    )  # fmt: skip
    model = shaken(Mask2FormerForUniversalSegmentation(config))
    model.criterion.empty_weight[:] = 1
    model.criterion.empty_weight[-1] = 0.1
    return model


@pytest.fixture(scope="module")
def folder(peer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mask2former")
    peer.save_pretrained(folder)
    return folder


def outputs(model, pixels):
    """Returns ([maps, mask features, memories, queries before each layer], class logits, mask logits) of the peer."""
    import torch

    with torch.no_grad():
        given = torch.tensor(pixels.transpose(0, 3, 1, 2))
        out = model.model(given, output_hidden_states=True)
        classes = [model.class_predictor(x.transpose(0, 1)) for x in out.transformer_decoder_intermediate_states]
        queries = [x.transpose(0, 1) for x in out.transformer_decoder_hidden_states[:-1]]
    layers = [
        *out.encoder_hidden_states,
        out.pixel_decoder_last_hidden_state,
        *out.pixel_decoder_hidden_states,
        *queries,
    ]
    return layers, torch.stack(classes), torch.stack(list(out.masks_queries_logits))


def worst(net, params, pixels, theirs):
    """Returns the largest relative deviations (of layers, of all predictions)."""
    from torch_clip import deviation

    def run(params):
        module, queries = nnx.merge(net, params), []
        layer = decoder.DecoderLayer.__call__

        def recorded(self, x, *rest):
            queries.append(x)
            return layer(self, x, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoder.DecoderLayer, "__call__", recorded)
            maps = module.encoder.stages(pixels)
            features, memories = module.head.pixel(maps)
            predicted = module.head.decoder(features, memories)
        return [*maps, features, *memories, *queries], tuple(x.reshape(len(x), -1) for x in predicted)

    layers, predicted = quickly(run, params)
    ends = [x.flatten(1) for x in theirs[1:]]
    return tuple(
        max(deviation(*pair) for pair in zip(ours, peers, strict=True))
        for ours, peers in ((layers, theirs[0]), (predicted, ends))
    )


def test_equals_transformers_mask2former(peer, folder):
    pixels = np.random.default_rng(0).normal(size=(2, 64, 96, 3)).astype(np.float32)
    theirs, m2f = outputs(peer, pixels), fmda.load_mask2former(folder)
    layers, ends = worst(m2f.graphdef, m2f.params, pixels, theirs)
    assert layers < 1e-5 and ends < 1e-4
    # faulty twin: queries that attend outside their masks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "BLOCKED", 0.0)
        assert worst(m2f.graphdef, m2f.params, pixels, theirs)[1] > 1e-3


def test_gradients_of_all_parameters_equal_transformers(peer, folder, tmp_path):
    import torch

    pixels = np.random.default_rng(0).normal(size=(2, 64, 96, 3)).astype(np.float32)
    out = peer.model(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
    classes = [peer.class_predictor(x.transpose(0, 1)) for x in out.transformer_decoder_intermediate_states]
    predicted = (torch.stack(classes), torch.stack(list(out.masks_queries_logits)))
    sum(x.sin().sum() for x in predicted).backward()
    slopes = {name: one.grad.numpy() for name, one in peer.named_parameters() if one.grad is not None}
    m2f = fmda.load_mask2former(folder)

    def worst_slope(work):
        def loss(params):
            return sum(jnp.sin(x).sum() for x in nnx.merge(m2f.graphdef, params).predictions(pixels))

        # under the peer's names: what is written is linear in the parameters
        save("mask2former", work, m2f.config, quickly(jax.grad(loss), m2f.params))
        ours = load_file(work / "model.safetensors")
        least = 1e-3 * max(np.abs(slope).max() for slope in slopes.values())
        return max(np.abs(ours[name] - slope).max() / max(np.abs(slope).max(), least) for name, slope in slopes.items())

    assert worst_slope(tmp_path / "ours") < 1e-4
    # faulty twin: layers that teach the maps they attend to nothing
    with pytest.MonkeyPatch.context() as patch:
        layer, still = decoder.DecoderLayer.__call__, jax.lax.stop_gradient
        patch.setattr(decoder.DecoderLayer, "__call__", lambda self, *x: layer(self, *x[:3], still(x[3]), x[4]))
        assert worst_slope(tmp_path / "twin") > 1e-3


def test_transformers_opens_what_is_saved(peer, folder, tmp_path):
    from transformers import Mask2FormerForUniversalSegmentation

    m2f = fmda.load_mask2former(folder)
    save("mask2former", tmp_path, m2f.config, m2f.params)
    again, theirs = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path), peer.state_dict()
    assert again.state_dict().keys() == theirs.keys()
    for name, array in again.state_dict().items():
        if not name.endswith(("num_batches_tracked", "empty_weight")):
            np.testing.assert_array_equal(array.numpy(), theirs[name].numpy())


def test_deformable_attention_equals_transformers_module_with_gradients():
    import torch
    from torch_clip import deviation
    from transformers.models.mask2former import modeling_mask2former as peers

    theirs = shaken(peers.Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention(16, 2, 3, 4))
    graphdef, _ = abstract(lambda rngs: DeformableAttention(16, 2, 3, 4, rngs=rngs))
    names = {"offsets": "sampling_offsets", "weights": "attention_weights", "value": "value_proj", "out": "output_proj"}

    def tree(what):
        return {
            ours: {"kernel": what(layer.weight).numpy().T, "bias": what(layer.bias).numpy()}
            for ours, layer in ((ours, getattr(theirs, name)) for ours, name in names.items())
        }

    rng = np.random.default_rng(1)
    tokens, position = (rng.normal(size=(2, PLACES, 16)).astype(np.float32) for _ in range(2))
    given = torch.tensor(tokens, requires_grad=True)
    places = torch.tensor(centres(SIZES))[None, :, None].expand(2, PLACES, 3, 2)
    expected, _ = theirs(
        given, encoder_hidden_states=given, position_embeddings=torch.tensor(position), reference_points=places,
        spatial_shapes_list=list(SIZES),
    )  # fmt: skip
    expected.sin().sum().backward()

    def run(params, tokens):
        def loss(params, tokens):
            out = nnx.merge(graphdef, params)(tokens + position, tokens, SIZES)
            return jnp.sin(out).sum(), out

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, tokens)

    params = tree(lambda array: array.detach())
    (_, out), (slopes, to_tokens) = quickly(run, params, tokens)
    assert deviation(out, expected) < 1e-5 and deviation(to_tokens, given.grad) < 1e-4
    peer_slopes = tree(lambda array: array.grad)
    for name, layer in slopes.items():
        for leaf, slope in layer.items():
            assert deviation(slope, peer_slopes[name][leaf]) < 1e-4, (name, leaf)
    # faulty twin: places that are off by a fiftieth
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deformable, "centres", lambda sizes: centres(sizes) * 0.98)
        assert deviation(quickly(lambda *given: run(*given), params, tokens)[0][1], expected) > 1e-3


def test_loss_and_matching_equal_transformers_at_the_same_points(peer):
    import torch
    from torch_clip import deviation

    rng = np.random.default_rng(3)
    classes, masks = rng.normal(size=(2, 6, CLASSES + 1)), 3 * rng.normal(size=(2, 6, 8, 12))
    classes, masks = classes.astype(np.float32), masks.astype(np.float32)
    labels = rng.choice([0, 2, 3, 255], size=(2, 32, 48))
    labels[1] = np.where(labels[1] < 3, 1, 255)
    config = MaskLossConfig(points=40, ignore="negative")
    shape = (2, CLASSES, config.candidates, 2)
    shared, candidates = (rng.uniform(size=size).astype(np.float32) for size in ((2, 40, 2), shape))
    fresh = rng.uniform(size=(2, CLASSES, 10, 2)).astype(np.float32)
    present = np.array([[1, 0, 1, 1], [0, 1, 0, 0]], bool)

    # our matching, then our terms and the gradient of their weighted sum
    costs = quickly(lambda c, m: matching_costs(c, m, labels, shared, config), classes, masks)
    owners, broken = match(costs, present)
    assert broken == 0

    def run(config):
        def loss(classes, masks):
            terms = prediction_loss(classes, masks, labels, owners, present, Points(candidates, fresh), config)
            return 2 * terms[0] + 5 * terms[1] + 5 * terms[2], terms

        return quickly(jax.value_and_grad(loss, (0, 1), has_aux=True), classes, masks)

    (_, terms), slopes = run(config)

    # theirs draws one set per image for the matching, then candidates and fresh points of all pairs by query
    pairs = [sorted((int(owners[i, k]), k) for k in range(CLASSES) if present[i, k]) for i in range(2)]
    order = [(i, k) for i in range(2) for _, k in pairs[i]]
    draws = [shared[:1], shared[1:], *(np.stack([x[pair] for pair in order]) for x in (candidates, fresh))]
    indices = []
    given = [torch.tensor(x, requires_grad=True) for x in (masks, classes)]
    kinds = [torch.tensor(np.flatnonzero(row)) for row in present]
    targets = [torch.tensor(labels[i])[None].eq(kinds[i][:, None, None]).float() for i in range(2)]
    matcher = peer.criterion.matcher.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, **__: torch.tensor(draws.pop(0)))
        patch.setattr(peer.criterion.matcher, "forward", lambda *a: indices.append(matcher(*a)) or indices[0])
        theirs = peer.criterion(*given, targets, kinds)
    assert not draws
    for i, (queries, columns) in enumerate(indices[0]):
        assert [(int(q), int(kinds[i][c])) for q, c in zip(queries, columns, strict=True)] == pairs[i]
    (2 * theirs["loss_cross_entropy"] + 5 * theirs["loss_mask"] + 5 * theirs["loss_dice"]).backward()
    for ours, name in zip(terms, ("loss_cross_entropy", "loss_mask", "loss_dice"), strict=True):
        assert abs(float(ours) / theirs[name].item() - 1) < 1e-5, name
    assert deviation(slopes[1].reshape(12, -1), given[0].grad.flatten(0, 1).flatten(1)) < 1e-5
    assert deviation(slopes[0], given[1].grad) < 1e-5
    # faulty twin: ignored pixels left out where the peer counts them
    (_, other), _ = run(replace(config, ignore="excluded"))
    assert abs(float(other[1]) / theirs["loss_mask"].item() - 1) > 1e-2
