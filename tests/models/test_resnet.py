"""ResNet and DeepLabV2: parameter counts, files in both directions, faults in one line."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_diffusion import drawn, same

import fmda
from fmda.errors import UserError
from fmda.models.deeplab_v2 import DeepLabV2, DeepLabV2Config
from fmda.models.module import parameter_count
from fmda.models.resnet import ResNetEncoderConfig
from fmda.weights.check import verify
from fmda.weights.checkpoint import network_graph
from fmda.weights.load import load_resnet
from fmda.weights.network import save

ENCODER = ResNetEncoderConfig((1, 1, 2, 1), 4, deep_stem=True)
SMALL = DeepLabV2Config(ENCODER, strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), rates=(2, 3, 5), classes=6)


def test_deeplab_has_the_size_of_its_parts():
    # V1c without its classes, and two 3x3 convolutions from 2048 to 19
    count = 44_568_392 - (2048 * 1000 + 1000) + 2 * (9 * 2048 * 19 + 19)
    assert parameter_count(lambda rngs: DeepLabV2(DeepLabV2Config(), rngs=rngs)) == count == 43_219_846


@pytest.fixture
def folder(tmp_path):
    return save("deeplab_v2", tmp_path / "net", SMALL, drawn(network_graph("deeplab_v2", SMALL)[1]))


def test_what_was_saved_is_loaded_and_segments(folder):
    seg = fmda.load_segmentation(folder)
    assert seg.config == SMALL and same(seg.params, drawn(network_graph("deeplab_v2", SMALL)[1]))
    assert verify(folder).ok and verify(folder).layout == "DeepLabV2"
    logits = jax.eval_shape(seg, jax.ShapeDtypeStruct((2, 64, 96, 3), np.float32))
    assert (logits.shape, logits.dtype) == ((2, 4, 6, 6), np.float32)
    with pytest.raises(UserError, match="image of 16x64 pixels is smaller than the 32 pixels of a ResNet's last str"):
        seg(np.zeros((1, 16, 64, 3), np.float32))


@pytest.mark.parametrize("deep", [False, True])
def test_a_resnet_comes_back_from_its_names_alone(deep, tmp_path):
    config = ResNetEncoderConfig((1, 1, 2, 1), 4, deep, 3)
    params = drawn(network_graph("resnet", config)[1])
    folder = save("resnet", tmp_path / "net", config, params)
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    loaded = load_resnet(folder)
    assert loaded.config == config and same(loaded.params, params) and verify(folder).ok
    assert ("stem.3.weight" if deep else "conv1.weight") in load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"rates": [6, 12]}, r"config.json: rates is \[6, 12\], not 3 whole numbers above 0, one for each branch"),
        ({"dilations": [1, 2]}, r"dilations is \[1, 2\], not a list of 4 whole numbers above 0"),
        ({"num_classes": 7}, "num_classes is 7, not 6, which alone can be built"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_line(change, line, folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=line):
        fmda.load_segmentation(folder)


def test_other_networks_are_one_line(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    head = {name: array for name, array in weights.items() if name.startswith("decode_head")}
    save_file(head, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"no ResNet of bottlenecks \(backbone.layer1.0.conv3.weight and four stages"):
        fmda.load_segmentation(folder)
    save_file({"backbone.stem.0.weight": weights["backbone.stem.0.weight"]}, folder / "model.safetensors")
    with pytest.raises(UserError, match="no DeepLabV2's names"):
        fmda.load_segmentation(folder)
    save_file({"layer1.0.conv1.weight": np.zeros((4, 4, 3, 3), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no ResNet of bottlenecks .* take the weights of a ResNet-50 or deeper"):
        load_resnet(tmp_path)
