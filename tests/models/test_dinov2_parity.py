"""DINOv2 against transformers' with the same weights: 1e-5 relative after each block, and gradients."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from torch_shaken import shaken

import fmda
from fmda.models import dinov2
from fmda.models.dinov2_segmenter import Dinov2Segmenter, Dinov2SegmenterConfig
from fmda.models.module import parameter_count
from fmda.nn.norm import LayerScale
from fmda.weights import dinov2_segmenter
from fmda.weights.dinov2 import rows
from fmda.weights.files import write_safetensors
from fmda.weights.load import load_dinov2
from fmda.weights.network import save
from fmda.weights.table import Table

pytestmark = pytest.mark.parity
SIZES = [(28, 28), (49, 21), (14, 35), (42, 42)]
"""The grid that positions were trained for, two of other proportions, and a larger one."""


def peer(registers, gated):
    """Returns transformers' network on random weights off their initial values; 4 x 4 positions of patches of 7."""
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    sizes = {
        "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 28, "patch_size": 7,
        "use_swiglu_ffn": gated,
    }  # fmt: skip
    if registers:
        return shaken(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=3, **sizes)))
    return shaken(Dinov2Model(Dinov2Config(**sizes)))


@pytest.fixture(scope="module", params=[(False, False), (True, True)], ids=["plain", "registers-gated"])
def pair(request, tmp_path_factory):
    model = peer(*request.param)
    folder = tmp_path_factory.mktemp("dinov2")
    model.save_pretrained(folder)
    return model, load_dinov2(folder)


def pixels_of(size):
    return np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)


def worst(net, pixels, theirs):
    """Returns the largest relative deviations (of tokens and blocks, of the normalised maps)."""
    from torch_clip import deviation

    @jax.jit
    def run(params):
        module = nnx.merge(net.graphdef, params)
        hidden = [module.tokens(pixels)]
        for block in module.blocks:
            hidden.append(block(hidden[-1]))
        return hidden, module.stages(pixels)

    with jax.default_matmul_precision("highest"):
        hidden, maps = run(net.params)
    layers, maps = (
        max(deviation(*two) for two in zip(ours, peers, strict=True))
        for ours, peers in zip((hidden, maps), theirs, strict=True)
    )
    return layers, maps


def outputs(model, pixels):
    """Returns (tokens after each block, each normalised and as a map) of transformers' network."""
    import torch

    with torch.no_grad():
        out = model(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
        h, w = (side // 7 for side in pixels.shape[1:3])
        maps = [model.layernorm(x)[:, -h * w :].reshape(len(x), h, w, -1) for x in out.hidden_states[1:]]
    np.testing.assert_array_equal(maps[-1].flatten(1, 2), out.last_hidden_state[:, -h * w :])
    return out.hidden_states, maps


@pytest.mark.parametrize("size", SIZES)
def test_equals_transformers(size, pair):
    model, net = pair
    pixels = pixels_of(size)
    layers, maps = worst(net, pixels, outputs(model, pixels))
    assert net.config.maps == (1, 2, 3, 4) and layers < 1e-5 and maps < 1e-5


def test_faulty_twins_are_noticed(pair):
    model, net = pair
    pixels = pixels_of((49, 21))
    theirs = outputs(model, pixels)
    resized = dinov2.resized_positions
    faults = {
        "antialiasing of the other kind": (
            dinov2, "resized_positions", lambda table, size, antialias: resized(table, size, antialias=not antialias)
        ),
        "no layer scale": (LayerScale, "__call__", lambda self, x: x),
    }  # fmt: skip
    if net.config.gated:
        swapped = lambda self, x: self.down(jax.nn.silu(self.up(x)) * self.gate(x))  # noqa: E731
        faults["gate and value exchanged"] = (dinov2.GatedMlp, "__call__", swapped)
    for name, fault in faults.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*fault)
            jax.clear_caches()  # blocks are traced once
            assert min(worst(net, pixels, theirs)) > 1e-3, name
    jax.clear_caches()


def test_gradients_equal_those_of_transformers(pair):
    import torch

    model, net = pair
    pixels = pixels_of((49, 21))
    model.zero_grad()
    out = model(torch.tensor(pixels.transpose(0, 3, 1, 2))).last_hidden_state[:, -21:]
    (out**3).mean().backward()

    def loss(params):
        return (nnx.merge(net.graphdef, params).stages(pixels)[-1] ** 3).mean()

    with jax.default_matmul_precision("highest"):
        grads = jax.jit(jax.grad(loss))(net.params)
    stored = Table(rows(net.config.gated)).write(grads)
    renamed = (("q_proj", "attention.query"), ("k_proj", "attention.key"), ("v_proj", "attention.value"),
               ("attention.o_proj", "attention.output.dense"), ("down_proj", "weights_out"))  # fmt: skip
    packed = {}
    for name, parameter in model.named_parameters():
        for theirs, ours in renamed:
            name = name.replace(theirs, ours)
        if "gate_proj" in name or "up_proj" in name:
            packed.setdefault(name.replace("gate_proj", "weights_in").replace("up_proj", "weights_in"), []).append(
                parameter.grad
            )
        elif name == "embeddings.mask_token":
            assert not stored[name].any() and parameter.grad is None
        else:
            packed[name] = [parameter.grad]
    assert packed.keys() == stored.keys() - {"embeddings.mask_token"}
    for name, parts in packed.items():
        expected = torch.cat(parts).numpy()
        np.testing.assert_allclose(stored[name], expected, atol=1e-5 * (np.abs(expected).max() + 1e-3), err_msg=name)


def test_transformers_opens_what_is_saved(pair, tmp_path):
    model, net = pair
    save("dinov2", tmp_path, net.config, net.params)
    again = type(model).from_pretrained(tmp_path)
    theirs = model.state_dict()
    assert again.state_dict().keys() == theirs.keys()
    for name, array in again.state_dict().items():
        np.testing.assert_array_equal(array.numpy(), theirs[name].numpy())


@pytest.mark.parametrize("head", ["linear", "daformer"])
def test_segmenters_equal_transformers_backbone_under_a_torch_head(head, tmp_path):
    import torch
    import torch_daformer
    from torch_clip import deviation
    from transformers import Dinov2WithRegistersBackbone

    model = peer(registers=True, gated=False)
    backbone = Dinov2WithRegistersBackbone(model.config)
    backbone.load_state_dict(model.state_dict())
    backbone.out_features = ["stage2", "stage4"]
    theirs = shaken(torch_daformer.Head([24, 24], 12, 5) if head == "daformer" else torch.nn.Conv2d(24, 5, 1))
    prefix = "decode_head." if head == "daformer" else "decode_head.conv_seg."
    arrays = {f"{prefix}{name}": array.numpy() for name, array in theirs.state_dict().items()}
    model.save_pretrained(tmp_path / "encoder")
    encoder = load_dinov2(tmp_path / "encoder")
    config = Dinov2SegmenterConfig(replace(encoder.config, maps=(2, 4)), head, 12, classes=5)
    table = Table(rows(False, "backbone.", "encoder/"))
    (tmp_path / "net").mkdir()
    write_safetensors(tmp_path / "net/model.safetensors", arrays | table.write({"encoder": encoder.params}))
    (tmp_path / "net/config.json").write_text(json.dumps(dinov2_segmenter.export(config).objects["config.json"]))
    pixels = pixels_of((49, 21))
    with torch.no_grad():
        maps = backbone.eval()(torch.tensor(pixels.transpose(0, 3, 1, 2))).feature_maps
        logits = theirs(maps if head == "daformer" else maps[-1])
    with jax.default_matmul_precision("highest"):
        assert deviation(fmda.load_segmentation(tmp_path / "net")(pixels), logits) < 1e-5


def parameters_of_transformers(config):
    """Returns the number of parameters of transformers' network of that shape."""
    import torch
    import transformers

    kind = "Dinov2WithRegisters" if config.registers else "Dinov2"
    extra = {"num_register_tokens": config.registers} if config.registers else {}
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}Model")(
            getattr(transformers, f"{kind}Config")(
                hidden_size=config.width, num_hidden_layers=config.layers, num_attention_heads=config.heads,
                use_swiglu_ffn=config.gated, image_size=518, patch_size=14, **extra,
            )
        )  # fmt: skip
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", dinov2.DINOV2)
def test_parameter_counts_are_those_of_transformers(name):
    config = dinov2.DINOV2[name]
    assert parameter_count(lambda rngs: dinov2.Dinov2(config, rngs=rngs)) == parameters_of_transformers(config)


@pytest.mark.parametrize("name", [f"dinov2-vit-{size}14" for size in "sbl"])
def test_parameter_counts_of_heads_are_those_of_torch(name):
    import torch
    import torch_daformer

    encoder = dinov2.DINOV2[name]
    with torch.device("meta"):
        linear, daformer = torch.nn.Conv2d(encoder.width, 19, 1), torch_daformer.Head(4 * [encoder.width], 256, 19)
    for head, theirs in (("linear", linear), ("daformer", daformer)):
        config = Dinov2SegmenterConfig(encoder, head)
        count = parameters_of_transformers(encoder) + sum(parameter.numel() for parameter in theirs.parameters())
        assert parameter_count(lambda rngs, config=config: Dinov2Segmenter(config, rngs=rngs)) == count
