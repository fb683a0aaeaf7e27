"""transformers opens what `save_dino` writes, and sees the same: 1e-5 relative."""

import jax
import numpy as np
import pytest

from fmda.models.dino import dino, vit_config
from fmda.models.module import init
from fmda.weights.load import load_dino
from fmda.weights.network import save

pytestmark = pytest.mark.parity


def test_transformers_opens_it(tmp_path):
    import torch
    from transformers import ViTModel

    config = vit_config(8, 24, layers=2, heads=3, mlp_width=40, image_size=32)
    params = init(lambda rngs: dino(config, rngs=rngs), jax.random.key(0))
    folder = save("dino", tmp_path / "dino", config, params)
    theirs = ViTModel.from_pretrained(folder, add_pooling_layer=False)
    pixels = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        out = theirs(torch.tensor(pixels.transpose(0, 3, 1, 2))).last_hidden_state[:, 0].numpy()
    with jax.default_matmul_precision("highest"):
        ours = load_dino(folder).module()(pixels)
    np.testing.assert_allclose(ours, out, rtol=1e-5, atol=1e-5)
