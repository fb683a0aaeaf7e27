"""DINO against transformers' ViT with the same weights: 1e-5 relative after each layer."""

import jax
import numpy as np
import pytest
from torch_shaken import shaken

from fmda.weights.load import load_dino

pytestmark = pytest.mark.parity


def model_and_pixels(size):
    import torch
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        layer_norm_eps=1e-12,
    )
    pixels = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    return shaken(ViTModel(config)), pixels, torch.tensor(pixels.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("size", [(32, 32), (48, 24)])
def test_equals_transformers_vit(size, tmp_path):
    import torch
    from torch_clip import deviation

    model, pixels, theirs = model_and_pixels(size)
    model.save_pretrained(tmp_path)
    ours = load_dino(tmp_path)
    kept = {}
    layers = dict(model.named_modules())
    last = next(layers[name] for name in layers if name.endswith("layers.2.attention"))
    hooks = [
        getattr(last, name).register_forward_hook(lambda _m, _i, out, name=name: kept.update({name: out}))
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    with torch.no_grad():
        out = model(theirs, output_hidden_states=True, interpolate_pos_encoding=True)
    for hook in hooks:
        hook.remove()
    with jax.default_matmul_precision("highest"):
        net = ours.module()
        x = net.tokens(pixels)
        assert deviation(x, out.hidden_states[0]) < 1e-5
        for block, hidden in zip(net.blocks, out.hidden_states[1:], strict=True):
            x = block(x)
            assert deviation(x, hidden) < 1e-5
        assert deviation(net(pixels), out.last_hidden_state[:, 0]) < 1e-5
        h, w = net.grid(*size)
        for part, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            patches = kept[name][:, 1:].reshape(2, h, w, 64)
            assert deviation(ours.last_layer(pixels, part=part), patches) < 1e-5


def test_packed_names_give_the_same_network(tmp_path):
    from safetensors.torch import save_file
    from torch_clip import deviation

    model, pixels, _ = model_and_pixels((32, 32))
    model.save_pretrained(tmp_path / "hf")
    hf = load_dino(tmp_path / "hf")
    from fmda.weights import dino

    packed = dino.DINO.write(hf.params)
    (tmp_path / "timm").mkdir()
    import torch

    save_file({k: torch.tensor(v) for k, v in packed.items()}, tmp_path / "timm" / "model.safetensors")
    # Sizes are told from the arrays, heads by their size of 64: one here, so only what precedes attention is compared.
    timm = load_dino(tmp_path / "timm")
    assert (timm.config.width, timm.config.patch_size, timm.config.layers, timm.config.heads) == (64, 8, 3, 1)
    assert timm.config.mlp_width == 160 and timm.config.image_size == 32
    assert deviation(timm.module().tokens(pixels), hf.module().tokens(pixels)) < 1e-6
