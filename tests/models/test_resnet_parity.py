"""ResNet and DeepLabV2 against plain PyTorch and transformers: 1e-5 relative a stage, 1e-4 end to end."""

import copy
import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from torch_shaken import shaken

import fmda
from fmda.models.deeplab_v2 import DeepLabV2, DeepLabV2Config
from fmda.models.module import abstract, assembled, parameter_count, separated, statistics_of
from fmda.models.resnet import ResNetEncoderConfig
from fmda.weights.load import load_resnet

pytestmark = pytest.mark.parity
LAYERS, WIDTH = (2, 1, 2, 2), 8
PIXELS = np.random.default_rng(0).normal(size=(2, 64, 96, 3)).astype(np.float32)


def torch_pixels():
    import torch

    return torch.tensor(PIXELS.transpose(0, 3, 1, 2))


def saved(model, folder, **config):
    from torch_clip import arrays

    folder.mkdir()
    save_file(arrays(model), folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("stem", ["plain", "timm", "mmseg"])
def test_equals_torch_under_every_name(stem, tmp_path):
    from torch_clip import deviation
    from torch_resnet import ResNet

    model = shaken(ResNet(LAYERS, WIDTH, stem, classes=5))
    # timm's configuration names an architecture, OpenMMLab and torchvision have none
    ours = load_resnet(saved(model, tmp_path / "net", **({"architecture": "resnet50c"} if stem == "timm" else {})))
    assert ours.config == ResNetEncoderConfig(LAYERS, WIDTH, stem != "plain", 5)
    with jax.default_matmul_precision("highest"):
        maps, logits = ours.stages(PIXELS), ours(PIXELS)
    for mine, theirs in zip(maps, model.stages(torch_pixels()), strict=True):
        assert deviation(mine, theirs) < 1e-5
    assert deviation(logits, model(torch_pixels())) < 1e-5


def test_equals_transformers(tmp_path):
    from torch_clip import deviation
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=WIDTH,
        hidden_sizes=[32, 64, 128, 256],
        depths=list(LAYERS),
        layer_type="bottleneck",
        num_labels=5,
    )
    model = shaken(ResNetForImageClassification(config))
    model.save_pretrained(tmp_path)
    ours = load_resnet(tmp_path)
    assert ours.config == ResNetEncoderConfig(LAYERS, WIDTH, classes=5)
    theirs = model(torch_pixels(), output_hidden_states=True)
    for mine, hidden in zip(ours.stages(PIXELS), theirs.hidden_states[1:], strict=True):
        assert deviation(mine, hidden) < 1e-5
    assert deviation(ours(PIXELS), theirs.logits) < 1e-5


@pytest.fixture(scope="module", params=[("mmseg", (6, 12)), ("plain", (6, 12, 18, 24))], ids=["reduced", "whole"])
def pair(request, tmp_path_factory):
    import torch
    from torch_resnet import DeepLabV2

    stem, rates = request.param
    torch.manual_seed(0)
    model = shaken(DeepLabV2(LAYERS, WIDTH, stem, 4, rates))
    return model, fmda.load_segmentation(saved(model, tmp_path_factory.mktemp("deeplab") / "net"))


def test_deeplab_equals_torch_and_a_faulty_twin_does_not(pair):
    from torch_clip import deviation

    model, ours = pair
    assert ours.config.rates == (6, 12, 18, 24)[: len(ours.config.rates)] and ours.config.dilations == (1, 1, 2, 4)
    theirs = model(torch_pixels())
    with jax.default_matmul_precision("highest"):
        logits = ours(PIXELS)
        assert logits.shape == (2, 8, 12, 4) and deviation(logits, theirs) < 1e-5
        # the twin: the first block of the last stage is as dilated as the others
        module = ours.module()
        module.encoder.blocks[3][0].conv2.conv.kernel_dilation = (4, 4)
        module.encoder.blocks[3][0].conv2.conv.padding = ((4, 4), (4, 4))
        assert deviation(nnx.jit(lambda net, x: net(x))(module, PIXELS), theirs) > 1e-3


def test_deeplab_trains_on_batch_statistics_as_torch(pair):
    from torch_clip import deviation

    model, ours = copy.deepcopy(pair[0]).train(), pair[1]
    params, statistics = separated(ours.graphdef, ours.params)

    def loss(params):
        module = assembled(ours.graphdef, params, statistics, batch_statistics=True)
        return (module(PIXELS) ** 2).mean(), statistics_of(module)

    with jax.default_matmul_precision("highest"):
        (value, moved), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    theirs = (model(torch_pixels()) ** 2).mean()
    theirs.backward()
    backbone = model.backbone
    assert deviation(value, theirs) < 1e-5
    first = backbone.stem[0] if hasattr(backbone, "stem") else backbone.conv1
    assert deviation(grads["encoder"]["stem"][0]["conv"]["kernel"], first.weight.grad.permute(2, 3, 1, 0)) < 1e-4
    mine, last = moved["encoder"]["blocks"][3][1]["conv3"]["norm"], backbone.layer4[1].bn3
    assert deviation(mine["mean"], last.running_mean) < 1e-5 and deviation(mine["var"], last.running_var) < 1e-5


def test_full_size_deeplab_builds_from_the_default_configuration():
    graphdef, shapes = abstract(lambda rngs: DeepLabV2(DeepLabV2Config(), rngs=rngs))
    pixels = jax.ShapeDtypeStruct((1, 512, 512, 3), np.float32)
    assert jax.eval_shape(lambda p, x: nnx.merge(graphdef, p)(x), shapes, pixels).shape == (1, 64, 64, 19)


@pytest.mark.parametrize("stem", ["plain", "mmseg"])
@pytest.mark.parametrize("layers", [(3, 4, 6, 3), (3, 4, 23, 3)], ids=["resnet50", "resnet101"])
def test_parameter_counts_of_deeplab_are_those_of_the_torch_rendering(layers, stem):
    import torch
    import torch_resnet

    with torch.device("meta"):
        theirs = torch_resnet.DeepLabV2(layers, 64, stem, 19, (6, 12))
    config = DeepLabV2Config(ResNetEncoderConfig(layers, deep_stem=stem == "mmseg"))
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert parameter_count(lambda rngs: DeepLabV2(config, rngs=rngs)) == count
