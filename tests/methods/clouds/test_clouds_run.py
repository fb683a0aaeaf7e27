"""Kind `clouds` from a warm-up to a scored network: resume, devices, other generated images, refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_place
import tiny_sam
from PIL import Image
from small_diffusion import drawn

from fmda import trees
from fmda.config import read_yaml, to_dict
from fmda.data import ClassList, read_image
from fmda.errors import UserError
from fmda.evaluate import Protocol, Segmenter
from fmda.evaluate.sections import read_sections
from fmda.losses.masks import MaskLossConfig, mask_loss
from fmda.methods.clouds import run as clouds
from fmda.methods.clouds.run import generator_of
from fmda.methods.clouds.weak_spots import viewer
from fmda.methods.dense import DenseNetwork, Encoder
from fmda.methods.kinds import Runs, open_run
from fmda.methods.mask_head import MaskHeadConfig
from fmda.methods.supervised import Model, make_network, open_model, write_model
from fmda.methods.tune import finished, tuned
from fmda.methods.zero_shot import ZeroShotConfig
from fmda.models.clip import ClipConfig, ResNetConfig, TextConfig, VitConfig
from fmda.models.mask2former import log_scores
from fmda.png import read_png
from fmda.train import run_task
from fmda.weights.files import read_arrays
from fmda.weights.network import network_graph, save

HEAD = MaskHeadConfig(
    width=32, mask_width=8, heads=1, pixel_layers=1, pixel_hidden=8, layers=1, hidden=8, queries=4, points=32
)
CLASSES = ClassList(("road", "car", "sky"))
CONFIG = """kind: clouds
start: warm-up
data: {name: folder, root: data, split: train}
generated: {name: folder, root: generated}
val: {name: folder, root: data, split: val}
scale: [1.0, 1.0]
crop: 32
stride: 16
batch: 8
steps: 6
factor: 3.0
teacher: {decay: 0.5}
labels: {sam: sam, check_every: 2, moved: 0.0001, votes: {points: 12}}
optim: {learning_rate: 0.01}
mesh: [1, 1]
log_every: 1
save_steps: 2
evaluate_steps: 0
figures: 2
"""


def start(folder, masks):
    """Writes a warm-up that did not learn: a head as it was drawn."""
    encoder = Encoder("clip")
    head = jax.device_get(make_network(encoder, CLASSES, masks).init(jax.random.key(0)))
    folder.mkdir()
    write_model(
        folder, head, encoder=encoder, classes=CLASSES, masks=masks, protocol=Protocol(crop=32, stride=16),
    )  # fmt: skip
    return head


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an encoder, two warm-ups, labelled images, generated ones, a SAM and the configuration."""
    place = tmp_path_factory.mktemp("clouds")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        vision = ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=8, heads=4)
        config = ClipConfig(8, vision, TextConfig(20, 6, 8, 1, 2, 16))
        params = trees.flatten(drawn(network_graph("clip", config)[1]))
        params = {path: np.abs(leaf) if path.endswith("var") else leaf for path, leaf in params.items()}
        save("clip", place / "clip", config, trees.unflatten(params))
        small_place.draw_labelled(place / "data")
        (place / "generated/images").mkdir(parents=True)
        rng = np.random.default_rng(2)
        rows = []
        for number in range(4):
            image, _ = tiny_sam.blocks(40, 48)
            image = np.roll(image, number * 5, (0, 1)) // 2 + rng.integers(0, 99, image.shape)
            file = f"images/im_{number:06}_p0.png"
            Image.fromarray(image.astype(np.uint8)).save(place / "generated" / file)
            row = {"index": number, "file": file, "prompt": "a street", "prompt_index": 0, "class_index": None}
            rows.append(row | {"class_name": None, "seed": number, "attempt": 0, "scores": {}, "checkpoint": "a"})
        write_manifest(place / "generated", rows)
        tiny_sam.pair(place / "sam")
        start(place / "warm-up", HEAD)
        start(place / "convolutions", None)
    (place / "run.yaml").write_text(CONFIG)
    return place


def write_manifest(folder, rows):
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def execute(work, *overrides):
    open_run("run.yaml", [f"work_dir={work}", *overrides]).execute(lambda _: None)
    return Path(work)


def test_faults_are_found_before_the_first_stage(place, monkeypatch):
    monkeypatch.chdir(place)
    for override, words in (
        ("start=convolutions", "has a head of convolutions; train the warm-up with mask2former"),
        ("crop=40", "crop: 40 is not a multiple of 32"),
        ("crop=64", "less than a crop of 64; lower crop or generate larger images"),
        ("labels.sam=data", "data"),
        ("start=nowhere", "nowhere"),
    ):
        with pytest.raises(UserError, match=words):
            execute("refused", override)
    assert not Path("refused/train").exists()


def test_clip_classifies_beside_the_head_as_the_warm_up_or_the_joint_run_says(place, monkeypatch):
    monkeypatch.chdir(place)
    model = open_model(Path("warm-up"))
    with_clip = model._replace(masks=replace(HEAD, zero_shot=ZeroShotConfig(share=0.3)))
    for overrides, plain, mixed in (
        ([], None, 0.3),
        (["zero_shot={share: 0.5, window: 32, stride: 16}"], 0.5, 0.5),
        (["zero_shot={share: 0}"], 0, 0),
    ):
        config = open_run("run.yaml", overrides).config
        found = [clouds.joint_masks(config, one).zero_shot for one in (model, with_clip)]
        assert [one and one.share for one in found] == [plain, mixed]
    with pytest.raises(UserError, match="tokenizer"):
        execute("refused", "zero_shot={share: 0.5}")
    assert not Path("refused/train").exists()


def test_images_of_several_checkpoints_are_refused(place, tmp_path):
    folder = shutil.copytree(place / "generated", tmp_path / "generated")
    assert generator_of(folder) == "a" and generator_of(tmp_path) is None
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    write_manifest(folder, [rows[0] | {"checkpoint": "b"}, *rows[1:]])
    with pytest.raises(UserError, match="its images are of 2 checkpoints; generate a set with one of them"):
        generator_of(folder)


def test_images_of_earlier_rounds_keep_names_of_their_own(place, monkeypatch):
    monkeypatch.chdir(place)
    earlier = "earlier=[{name: folder, root: generated}, {name: folder, root: generated}]"
    one, three = (clouds.open_generated(open_run("run.yaml", which).config) for which in ([], [earlier]))
    assert one.digest(labels=False) == open_run("run.yaml").config.generated.open().digest(labels=False)
    names = [three[k].name for k in range(len(three))]
    assert len(set(names)) == 3 * len(one) and names[: len(one)] == [item.name for item in one.items]
    np.testing.assert_array_equal(three[5].image, one[1].image)
    with pytest.raises(UserError, match="nowhere"):
        execute("refused", "earlier=[{name: folder, root: nowhere}]")


@pytest.mark.slow
def test_the_plan_counts_the_head_of_a_warm_up_that_is_not_made_yet(place, monkeypatch):
    monkeypatch.chdir(place)
    data = "{name: folder, root: data, split: train}"
    warm_up = (
        f"{{kind: supervised, encoder: clip, mask2former: {json.dumps(to_dict(HEAD))}, data: {data}, val: {data}}}"
    )
    joint = "\n".join(f"    {line}" for line in CONFIG.replace("start: warm-up", "start: '@w/export'").splitlines())
    Path("both.yaml").write_text(f"kind: pipeline\nruns:\n  w: {warm_up}\n  j:\n{joint}\n")
    plan = Runs(read_yaml("both.yaml")["runs"], "both.yaml", Path("both"), Path()).plan("j")
    head = trees.count(read_arrays(place / "warm-up/head.safetensors"))
    assert dict(plan.parameters)["trained"] == head
    # the teacher, and the one that labels
    assert dict(plan.memory)["average of parameters"] == 4 * head
    assert dict(plan.memory)["auxiliary state"] == 4 * head + 4
    assert [name for name, _ in plan.stages] == ["train", "export", "score", "labels"]
    # a later round has the sizes of the same warm-up
    runs = read_yaml("both.yaml")["runs"]
    runs["k"] = runs["j"] | {"start": "@j/export", "tune": {"method": "weights", "blocks": 1}}
    later = Runs(runs, "both.yaml", Path("both"), Path()).plan("k")
    assert dict(later.parameters)["trained"] - dict(later.parameters)["encoder"] == head


@pytest.fixture(scope="module")
def run(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return place / execute("run")


@pytest.mark.slow
def test_a_run_trains_scores_and_shows_its_labels(place, run, monkeypatch):
    rows = [json.loads(line) for line in (run / "train/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 6 and all(np.isfinite(row["loss"]) and row["non_finite"] == 0 for row in steps)
    assert 0.2 < np.mean([row["generated"] for row in steps]) < 0.95
    assert all(0 <= row["time"]["label_wait"] <= 1 for row in steps)
    # at steps 1, 3, 5 the teacher became the one that labels
    assert [row["teacher_moved"] > 0 for row in steps] == [False, True] * 3
    scores = rows[-1]
    assert {"val/miou", "teacher/miou"} <= set(scores)
    head, before = (read_arrays(path / "head.safetensors") for path in (run / "export", place / "warm-up"))
    assert max(np.abs(head[name] - before[name]).max() for name in head) > 1e-3
    monkeypatch.chdir(place)
    assert Segmenter.load(run).predict(place / "data/val/images/0.png").labels.shape == (32, 48)
    # the teacher is exported too, and both look at a generated image
    teacher = read_arrays(run / "export/teacher/head.safetensors")
    assert head.keys() == teacher.keys() and any((head[name] != teacher[name]).any() for name in head)
    look, names = viewer(run / "export")
    seen = look(read_image(place / "generated/images/im_000001_p0.png"))
    assert names == CLASSES.names and seen.student.shape == seen.teacher.shape == seen.entropy.shape == (40, 48)
    assert 0 <= seen.entropy.min() and seen.entropy.max() <= 1
    assert Segmenter.load(run / "export/teacher").predict(place / "data/val/images/0.png").labels.max() < 3
    sections = read_sections(run / "labels")
    assert len(sections) == 2 and "prompts" in sections[0].text


@pytest.mark.slow
def test_a_set_of_another_checkpoint_is_refused(place, run, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    work = shutil.copytree(run, tmp_path / "run")
    (work / "train/stage.json").unlink()
    manifest = place / "generated/manifest.jsonl"
    before = manifest.read_text()
    manifest.write_text(before.replace('"checkpoint": "a"', '"checkpoint": "b"'))
    with pytest.raises(UserError, match=r"generator: 'a' -> 'b'"):
        execute(work)
    manifest.write_text(before)


class Linear:
    """Queries that are linear in the pixels at stride 4, in place of a network that compiles slowly."""

    def __init__(self, encoder):
        self.encoder = encoder

    def init(self, key):
        first, second = jax.random.split(key)
        return {"masks": jax.random.normal(first, (3, 4)), "classes": jax.random.normal(second, (4, 4))}

    def predictions(self, params, pixels):
        b, height, width, _ = pixels.shape
        x = pixels.astype(jnp.float32).reshape(b, height // 4, 4, width // 4, 4, 3).mean((2, 4)) / 128 - 1
        masks = jnp.einsum("bhwc,cq->bqhw", x, params["head"]["masks"])[None]
        return jnp.broadcast_to(params["head"]["classes"], (1, b, 4, 4)), masks

    def loss(self, params, batch, key):
        return mask_loss(*self.predictions(params, batch["image"]), batch["labels"], key, MaskLossConfig(points=16))

    def scores(self, params, pixels):
        classes, masks = self.predictions(params, pixels)
        return log_scores(classes[0], masks[0], pixels.shape[1:3])


@pytest.fixture
def train(place, monkeypatch):
    """Returns a function (folder, overrides) -> the state after the training of such queries."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(clouds, "joint_network", lambda config, model: Linear(model.encoder))
    model = open_model(place / "warm-up")
    model = model._replace(head=jax.device_get(Linear(None).init(jax.random.key(1))))

    def train(folder, *overrides):
        config = open_run("run.yaml", overrides).config
        task = clouds.make_task(config, model, config.data.open(), config.generated.open(), clouds.open_stage(config))
        return jax.device_get(run_task(task, config.of_loop(), folder))

    return train


def test_a_killed_run_ends_in_the_same_bits(train, tmp_path):
    whole = train(tmp_path / "whole")
    assert whole.aux["version"] == 4
    work = shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(work / "checkpoints/6")
    # what a kill leaves of the caches: labels of a later teacher, half-written files
    (work / "labels/4").rename(work / "labels/9")
    shutil.copytree(work / "labels/9", work / "labels/2", dirs_exist_ok=True)
    for path in [*(work / "labels/2").iterdir(), *(work / "embeddings").iterdir()]:
        path.write_bytes(b"\x89PNG")
    again = train(work)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # threads that were at work when the teacher changed may still write for an earlier one
    assert {"4"} <= {path.name for path in (work / "labels").iterdir()} <= {"0", "2", "4"}


class Dense(DenseNetwork):
    """Logits of each patch at the size of the image, in place of queries that compile slowly."""

    def scores(self, params, pixels):
        return super().scores(params, pixels).repeat(8, 1).repeat(8, 2)


@pytest.mark.slow
def test_an_encoder_that_is_trained_labels_as_its_average_does(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    vision = VitConfig(16, 8, 16, 2, 2, 32)
    config = ClipConfig(8, vision, TextConfig(20, 6, 8, 1, 2, 16))
    save("clip", tmp_path / "vit", config, drawn(network_graph("clip", config)[1]))
    encoder = Encoder(str(tmp_path / "vit"))
    plain = Dense(encoder, 0, 3)
    monkeypatch.setattr(clouds, "joint_network", lambda config, model: tuned(Dense(model.encoder, 0, 3), config.tune))
    head = jax.device_get(plain.init(jax.random.key(1)))
    model = Model("supervised", encoder, head, None, CLASSES, Protocol(crop=32))
    overrides = ("tune={method: minor-lora, rank: 2, blocks: 1}", "labels.sam=null", "optim.learning_rate=0.05")
    config = open_run("run.yaml", overrides).config
    images = config.generated.open()
    task = clouds.make_task(config, model, config.data.open(), images, None)

    def train(folder):
        return jax.device_get(run_task(task, config.of_loop(), folder))

    whole = train(tmp_path / "whole")
    labeller, version = whole.aux["labeller"], whole.aux["version"]
    assert version == 4 and labeller.keys() == whole.teacher.keys() == whole.params.keys() == {"linear", "encoder"}
    start, average = (trees.flatten(tree["encoder"]) for tree in (task.weights, whole.teacher))
    assert all(np.abs(leaf - start[path]).max() > 1e-3 for path, leaf in average.items())
    # the labels in use are those of the labeller's own encoder, merged
    merged_head, merged_encoder = finished(clouds.joint_network(config, model), labeller)
    differs = 0
    paths = sorted((tmp_path / "whole/labels/4").iterdir())
    for path in paths:
        image = next(images[i].image for i, item in enumerate(images.items) if item.name == path.stem)
        ours, frozen = (
            np.asarray(plain.scores({"encoder": one.params, "head": merged_head}, image[None])[0].argmax(-1))
            for one in (merged_encoder, encoder)
        )
        labels = read_png(path)
        assert (labels == ours).mean() > 0.999
        differs += (labels != frozen).mean() > 0.01
    assert paths and differs
    work = shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(work / "checkpoints/6")
    for ours, theirs in zip(jax.tree.leaves(train(work)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["null", "{method: weights, blocks: 1}"], ids=["frozen", "last block"])
def test_eight_devices_equal_one(train, tmp_path, tune):
    one, eight = (
        train(tmp_path / name, "steps=4", f"tune={tune}", f"mesh=[{mesh}]")
        for name, mesh in (("1", "1, 1"), ("8", "8, 1"))
    )
    for ours, theirs in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
