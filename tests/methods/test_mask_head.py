"""Mask2Former's decoders on frozen encoders: maps of each kind, what is learned from them, refusals."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import small_place
from small_diffusion import drawn

from fmda.errors import UserError
from fmda.methods.dense import Encoder
from fmda.methods.kinds import open_run
from fmda.methods.mask_head import MaskHeadConfig, MaskNetwork
from fmda.models.clip import ClipConfig, ResNetConfig, TextConfig, VitConfig
from fmda.models.dino import vit_config
from fmda.weights.checkpoint import network_graph
from fmda.weights.network import save

HEAD = {
    "width": 32, "mask_width": 8, "heads": 2, "pixel_layers": 1, "pixel_hidden": 16, "layers": 3, "hidden": 16,
    "queries": 5, "points": 64,
}  # fmt: skip
TOWERS = {
    "vit": VitConfig(16, 8, 16, 2, 2, 32),
    "resnet": ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=8, heads=4),
}
CONFIG = f"""kind: supervised
encoder: vit
mask2former: {json.dumps(HEAD)}
data: {{name: folder, root: data, split: train}}
val: {{name: folder, root: data, split: val}}
scale: [1.0, 1.0]
crop: 32
stride: 16
rare: null
batch: 8
steps: 2
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with encoders, labelled images and the configuration."""
    place = tmp_path_factory.mktemp("mask-head")
    for name in ("vit", "resnet"):
        config = ClipConfig(8, TOWERS[name], TextConfig(20, 6, 8, 1, 2, 16))
        save("clip", place / name, config, drawn(network_graph("clip", config)[1]))
    config = vit_config(4, 12, layers=2, heads=3, mlp_width=24, image_size=8)
    save("dino", place / "dino", config, drawn(network_graph("dino", config)[1]))
    small_place.draw_labelled(place / "data")
    (place / "run.yaml").write_text(CONFIG)
    return place


@pytest.mark.parametrize("name", ["vit", "resnet", "dino"])
def test_encoders_give_four_maps_and_the_head_learns_from_them(place, name):
    network = MaskNetwork(Encoder(str(place / name)), MaskHeadConfig(**HEAD), 3)
    encoder = network.encoder
    maps = jax.eval_shape(encoder.maps, encoder.params, jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.uint8))
    assert [x.shape[1:3] for x in maps] == [(64 // stride, 96 // stride) for stride in (4, 8, 16, 32)]
    head = jax.eval_shape(network.init, jax.random.key(0))
    params = {"encoder": encoder.params, "head": head}
    batch = {"image": jnp.zeros((2, 64, 96, 3), jnp.uint8), "labels": jnp.zeros((2, 64, 96), jnp.int32)}
    loss, metrics = jax.eval_shape(network.loss, params, batch, jax.random.key(0))
    assert loss.shape == () and set(metrics) == {"class", "mask", "dice", "non_finite"}
    assert jax.eval_shape(network.scores, params, batch["image"]).shape == (2, 64, 96, 3)


def test_shapes_that_cannot_work_are_refused(place, monkeypatch):
    monkeypatch.chdir(place)
    for override, words in (
        ("mask2former.width=48", "mask2former.width: 48 is not a multiple of 32 and of the 2 heads"),
        ("crop=40", "crop: 40 is not a multiple of 32"),
    ):
        with pytest.raises(UserError, match=words):
            open_run(place / "run.yaml", ["work_dir=refused", override]).execute(lambda _: None)
    assert not Path("refused/train").exists()
