"""Mask2Former's decoders on frozen encoders: maps of each kind, what is learned from them, refusals."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_place
from small_diffusion import drawn

from fmda import trees
from fmda.data import ClassList
from fmda.errors import UserError
from fmda.methods.dense import Encoder, normalised
from fmda.methods.floss.features import patches
from fmda.methods.floss.hosts import HOSTS
from fmda.methods.kinds import open_run
from fmda.methods.mask_head import MaskHeadConfig, MaskNetwork, names_read
from fmda.methods.pretrain.tokenizer import train_tokenizer
from fmda.methods.zero_shot import ZeroShotConfig
from fmda.models.clip import ClipConfig, ResNetConfig, TextConfig, VitConfig
from fmda.models.dino import vit_config
from fmda.nn.norm import unit
from fmda.weights.checkpoint import network_graph
from fmda.weights.load import load_clip
from fmda.weights.network import save

HEAD = {
    "width": 32, "mask_width": 8, "heads": 2, "pixel_layers": 1, "pixel_hidden": 16, "layers": 3, "hidden": 16,
    "queries": 5, "points": 64,
}  # fmt: skip
TOWERS = {
    "vit": VitConfig(16, 8, 16, 2, 2, 32),
    "resnet": ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=8, heads=4),
}
CLASSES = ClassList(["road", "car", "sky"])
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
    train_tokenizer(["a photo of the road"], 515, place / "words")
    for name in ("vit", "resnet"):
        config = ClipConfig(8, TOWERS[name], TextConfig(515, 24, 8, 1, 2, 16, eos_token_id=514, bos_token_id=513))
        params = trees.flatten(drawn(network_graph("clip", config)[1]))
        params = {path: np.abs(leaf) if path.endswith("var") else leaf for path, leaf in params.items()}
        save("clip", place / name, config, trees.unflatten(params), (place / "words").iterdir())
    config = vit_config(4, 12, layers=2, heads=3, mlp_width=24, image_size=8)
    save("dino", place / "dino", config, drawn(network_graph("dino", config)[1]))
    small_place.draw_labelled(place / "data")
    (place / "run.yaml").write_text(CONFIG)
    return place


@pytest.mark.parametrize("name", ["vit", "resnet", "dino"])
def test_encoders_give_four_maps_and_the_head_learns_from_them(place, name):
    network = MaskNetwork(Encoder(str(place / name)), MaskHeadConfig(**HEAD), CLASSES)
    encoder = network.encoder
    maps = jax.eval_shape(encoder.maps, encoder.params, jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.uint8))
    assert [x.shape[1:3] for x in maps] == [(64 // stride, 96 // stride) for stride in (4, 8, 16, 32)]
    head = jax.eval_shape(network.init, jax.random.key(0))
    params = {"encoder": encoder.params, "head": head}
    batch = {"image": jnp.zeros((2, 64, 96, 3), jnp.uint8), "labels": jnp.zeros((2, 64, 96), jnp.int32)}
    loss, metrics = jax.eval_shape(network.loss, params, batch, jax.random.key(0))
    assert loss.shape == () and set(metrics) == {"class", "mask", "dice", "non_finite"}
    assert jax.eval_shape(network.scores, params, batch["image"]).shape == (2, 64, 96, 3)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_clip_classifies_pixels_by_names_beside_the_decoders(place, name):
    classes = ClassList(["road", "car", "sky"], prompts=[["road"], ["car", "van"], ["sky"]])
    encoder = Encoder(str(place / name))
    zero_shot = ZeroShotConfig(share=0.7, enlarge=2.0, window=64, stride=48)
    alone, mixed = (MaskNetwork(encoder, MaskHeadConfig(**HEAD, zero_shot=one), classes) for one in (None, zero_shot))
    params = {"encoder": encoder.params, "head": drawn(jax.eval_shape(alone.init, jax.random.key(0)))}
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 56, 3)).astype(np.uint8)
    large = jax.image.resize(pixels.astype(np.float32), (2, 80, 112, 3), "linear", antialias=False)
    corners = [(top, left) for top in (0, 16) for left in (0, 48)]

    def run(params, pixels, large):
        windows = [large[:, top : top + 64, left : left + 64] for top, left in corners]
        seen = [encoder.projected(params["encoder"], window) for window in windows]
        return alone.scores(params, pixels), mixed.scores(params, pixels), seen

    own, scores, seen = jax.device_get(jax.jit(run)(params, pixels, large))
    names, scale = encoder.class_names(classes)
    assert names.shape == (3, 2, 8)
    np.testing.assert_array_equal(names[0, 0], names[0, 1])
    assert not np.allclose(names[1, 0], names[1, 1], atol=1e-3)
    total, count = np.zeros((2, 80, 112, 3)), np.zeros((80, 112, 1))
    for (top, left), joint in zip(corners, seen, strict=True):
        p = jax.nn.softmax(scale * np.einsum("bhwe,kse->bhwks", unit(joint), unit(names)).max(-1))
        p = jax.image.resize(p, (2, 64, 64, 3), "linear", antialias=False)
        total[:, top : top + 64, left : left + 64] += p
        count[top : top + 64, left : left + 64] += 1
    clip = jax.image.resize(total / count, (2, 40, 56, 3), "linear", antialias=False)
    np.testing.assert_allclose(clip.sum(-1), 1, atol=1e-5)
    expected = np.asarray(jax.nn.softmax(own) ** 0.3 * clip**0.7)
    np.testing.assert_allclose(jax.nn.softmax(scores), expected / expected.sum(-1, keepdims=True), atol=1e-5)
    # who reads the names is part of what a result comes from
    records = [names_read(encoder, MaskHeadConfig(**HEAD, zero_shot=one), classes) for one in (None, zero_shot)]
    assert records[0] == names_read(encoder, MaskHeadConfig(**HEAD, zero_shot=ZeroShotConfig(share=0)), classes) == {}
    assert set(records[1]) == {"names"}


def test_a_transformer_s_places_are_maskclip_s(place):
    encoder, clip = Encoder(str(place / "vit")), load_clip(place / "vit")
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 48, 3)).astype(np.uint8)
    ours = encoder.projected(encoder.params, pixels)
    tower = clip.module().vision
    theirs = patches(HOSTS["maskclip"], tower, None, normalised(pixels, clip.config.image_mean, clip.config.image_std))
    np.testing.assert_allclose(unit(ours), theirs.features, atol=1e-5)


def test_shapes_that_cannot_work_are_refused(place, monkeypatch):
    monkeypatch.chdir(place)
    for override, words in (
        ("mask2former.width=48", "mask2former.width: 48 is not a multiple of 32 and of the 2 heads"),
        ("crop=40", "crop: 40 is not a multiple of 32"),
        ("encoder=dino", "zero_shot: .*dino is no CLIP"),
        ("mask2former.zero_shot.window=32", "window 32, stride 224 leave gaps; take stride <= window"),
    ):
        with pytest.raises(UserError, match=words):
            overrides = ["work_dir=refused", "mask2former.zero_shot={share: 0.4}", override]
            open_run(place / "run.yaml", overrides).execute(lambda _: None)
    assert not Path("refused/train").exists()
