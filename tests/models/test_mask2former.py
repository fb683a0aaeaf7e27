"""Mask2Former: parameter counts, class scores in blocks of rows, text classes and queries, the released layout."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_diffusion import drawn, quickly, same

import fmda
from fmda.errors import UserError
from fmda.models.clip import Clip, ClipConfig, ConvNextConfig, ResNetConfig, TextConfig
from fmda.models.mask2former import HeadConfig, Mask2FormerConfig, Mask2FormerHead, semantic_scores
from fmda.models.mask2former.text import geometric_ensemble, mask_pooled
from fmda.models.module import abstract, parameter_count
from fmda.models.resnet import ResNetEncoderConfig
from fmda.nn.position import sine_positions
from fmda.nn.resize import resize
from fmda.perf import compiled_memory
from fmda.weights import clip
from fmda.weights.check import verify
from fmda.weights.checkpoint import network_graph
from fmda.weights.files import read_arrays, write_safetensors
from fmda.weights.network import save

TINY = HeadConfig(
    classes=3, width=32, mask_width=8, heads=8, pixel_layers=1, pixel_hidden=16, layers=2, hidden=16, queries=5,
)  # fmt: skip
TOWERS = {
    "ConvNeXt": ConvNextConfig(depths=(1, 1, 2, 1), channels=(8, 8, 16, 16), head_width=12),
    "ResNet": ResNetConfig(image_size=64, layers=(1, 2, 1, 1), width=8, heads=4),
}
ORIGINAL = (
    "pixel_decoder.input_proj.0.0.weight",
    "pixel_decoder.transformer.level_embed",
    "pixel_decoder.transformer.encoder.layers.0.self_attn.sampling_offsets.weight",
    "pixel_decoder.adapter_1.weight",
    "pixel_decoder.layer_1.norm.bias",
    "pixel_decoder.mask_features.bias",
    "predictor.transformer_cross_attention_layers.1.multihead_attn.in_proj_weight",
    "predictor.transformer_self_attention_layers.0.self_attn.out_proj.bias",
    "predictor.transformer_ffn_layers.0.linear2.weight",
    "predictor.decoder_norm.weight",
    "predictor.query_feat.weight",
    "predictor.query_embed.weight",
    "predictor.level_embed.weight",
    "predictor.class_embed.weight",
    "predictor.mask_embed.layers.2.bias",
)


@pytest.mark.parametrize(
    ("channels", "count"),
    [(ConvNextConfig().channels, 20_253_908), (ResNetConfig().channels, 20_499_668)],
    ids=["ConvNeXt-L", "RN50, RN101"],
)
def test_heads_have_the_published_number_of_parameters(channels, count):
    assert parameter_count(lambda rngs: Mask2FormerHead(HeadConfig(), channels, rngs=rngs)) == count
    # the text classifier's own, and its embedding of "no object"
    text = HeadConfig(text_classes=True)
    assert parameter_count(lambda rngs: Mask2FormerHead(text, channels, rngs=rngs)) == count + 390_125 + 768


def test_sine_positions_by_hand():
    codes = sine_positions((2, 1), 8)
    assert codes.shape == (2, 1, 8)
    # rows count as pi and 2 pi, the only column as 2 pi; the second pair of channels is a hundred times slower
    slow = [math.sin(math.pi / 100), math.cos(math.pi / 100)]
    np.testing.assert_allclose(codes[0, 0, :4], [0, -1, *slow], atol=1e-5)
    np.testing.assert_allclose(codes[0, 0, 4:], [0, 1, math.sin(math.pi / 50), math.cos(math.pi / 50)], atol=1e-5)


def test_scores_in_blocks_of_rows_are_the_whole_in_little_memory():
    rng = np.random.default_rng(0)
    classes, masks = rng.normal(size=(2, 5, 4)).astype(np.float32), rng.normal(size=(2, 5, 6, 7)).astype(np.float32)
    scores = jax.jit(lambda classes, masks: semantic_scores(classes, masks, (21, 30), rows=4))(classes, masks)
    large = 1 / (1 + np.exp(-np.asarray(resize(masks.transpose(0, 2, 3, 1), (21, 30)))))
    probs = np.exp(classes) / np.exp(classes).sum(-1, keepdims=True)
    np.testing.assert_allclose(scores, np.einsum("bhwq,bqk->bhwk", large, probs[..., :-1]), atol=1e-5)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 100, 20), (1, 100, 256, 512))]
    program = jax.jit(lambda *given: semantic_scores(*given, (1024, 2048))).lower(*shapes).compile()
    memory = compiled_memory(program)
    assert sum(memory.get(name, 0) for name in ("arguments", "outputs", "temporaries")) < 1.5e9


def test_features_under_masks_and_the_ensemble_by_hand():
    features = jnp.arange(8.0).reshape(1, 2, 2, 2)
    masks = jnp.array([[[[1, -1], [1, -1]], [[-1, -1], [-1, -1]]]])
    np.testing.assert_allclose(mask_pooled(features, masks), [[[2, 3], [0, 0]]], atol=1e-6)
    own, other = np.array([0.6, 0.4]), np.array([0.1, 0.9])
    logits = np.log([*(0.8 * own), 0.2])  # a fifth is "no object"
    mixed = np.exp(geometric_ensemble(logits, np.log(other), np.array([True, False])))
    expected = np.array([own[0] ** 0.6 * other[0] ** 0.4, own[1] ** 0.2 * other[1] ** 0.8])
    np.testing.assert_allclose(mixed, [*(0.8 * expected / expected.sum()), 0.2], rtol=1e-4)


def test_classes_and_queries_from_text():
    config = HeadConfig(**vars(TINY) | {"text_classes": True, "fixed": True, "text_width": 6})
    graphdef, shapes = abstract(lambda rngs: Mask2FormerHead(config, (4, 4, 4, 4), rngs=rngs))
    rng = np.random.default_rng(1)
    maps = [rng.normal(size=(1, 32 // 2**i, 32 // 2**i, 4)).astype(np.float32) for i in range(4)]
    text = rng.normal(size=(3, 2, 6)).astype(np.float32)
    swapped = np.stack([text, text[[1, 0, 2]][:, ::-1]])
    run = lambda params, texts: jax.lax.map(lambda text: nnx.merge(graphdef, params)(maps, text), texts)  # noqa: E731
    classes, masks = quickly(run, drawn(shapes), swapped)
    assert classes.shape == (2, 3, 1, 3, 4) and masks.shape == (2, 3, 1, 3, 32, 32)
    # query k and logit k follow the text of class k, whatever the order of its names; "no object" stays last
    np.testing.assert_allclose(classes[1], classes[0][:, :, [1, 0, 2]][..., [1, 0, 2, 3]], atol=1e-4)
    np.testing.assert_allclose(masks[1], masks[0][:, :, [1, 0, 2]], atol=1e-3)


def test_clip_classifies_what_is_under_the_masks():
    head = HeadConfig(**vars(TINY) | {"text_classes": True, "text_width": 6})
    text, seen = jax.ShapeDtypeStruct((3, 2, 6), jnp.float32), np.array([True, False, True])
    pixels = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)

    def shapes(tower):
        graphdef, params = network_graph("mask2former", Mask2FormerConfig(tower, head, embed_dim=6))
        run = lambda params, pixels, text: nnx.merge(graphdef, params).with_clip(pixels, text, seen)  # noqa: E731
        return [x.shape for x in jax.eval_shape(run, params, pixels, text)]

    assert shapes(TOWERS["ConvNeXt"]) == shapes(TOWERS["ResNet"]) == [(1, 5, 4), (1, 5, 16, 16)]
    with pytest.raises(UserError, match="the encoder is not CLIP's"):
        shapes(ResNetEncoderConfig())


@pytest.fixture(scope="module", params=TOWERS)
def saved(request, tmp_path_factory):
    """(configuration, parameters, folder) of a network in the released layout."""
    config = Mask2FormerConfig(TOWERS[request.param], TINY, embed_dim=6)
    params = drawn(network_graph("mask2former", config)[1])
    return config, params, save("mask2former", tmp_path_factory.mktemp("m2f"), config, params)


def test_released_checkpoints_need_no_configuration(saved, tmp_path):
    config, params, folder = saved
    (folder / "config.json").rename(tmp_path / "config.json")
    arrays = read_arrays(folder / "model.safetensors")
    assert {f"sem_seg_head.{name}" for name in ORIGINAL} <= arrays.keys()
    # beside the image tower they hold the text tower, constants, and an embedding that is not used
    whole = ClipConfig(config.embed_dim, config.encoder, TextConfig(9, 4, 8, 1, 2, 8))
    _, shapes = abstract(lambda rngs: Clip(whole, rngs=rngs))
    tower = clip.open_clip_table(whole).write(drawn(shapes))
    arrays |= {f"backbone.clip_model.{name}": array for name, array in tower.items() if "visual." not in name}
    arrays |= {"criterion.empty_weight": np.ones(4), "void_embedding.weight": np.ones((1, 6))}
    write_safetensors(folder / "model.safetensors", arrays)
    m2f = fmda.load_mask2former(folder)
    assert m2f.config == config and same(m2f.params, params)
    assert verify(folder).layout == "CLOUDS' Mask2Former"
    del arrays["sem_seg_head.pixel_decoder.mask_features.weight"]
    write_safetensors(folder / "model.safetensors", arrays)
    with pytest.raises(UserError, match="has no sem_seg_head.pixel_decoder.mask_features.weight"):
        fmda.load_mask2former(folder)
