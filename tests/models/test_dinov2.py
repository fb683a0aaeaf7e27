"""DINOv2 and its heads: files in both directions, keys, sizes of images, a frozen encoder, bad input."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from small_diffusion import drawn, same

import fmda
from fmda.errors import UserError
from fmda.methods.dense import Encoder
from fmda.models.dinov2 import DINOV2, Dinov2Config
from fmda.models.dinov2_segmenter import Dinov2SegmenterConfig
from fmda.models.module import assembled, separated
from fmda.weights.check import verify
from fmda.weights.checkpoint import network_graph
from fmda.weights.load import load_dinov2
from fmda.weights.network import save

SMALL = Dinov2Config(28, 7, 16, 4, 2, registers=2, gated=True, maps=(1, 2, 3, 4))
NETWORKS = {
    "linear": Dinov2SegmenterConfig(replace(SMALL, registers=0, maps=(4,)), "linear", classes=5),
    "daformer": Dinov2SegmenterConfig(SMALL, "daformer", 8, classes=5),
}


def test_four_maps_lie_at_quarters_of_the_depth():
    assert [config.maps for config in list(DINOV2.values())[:4]] == [
        (3, 6, 9, 12), (3, 6, 9, 12), (6, 12, 18, 24), (10, 20, 30, 40)
    ]  # fmt: skip


@pytest.mark.parametrize("head", NETWORKS)
def test_what_was_saved_is_loaded_and_segments(head, tmp_path):
    config = NETWORKS[head]
    params = drawn(network_graph("dinov2_segmenter", config)[1])
    folder = save("dinov2_segmenter", tmp_path / "net", config, params)
    seg = fmda.load_segmentation(folder)
    assert seg.config == config and same(seg.params, params) and verify(folder).ok
    logits = jax.eval_shape(seg, jax.ShapeDtypeStruct((2, 64, 128, 3), np.float32))
    assert (logits.shape, logits.dtype) == ((2, 10, 19, 5), np.float32)
    encoder = save("dinov2", tmp_path / "encoder", config.encoder, params["encoder"])
    loaded = load_dinov2(encoder)
    assert loaded.config == config.encoder and same(loaded.params, params["encoder"])
    with pytest.raises(UserError, match="holds a network of family 'dinov2', which does not segment"):
        fmda.load_segmentation(encoder)


def test_an_encoder_is_frozen_under_a_head(tmp_path):
    folder = save("dinov2", tmp_path, SMALL, drawn(network_graph("dinov2", SMALL)[1]))
    encoder = Encoder(str(folder))
    pixels = np.random.default_rng(0).integers(0, 256, (1, 20, 28, 3)).astype(np.uint8)
    features = encoder.features(encoder.params, pixels)
    assert encoder.width == 16 and features.shape == (1, 3, 4, 16)
    # patches of the last map are normalised
    drawn_norm = encoder.params["norm_post"]
    plain = (np.asarray(features) - np.asarray(drawn_norm["bias"])) / np.asarray(drawn_norm["scale"])
    np.testing.assert_allclose(plain.mean(-1), 0, atol=1e-5)


def test_keys_alone_decide_what_is_dropped():
    config = replace(NETWORKS["daformer"], encoder=replace(SMALL, drop_path=0.9))
    graphdef, shapes = network_graph("dinov2_segmenter", config)
    params, statistics = separated(graphdef, drawn(shapes))
    x = jax.random.normal(jax.random.key(1), (2, 28, 28, 3))
    run = jax.jit(lambda key: assembled(graphdef, params, statistics)(x, key))
    a, b, c, still = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1)), run(None)
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c) and not np.allclose(a, still)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"maps": [3, 2]}, r"encoder.maps is \[3, 2\], not ascending numbers of blocks up to 4"),
        ({"maps": [5]}, "encoder.maps is .*, not ascending numbers of blocks up to 4"),
        ({"num_attention_heads": 3}, "encoder.num_attention_heads 3 does not divide hidden_size, 16"),
        ({"use_mask_token": False}, "encoder.use_mask_token is False, not True, which alone can be built"),
        ({"model_type": "vit"}, "encoder.model_type is 'vit', not a known word"),
        ({"num_register_tokens": 3}, r"embeddings.register_tokens is \[1, 2, 16\] but should be \[1, 3, 16\]"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_one_line(change, line, tmp_path):
    config = NETWORKS["daformer"]
    folder = save("dinov2_segmenter", tmp_path, config, drawn(network_graph("dinov2_segmenter", config)[1]))
    path = folder / "config.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"encoder": value["encoder"] | change}))
    with pytest.raises(UserError, match=line):
        fmda.load_segmentation(folder)
