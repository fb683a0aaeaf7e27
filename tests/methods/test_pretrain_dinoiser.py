"""CLIP-DINOiser's heads: targets by hand, the loss by hand, a run from images to heads that the segmenter loads."""

import json
import shutil

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fmda.errors import UserError
from fmda.methods.pretrain.dinoiser import (
    Config,
    Crop,
    Networks,
    heads_optim,
    load_networks,
    make_guides,
    make_objective,
    stages,
)
from fmda.methods.pretrain.dinoiser_targets import background, read_teacher, same_object
from fmda.models.clip import Clip, ClipConfig, TextConfig, VitConfig
from fmda.models.dino import dino, vit_config
from fmda.models.dinoiser import guide_features, init_heads, object_features, saliency
from fmda.models.module import init
from fmda.runs.stages import run_stages
from fmda.train import make_optimizer
from fmda.weights.load import load_dino, load_heads
from fmda.weights.network import save
from fmda.world.names import CLASSES

RNG = np.random.default_rng(0)


def small_clip(folder, layers=3):
    config = ClipConfig(8, VitConfig(16, 8, 16, layers, 2, 32), TextConfig(20, 6, 8, 1, 2, 16))
    return save("clip", folder, config, init(lambda rngs: Clip(config, rngs=rngs), jax.random.key(0)))


def small_dino(folder, patch=4):
    config = vit_config(patch, 12, layers=2, heads=3, mlp_width=24, image_size=8)
    return save("dino", folder, config, init(lambda rngs: dino(config, rngs=rngs), jax.random.key(1)))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a CLIP, a teacher of another patch size, and images: sky over road, a car in the middle."""
    place = tmp_path_factory.mktemp("dinoiser")
    small_clip(place / "clip")
    small_dino(place / "teacher")
    for part in ("images", "labels", "instances"):
        (place / "photo" / part).mkdir(parents=True)
    for index in range(4):
        labels = np.full((32, 64), CLASSES.index("sky"), np.uint8)
        labels[16:], labels[12:24, 20:40] = CLASSES.index("road"), CLASSES.index("car")
        image = (labels[..., None] * np.array([9, 5, 3]) + RNG.integers(0, 30, (32, 64, 3))).astype(np.uint8)
        for part, pixels in (("images", image), ("labels", labels), ("instances", labels.astype(np.uint16))):
            cv2.imwrite(str(place / "photo" / part / f"{index}.png"), pixels)
    rows = [json.dumps({"name": str(index), "facts": {}}) + "\n" for index in range(4)]
    (place / "photo/captions.jsonl").write_text("".join(rows))
    return place


def small(place, **changes):
    given = dict(
        data=(str(place / "photo"),), held=(str(place / "photo"),), clip=str(place / "clip"),
        teacher=str(place / "teacher"), size=24, channels=4, steps=4, batch=8, decay_step=3, log_every=2, save_steps=2,
    )  # fmt: skip
    return Config(**(given | changes))


def test_patches_of_like_values_belong_together():
    values = RNG.normal(size=(2, 5, 3, 4))
    flat = values.reshape(2, 5, 12) / np.linalg.norm(values.reshape(2, 5, 12), axis=-1, keepdims=True)
    cosines = flat @ flat.transpose(0, 2, 1)
    cosines[cosines < 0.2] = 0
    np.testing.assert_array_equal(same_object(jnp.float32(values), 0.2), cosines > 0)


def test_background_is_what_is_like_the_least_attended_patch():
    attention, keys = RNG.dirichlet(np.full(7, 0.3), size=(4, 3))[..., :6], RNG.normal(size=(4, 6, 3, 5))
    found = np.asarray(background(jnp.float32(attention), jnp.float32(keys), 0.3))
    for a, k, mask in zip(attention, keys, found, strict=True):
        share = (a > a.mean()).mean(1)
        weight = np.log((share + 1e-10).sum() / (share + 1e-10))
        seed = (a * weight[:, None]).sum(0).argmin()
        weighted_keys = (k * weight[None, :, None]).reshape(6, -1)
        weighted_keys /= np.linalg.norm(weighted_keys, axis=1, keepdims=True)
        np.testing.assert_array_equal(mask, weighted_keys @ weighted_keys[seed] > 0.3)
        assert mask[seed]


def test_a_sparse_head_outweighs_a_busy_one():
    # head 0 looks at patch 0 alone, head 1 at all but the seed, patch 2; patch 1 is like the seed in head 0 only
    attention = jnp.array([[[0.9, 0.0, 0.0], [0.4, 0.4, 0.0]]])
    right, up = [1.0, 0.0], [0.0, 1.0]
    keys = jnp.array([[[right, up], [up, up], [up, right]]])
    np.testing.assert_array_equal(background(attention, keys, 0.7), [[False, True, True]])
    np.testing.assert_array_equal(background(attention[:, ::-1], keys, 0.7), [[False, False, True]])


def test_the_teacher_is_read_where_its_last_block_attends(place):
    teacher = load_dino(place / "teacher")
    net, pixels = teacher.module(), RNG.normal(size=(2, 12, 8, 3)).astype(np.float32)
    reading = read_teacher(net, jnp.asarray(pixels))
    np.testing.assert_allclose(reading.values.reshape(2, 3, 2, 12), teacher.last_layer(pixels), atol=1e-5)
    np.testing.assert_allclose(reading.keys.reshape(2, 3, 2, 12), teacher.last_layer(pixels, part="key"), atol=1e-5)
    tokens = net.tokens(pixels)
    normed = net.blocks[1].norm1(net.blocks[0](tokens))
    layer = net.blocks[1].attention
    query, key = (np.asarray(part(normed), np.float64).reshape(2, 7, 3, 4) for part in (layer.query, layer.key))
    scores = np.exp(np.einsum("bnd,btnd->bnt", query[:, 0], key) / 2.0)
    np.testing.assert_allclose(reading.attention, (scores / scores.sum(-1, keepdims=True))[..., 1:], atol=1e-5)


def test_the_heads_are_convolutions_with_repeated_edges(place):
    networks = load_networks(small(place))
    tower, heads = networks.clip.module().vision, init_heads(jax.random.key(3), 16, 4)
    guide = nnx.jit(guide_features)(tower, jnp.asarray(RNG.normal(size=(1, 24, 16, 3)), jnp.float32))
    assert guide.shape == (1, 3, 2, 16)
    plain = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), heads)
    around = np.pad(np.asarray(guide[0], np.float64), ((1, 1), (1, 1), (0, 0)), mode="edge")
    kernel, bias = plain["obj_proj"]["kernel"], plain["obj_proj"]["bias"]
    found = np.stack([
        np.stack([np.einsum("yxc,yxcd->d", around[i : i + 3, j : j + 3], kernel) + bias for j in range(2)])
        for i in range(3)
    ])  # fmt: skip
    found /= np.linalg.norm(found, axis=-1, keepdims=True)
    np.testing.assert_allclose(object_features(heads, guide)[0], found, atol=1e-5)
    logit = np.asarray(guide[0], np.float64) @ plain["bkg_decoder"]["kernel"][0, 0] + plain["bkg_decoder"]["bias"]
    np.testing.assert_allclose(saliency(heads, guide)[0], logit[..., 0], atol=1e-5)


def test_the_loss_is_what_numpy_says(place):
    config = small(place)
    networks = load_networks(config)
    assert (networks.clip_side, networks.teacher_side) == (24, 12)
    heads = init_heads(jax.random.key(3), 16, 4)
    batch = {"pixels": RNG.integers(0, 255, (2, 24, 24, 3), dtype=np.uint8)}
    value, metrics, _ = jax.jit(make_objective(networks, config))(heads, None, networks.frozen, batch, None)
    guide, reading = jax.jit(make_guides(networks))(networks.frozen, batch["pixels"])
    assert guide.shape == (2, 3, 3, 16) and reading.values.shape == (2, 9, 3, 4)
    objects = np.asarray(object_features(heads, guide), np.float64).reshape(2, 9, 4)
    logits = np.maximum(objects @ objects.transpose(0, 2, 1), 0)
    together = np.asarray(same_object(reading.values, 0.2))
    pairs = np.where(together, np.log1p(np.exp(-logits)), np.log1p(np.exp(logits)))
    front = ~np.asarray(background(reading.attention, reading.keys, 0.3))
    salient = np.asarray(saliency(heads, guide), np.float64).reshape(2, 9)
    patches = np.where(front, np.log1p(np.exp(-salient)), np.log1p(np.exp(salient)))
    assert float(metrics["object_loss"]) == pytest.approx(pairs.mean(), rel=1e-4)
    assert float(metrics["background_loss"]) == pytest.approx(patches.mean(), rel=1e-4)
    assert float(value) == pytest.approx(pairs.mean() + patches.mean(), rel=1e-4)
    assert float(metrics["alike"]) == pytest.approx(together.mean())
    assert float(metrics["objects"]) == pytest.approx(front.mean())


def test_each_head_has_its_rate_and_both_fall_to_a_tenth():
    config = Config(data=(), learning_rate=1e-3, background_rate=1e-1, decay_step=2, weight_decay=0.0)
    tx = make_optimizer(heads_optim(config), config.steps)
    heads = {name: {"bias": jnp.zeros(1)} for name in ("obj_proj", "bkg_decoder")}
    state, sizes = tx.init(heads), []
    for step in range(4):
        # the moments of a constant gradient keep each update at the learning rate
        updates, state = tx.update(jax.tree.map(jnp.ones_like, heads), state, heads, position=step)
        sizes.append([-float(updates[name]["bias"][0]) for name in ("obj_proj", "bkg_decoder")])
    np.testing.assert_allclose(sizes, [[1e-3, 1e-1]] * 2 + [[1e-4, 1e-2]] * 2, rtol=1e-4)


def test_crops_are_squares_of_the_asked_size():
    image = RNG.integers(0, 255, (32, 64, 3), dtype=np.uint8)
    first, second = (Crop(24, (0.5, 1.0), 1.0)(image, np.random.default_rng(5))["pixels"] for _ in range(2))
    assert first.shape == (24, 24, 3) and first.dtype == np.uint8 and np.array_equal(first, second)
    plain = [Crop(32, (1.0, 1.0), 0.0)(image, np.random.default_rng(seed))["pixels"] for seed in range(20)]
    windows = {image[:, i : i + 32].tobytes() for i in range(33)}
    mirrored = {np.ascontiguousarray(image[:, i : i + 32][:, ::-1]).tobytes() for i in range(33)}
    assert all(crop.tobytes() in windows | mirrored for crop in plain)
    assert {crop.tobytes() in windows for crop in plain} == {True, False}


@pytest.fixture(scope="module")
def finished(place):
    """A whole run: (its configuration, the folders of its stages)."""
    config = small(place)
    return config, run_stages(stages(config), place / "work", config, lambda _: None)


def test_a_run_ends_in_heads_that_the_segmenter_loads(finished):
    config, done = finished
    heads = load_heads(done["export"], 16)
    assert heads["obj_proj"]["kernel"].shape == (3, 3, 16, 4) and heads["bkg_decoder"]["kernel"].shape == (1, 1, 16, 1)
    start = init_heads(jax.random.key(config.seed), 16, 4)
    moved = np.abs(heads["bkg_decoder"]["kernel"] - start["bkg_decoder"]["kernel"]).max()
    assert 2e-2 < moved < 5e-2  # three steps of about 1e-2 and one of a tenth
    scores = json.loads((done["check"] / "patches.json").read_text())[config.held[0]]
    assert set(scores["together"]) == {"raw pixels", "clip", "teacher", "heads"}
    assert set(scores["things"]) == {"share", "saliency", "teacher saliency"}


@pytest.mark.slow
def test_an_interrupted_run_ends_in_the_same_bytes(finished, tmp_path):
    config, done = finished
    work = shutil.copytree(done["train"].parent, tmp_path / "work")
    shutil.rmtree(work / "train/checkpoints/4")
    for name in ("train", "export", "check"):
        (work / name / "stage.json").unlink()
    (work / "export/dinoiser.safetensors").unlink()
    again = run_stages(stages(config), work, config, lambda _: None)
    one, two = ((folders["export"] / "dinoiser.safetensors").read_bytes() for folders in (done, again))
    assert one == two


def test_a_run_goes_on_only_with_the_networks_it_began_with(finished, place, tmp_path):
    config, done = finished
    networks = load_networks(config)
    changed = networks._replace(teacher=load_dino(small_dino(tmp_path / "other", patch=8)))
    assert isinstance(changed, Networks) and networks.digest != changed.digest
    assert json.loads((done["train"] / "identity.json").read_text())["weights"] == networks.digest


def test_faults_are_one_line(place, tmp_path):
    def fault(**changes):
        with pytest.raises(UserError) as caught:
            run_stages(stages(small(place, **changes)), tmp_path / "work", {}, lambda _: None)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such folder" in fault(teacher=str(tmp_path / "gone"))
    assert "no such folder" in fault(clip=str(tmp_path / "gone"))
    assert "gone: no images there" in fault(data=(str(tmp_path / "gone"),))
    assert "has 2 blocks" in fault(clip=str(small_clip(tmp_path / "shallow", layers=2)))
    assert "size: 8 gives no two patches" in fault(size=8)
