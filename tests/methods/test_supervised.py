"""Supervised segmentation: losses and heads by hand, a run from images to a segmenter, resume, refusals."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_place

from fmda.errors import UserError
from fmda.evaluate import Segmenter
from fmda.losses.pixelwise import cross_entropy
from fmda.methods.dense import Encoder, head_logits, init_head
from fmda.methods.kinds import open_run
from fmda.models.clip import Clip, ClipConfig, TextConfig, VitConfig
from fmda.models.dino import dino, vit_config
from fmda.models.module import init
from fmda.weights.files import read_arrays
from fmda.weights.network import save

ROOT = Path(__file__).parents[2]
CONFIG = """kind: supervised
encoder: clip
data: {name: folder, root: data, split: train}
val: {name: folder, root: data, split: val}
scale: [1.0, 1.0]
crop: 16
stride: 12
rare_pixels: 10
batch: 8
steps: 6
log_every: 2
save_steps: 2
evaluate_steps: 2
optim: {learning_rate: 0.5, schedule: poly, method: sgd}
"""


def small_clip(folder, seed=0):
    config = ClipConfig(8, VitConfig(16, 8, 16, 2, 2, 32), TextConfig(20, 6, 8, 1, 2, 16))
    return save("clip", folder, config, init(lambda rngs: Clip(config, rngs=rngs), jax.random.key(seed)))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a CLIP, a DINO, labelled images and the configuration."""
    place = tmp_path_factory.mktemp("supervised")
    small_clip(place / "clip")
    config = vit_config(4, 12, layers=2, heads=3, mlp_width=24, image_size=8)
    save("dino", place / "dino", config, init(lambda rngs: dino(config, rngs=rngs), jax.random.key(1)))
    small_place.draw_labelled(place / "data")
    (place / "run.yaml").write_text(CONFIG)
    return place


def execute(place, work, *overrides):
    open_run(place / "run.yaml", [f"work_dir={place / work}", *overrides]).execute(lambda _: None)
    return place / work


@pytest.fixture(scope="module")
def run(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return execute(place, "run")


def test_cross_entropy_leaves_ignored_pixels_out():
    logits = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 5, (2, 3, 4))
    labels[0, 0], labels[1, 2, 1] = 255, 255
    logits[0, 0] = 1e30
    loss, accuracy = cross_entropy(logits, labels)
    valid = labels != 255
    p = np.exp(logits[valid].astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    assert float(loss) == pytest.approx(-np.log(p[np.arange(valid.sum()), labels[valid]]).mean(), rel=1e-5)
    assert float(accuracy) == pytest.approx((logits[valid].argmax(-1) == labels[valid]).mean())
    nothing = cross_entropy(logits, np.full_like(labels, 255))
    assert [float(value) for value in nothing] == [0.0, 0.0]


def test_heads_by_hand():
    x = np.random.default_rng(0).normal(size=(1, 3, 4, 6)).astype(np.float32)
    linear = init_head(jax.random.key(0), 6, 0, 5)
    assert set(linear) == {"linear"}
    np.testing.assert_allclose(head_logits(linear, x), x @ np.asarray(linear["linear"]["kernel"])[0, 0], atol=1e-5)
    conv = init_head(jax.random.key(0), 6, 7, 5)
    kernel, padded = np.asarray(conv["conv"]["kernel"]), np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    hidden = sum(padded[:, i : i + 3, j : j + 4] @ kernel[i, j] for i in range(3) for j in range(3))
    expected = np.maximum(hidden, 0) @ np.asarray(conv["linear"]["kernel"])[0, 0]
    np.testing.assert_allclose(head_logits(conv, x), expected, atol=1e-4)


@pytest.mark.parametrize(("name", "grid"), [("clip", (2, 3)), ("dino", (3, 5))])
def test_encoders_give_a_feature_for_each_patch(place, name, grid):
    encoder = Encoder(str(place / name))
    pixels = jnp.full((1, 12, 17, 3), 128.0)
    features = encoder.features(encoder.params, pixels)
    assert features.shape == (1, *grid, encoder.width) and features.dtype == jnp.float32


def test_a_run_trains_scores_and_gives_a_segmenter(place, run):
    rows = [json.loads(line) for line in (run / "train/metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    scores = {row["step"]: row["val/miou"] for row in rows if "val/miou" in row}
    assert sorted(losses) == sorted(scores) == [2, 4, 6] and losses[6] < losses[2]
    # the poly schedule is counted from step 0
    rates = {row["step"]: row["learning_rate"] for row in rows if "loss" in row}
    assert rates[4] == pytest.approx(0.5 * (1 - 3 / 6) ** 0.9, rel=1e-5)
    outputs = json.loads((run / "export/stage.json").read_text())["outputs"]
    assert scores[outputs["step"]] == max(scores.values())
    assert json.loads((run / "export/training.json").read_text())["last"]["step"] == 6
    segmenter = Segmenter.load(run)
    result = segmenter.predict(place / "data/val/images/0.png")
    assert result.labels.shape == (32, 48) and segmenter.classes.names == ("road", "car", "sky")
    miou = json.loads((run / "score/stage.json").read_text())["outputs"]["miou"]
    # what was scored on the mesh during training is what the segmenter scores
    assert miou == pytest.approx(max(scores.values()), abs=1e-6) and miou > 0.3


def test_an_interrupted_run_ends_in_the_same_bytes(place, run, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    work = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(work / "train/checkpoints/6")
    for name in ("train", "export", "score"):
        (work / name / "stage.json").unlink()
    (work / "export/head.safetensors").unlink()
    open_run(place / "run.yaml", [f"work_dir={work}"]).execute(lambda _: None)
    assert (work / "export/head.safetensors").read_bytes() == (run / "export/head.safetensors").read_bytes()


def test_a_dino_with_a_hidden_layer_and_shuffled_order(place, monkeypatch):
    monkeypatch.chdir(place)
    work = execute(place, "dino-run", "encoder=dino", "hidden=4", "rare=null", "steps=2", "evaluate_steps=0")
    assert Segmenter.load(work).predict(place / "data/val/images/1.png").labels.max() < 3


def test_a_trained_encoder_is_part_of_the_export(place, monkeypatch):
    monkeypatch.chdir(place)
    overrides = ("tune={method: weights, blocks: 1}", "optim.multipliers={'encoder/*': 0.1}", "steps=2", "mesh=[1, 1]")
    work = execute(place, "tuned", *overrides, "evaluate_steps=2")
    changed = read_arrays(work / "export/encoder.safetensors")
    assert {path.rsplit("/", 1)[0].split("/")[1] for path in changed} == {"1"}
    scores = json.loads((work / "train/metrics.jsonl").read_text().splitlines()[-1])
    # what was scored with adapters apart is what the export scores
    assert json.loads((work / "score/stage.json").read_text())["outputs"]["miou"] == pytest.approx(scores["val/miou"])
    plan = open_run(place / "run.yaml", overrides).plan()
    assert dict(plan.parameters)["encoder"] == sum(leaf.size for leaf in changed.values())
    with pytest.raises(UserError, match="tune.blocks: 9 of 2 blocks"):
        execute(place, "refused", "tune={method: weights, blocks: 9}")


def test_another_encoder_under_the_same_name_is_refused(run, place, tmp_path):
    folder = shutil.copytree(run / "export", tmp_path / "export")
    model = json.loads((folder / "model.json").read_text())
    model["encoder"] = str(small_clip(tmp_path / "other", seed=5))
    (folder / "model.json").write_text(json.dumps(model))
    with pytest.raises(UserError, match="has other weights than the encoder of training; restore them"):
        Segmenter.load(folder)


def test_faults_are_found_before_the_first_stage(place, monkeypatch):
    monkeypatch.chdir(place)
    for override, words in (
        ("val.split=night", "night"),
        (f"encoder={ROOT / 'fmda/assets/street-diffusion/vae'}", "name a CLIP, a DINO or a DINOv2"),
        ("val.class_map=cityscapes-to-camvid", "cityscapes"),
    ):
        with pytest.raises(UserError, match=words):
            execute(place, "refused", override)
        assert not (place / "refused/train").exists()


def test_every_image_is_decoded_before_the_first_step(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    shutil.copytree("data", tmp_path / "data")
    (tmp_path / "data/train/images/1.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"images cannot be used: .*1\.png: an empty file"):
        execute(place, "broken", f"data.root={tmp_path}/data")


def test_the_plan_counts_the_head_and_the_encoder(place, monkeypatch):
    monkeypatch.chdir(place)
    plan = open_run(place / "run.yaml").plan()
    assert dict(plan.parameters)["trained"] == 16 * 3 + 3 < dict(plan.parameters)["encoder, frozen"]
    assert dict(plan.memory)["frozen parameters"] == 4 * dict(plan.parameters)["encoder, frozen"]
    # the gradient of a linear head: once forward, once for the kernel
    assert plan.flops[0][1] > 2 * 2 * 4 * 16 * 3
    assert [name for name, _ in plan.stages] == ["train", "export", "score"]


@pytest.mark.parametrize("name", ["street", "camvid"])
def test_published_configurations_open(name):
    run = open_run(ROOT / f"configs/supervised/{name}.yaml")
    assert [stage.name for stage in run.stages()] == ["train", "export", "score"]
