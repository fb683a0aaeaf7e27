"""The self-supervised trainer: views and masks, the step by hand, a run from images to a teacher that loads."""

import json
import shutil
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fmda.data.streams import Stream
from fmda.errors import UserError
from fmda.methods.kinds import open_run
from fmda.methods.pretrain.dino import Config, ModelConfig, plan, stages
from fmda.methods.pretrain.dino_check import agreement, object_overlap
from fmda.methods.pretrain.dino_net import (
    DistillConfig,
    HeadConfig,
    Pupil,
    initial_centres,
    make_objective,
    momentum_schedule,
    normalised,
)
from fmda.methods.pretrain.dino_views import ImageFolders, ViewConfig, Views, block_mask, random_crop, random_square
from fmda.models.dino import vit_config
from fmda.models.module import abstract, init
from fmda.perf.flops import count_flops
from fmda.runs.stages import run_stages
from fmda.train import OptimConfig, Task, TrainerConfig, create_state, make_step, run_task
from fmda.weights.load import load_dino
from fmda.world.names import CLASSES

HEAD = HeadConfig(16, 8, 24)
VIT = vit_config(8, 16, layers=1, heads=2, mlp_width=32, image_size=16)
VIEWS = ViewConfig(size=16, local_size=8, locals=2)


def drawn(folder, count=6):
    """A folder in the layout of rendered images: sky over road, a car in the middle."""
    rng = np.random.default_rng(0)
    for part in ("images", "labels", "instances"):
        (folder / part).mkdir(parents=True)
    for index in range(count):
        labels = np.full((48, 96), CLASSES.index("sky"), np.uint8)
        labels[24:] = CLASSES.index("road")
        labels[20:34, 30:60] = CLASSES.index("car")
        image = (labels[..., None] * np.array([9, 5, 3]) + rng.integers(0, 30, (48, 96, 3))).astype(np.uint8)
        for part, pixels in (("images", image), ("labels", labels), ("instances", labels.astype(np.uint16))):
            cv2.imwrite(str(folder / part / f"{index:06}.png"), pixels)
    rows = [{"name": f"{index:06}", "facts": {}} for index in range(count)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def small(root, **changes):
    given = dict(
        data=(str(root),), model=ModelConfig(8, 16, 1, 2, 32), head=HEAD, views=VIEWS, steps=4, batch=8, check_size=32,
        distill=DistillConfig(warmup_steps=2, freeze_steps=1), log_every=2, save_steps=2,
        optim=OptimConfig(learning_rate=1e-3),
    )  # fmt: skip
    return Config(**(given | changes))


def example_batch(rows=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "globals": rng.integers(0, 255, (rows, 2, 16, 16, 3), dtype=np.uint8),
        "locals": rng.integers(0, 255, (rows, 2, 8, 8, 3), dtype=np.uint8),
        "masks": rng.random((rows, 2, 4)) < 0.4,
    }


def pupil(rngs):
    return Pupil(VIT, HEAD, rngs=rngs)


def step_and_start(config=DistillConfig(), steps=4, tx=None):  # noqa: B008
    tx = tx or optax.sgd(0.1)
    objective = make_objective(abstract(pupil)[0], config)
    step = make_step(objective, tx, teacher_decay=momentum_schedule(config.teacher_momentum, steps))
    return step, lambda key: create_state(init(pupil, key), tx, aux=initial_centres(HEAD.prototypes))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 0.5, 1.0])
def test_masks_hide_the_share_asked_for(share):
    masks = [block_mask(8, share, np.random.default_rng(seed)) for seed in range(10)]
    assert {int(mask.sum()) for mask in masks} == {round(share * 64)}


def test_masks_are_blocks():
    def lonely(mask):
        padded = np.pad(mask, 1)
        near = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
        return (mask & ~near).sum() / mask.sum()

    blocks = np.mean([lonely(block_mask(8, 0.3, np.random.default_rng(seed))) for seed in range(50)])
    scattered = np.mean([lonely(np.random.default_rng(seed).random((8, 8)) < 0.3) for seed in range(50)])
    assert blocks < 0.05 < scattered


def test_views_have_their_sizes_and_repeat_with_the_generator():
    image = np.random.default_rng(1).integers(0, 255, (48, 96, 3), dtype=np.uint8)
    first, second = (Views(VIEWS, 2)(image, np.random.default_rng(7)) for _ in range(2))
    assert first["globals"].shape == (2, 16, 16, 3) and first["locals"].shape == (2, 8, 8, 3)
    assert first["globals"].dtype == first["locals"].dtype == np.uint8
    assert first["masks"].shape == (2, 4) and first["masks"].dtype == bool
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_crops_lie_inside_and_squares_are_square():
    ramp = np.arange(48 * 96).reshape(48, 96, 1).repeat(3, 2)
    rng = np.random.default_rng(0)
    squares = [random_square(ramp, (0.5, 1.0), rng) for _ in range(50)]
    assert all(s.shape[0] == s.shape[1] and 24 <= len(s) <= 48 for s in squares)
    flat = np.full((48, 96, 3), 77, np.uint8)
    assert all((random_crop(flat, 16, (0.1, 1.0), 4 / 3, rng) == 77).all() for _ in range(20))


def test_momentum_rises_from_its_start_to_one_as_a_cosine():
    momentum = momentum_schedule(0.9, 100)
    found = [float(momentum(step)) for step in (0, 50, 100, 200)]
    assert found == pytest.approx([0.9, 0.95, 1.0, 1.0])


def test_a_masked_patch_is_not_seen_and_keeps_its_place():
    params = init(pupil, jax.random.key(0))
    net = jax.jit(lambda *seen: nnx.merge(abstract(pupil)[0], params)(*seen))
    plain = jax.jit(lambda seen: nnx.merge(abstract(pupil)[0], params).backbone(seen))
    pixels = jnp.asarray(np.random.default_rng(0).normal(size=(1, 16, 16, 3)), jnp.float32)
    hidden = jnp.array([[True, False, False, False]])
    other = pixels.at[:, :8, :8].set(3.0)
    np.testing.assert_array_equal(net(pixels, hidden), net(other, hidden))
    assert not np.allclose(net(pixels, hidden), net(pixels, hidden[:, ::-1]), atol=1e-3)
    nothing = jnp.zeros((1, 4), bool)
    np.testing.assert_allclose(net(pixels, nothing), net(pixels), atol=1e-6)
    np.testing.assert_allclose(net(pixels)[:, 0], plain(pixels), atol=1e-6)


def test_the_step_is_what_numpy_says():
    config = DistillConfig(koleo_weight=0.0, warmup_steps=2, freeze_steps=0, teacher_momentum=0.8)
    step, start = step_and_start(config)
    # the teacher differs from the student, the step is one in the middle of the warm-up
    state, other = start(jax.random.key(0)), init(pupil, jax.random.key(1))
    centre = {"views": jnp.linspace(-0.1, 0.1, 24), "patches": jnp.linspace(0.2, 0.0, 24)}
    state = state._replace(step=jnp.int32(1), teacher=other, aux=centre)
    batch = example_batch()
    after, metrics = jax.jit(step)(state, {}, batch, jax.random.key(9))

    def logits(params, pixels, masked=None):
        def read(params, pixels, masked):
            net = nnx.merge(abstract(pupil)[0], params)
            return net.head(net(normalised(pixels), masked))

        return np.asarray(jax.jit(read)(params, pixels.reshape(-1, *pixels.shape[2:]), masked), np.float64)

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    masked = batch["masks"].reshape(16, 4)
    raw_logits = logits(other, batch["globals"])
    student = logits(state.params, batch["globals"], masked)
    local = logits(state.params, batch["locals"])[:, 0].reshape(8, 2, 24)
    views = raw_logits[:, 0].reshape(8, 2, 24)
    temperature = (0.04 + 0.07) / 2
    targets = softmax((views - np.asarray(centre["views"])) / temperature)
    log_predictions = np.log(softmax(np.concatenate([student[:, 0].reshape(8, 2, 24), local], 1) / 0.1))
    pairs = [(t, s) for t in range(2) for s in range(4) if t != s]
    view = np.mean([-(targets[:, t] * log_predictions[:, s]).sum(-1).mean() for t, s in pairs])
    patch_targets = softmax((raw_logits[:, 1:] - np.asarray(centre["patches"])) / temperature)
    each = -(patch_targets * np.log(softmax(student[:, 1:] / 0.1))).sum(-1)
    patch = np.mean([row[hidden].mean() for row, hidden in zip(each, masked, strict=True) if hidden.any()])
    assert float(metrics["view_loss"]) == pytest.approx(view, rel=1e-4)
    assert float(metrics["patch_loss"]) == pytest.approx(patch, rel=1e-4)
    assert float(metrics["loss"]) == pytest.approx(view + patch, rel=1e-4)
    moved = after.aux
    np.testing.assert_allclose(moved["views"], 0.9 * centre["views"] + 0.1 * views.mean((0, 1)), atol=1e-6)
    patch_logits = raw_logits[:, 1:].mean((0, 1))
    np.testing.assert_allclose(moved["patches"], 0.9 * centre["patches"] + 0.1 * patch_logits, atol=1e-6)
    keep = float(momentum_schedule(0.8, 4)(1))
    new, old, mixed = (t["backbone"]["patch"]["kernel"] for t in (after.params, other, after.teacher))
    np.testing.assert_allclose(mixed, keep * old + (1 - keep) * new, atol=1e-6)
    assert int(after.step) == 2 and not np.array_equal(new, state.params["backbone"]["patch"]["kernel"])


def test_prototypes_wait_until_they_may_move():
    step, start = step_and_start(DistillConfig(freeze_steps=1))
    state = start(jax.random.key(0))
    prototypes = [np.asarray(state.params["head"]["prototypes"])]
    for _ in range(2):
        state, _ = jax.jit(step)(state, {}, example_batch(), jax.random.key(0))
        prototypes.append(np.asarray(state.params["head"]["prototypes"]))
    np.testing.assert_array_equal(prototypes[0], prototypes[1])
    assert not np.array_equal(prototypes[1], prototypes[2])


def test_weight_zero_switches_a_loss_off():
    step, start = step_and_start(DistillConfig(patch_weight=0.0, koleo_weight=0.0))
    state, metrics = jax.jit(step)(start(jax.random.key(0)), {}, example_batch(), jax.random.key(0))
    assert "patch_loss" not in metrics and "koleo" not in metrics
    assert float(metrics["loss"]) == float(metrics["view_loss"])
    assert not np.asarray(state.params["mask_token"]).any()


@pytest.mark.slow
def test_eight_devices_train_like_one(tmp_path):
    rows = example_batch(48)
    source = [{name: leaf[index] for name, leaf in rows.items()} for index in range(48)]

    def trained(mesh, folder):
        task = Task(
            name="dino",
            objective=make_objective(abstract(pupil)[0], DistillConfig()),
            init=lambda key: init(pupil, key),
            optim=OptimConfig(method="sgd", learning_rate=0.05, schedule="constant"),
            streams=Stream(source, None, 16),
            aux=initial_centres(HEAD.prototypes),
            teacher_decay=momentum_schedule(0.99, 3),
        )
        return run_task(task, TrainerConfig(steps=3, batch=16, seed=2, mesh=mesh), folder)

    one, eight = trained((1, 1), tmp_path / "one"), trained((4, 2), tmp_path / "eight")
    assert jax.device_count() == 8
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run on drawn images: (its configuration, the folders of its stages)."""
    place = tmp_path_factory.mktemp("dino")
    config = small(drawn(place / "photo"), held=(str(place / "photo"),))
    return config, run_stages(stages(config), place / "work", config, lambda _: None)


@pytest.mark.slow
def test_a_run_ends_in_a_teacher_that_loads(finished):
    config, done = finished
    teacher = load_dino(done["export"])
    assert teacher.config == config.vit
    assert teacher.last_layer(np.zeros((1, 32, 24, 3), np.float32)).shape == (1, 4, 3, 16)
    assert json.loads((done["export"] / "training.json").read_text())["last"]["step"] == 4
    scores = json.loads((done["check"] / "patches.json").read_text())[config.held[0]]
    assert set(scores) == {"raw pixels", "values"}
    assert all(0.0 <= value <= 1.0 for row in scores.values() for value in row.values())


@pytest.mark.slow
def test_an_interrupted_run_ends_in_the_same_bytes(finished, tmp_path):
    config, done = finished
    work = shutil.copytree(done["train"].parent, tmp_path / "work")
    shutil.rmtree(work / "train/checkpoints/4")
    for name in ("train", "export", "check"):
        (work / name / "stage.json").unlink()
    (work / "export/model.safetensors").unlink()
    again = run_stages(stages(config), work, config, lambda _: None)
    one, two = (folders["export"] / "model.safetensors" for folders in (done, again))
    assert one.read_bytes() == two.read_bytes() and (work / "train/checkpoints/4").is_dir()


def test_flops_of_the_plan_are_those_of_the_step():
    config = small("anywhere", views=VIEWS, distill=DistillConfig(), batch=8)
    step, start = step_and_start(config.distill)
    state = jax.eval_shape(start, jax.random.key(0))
    counted = count_flops(step, state, {}, jax.eval_shape(lambda: example_batch(8)), jax.random.key(0)) / 8
    assert dict(plan(config).flops)["one image in training"] == counted


@pytest.mark.parametrize("name", ["street-dino", "street-dinoiser"])
def test_published_configurations_open(name):
    run = open_run(Path(__file__).parents[2] / f"configs/pretrain/{name}.yaml")
    assert [stage.name for stage in run.stages()] == ["train", "export", "check"]
    assert run.plan().text().startswith("stages")


def test_agreement_by_hand():
    # two images of four patches; the first feature tells the class, one patch is of no class
    classes = np.array([[0, 0, 1, 255], [0, 1, 1, 0]], np.uint8)
    features = np.where(classes[..., None] == 1, [[[0.0, 1.0]]], [[[1.0, 0.0]]])
    found = agreement(features, classes, (0.5,), share=0.2)
    assert found["same"] == pytest.approx(3 / 9) and found["alike>0.5"] == pytest.approx(3 / 9)
    assert found["agree>0.5"] == found["agree_top"] == found["nearest"] == 1.0


def test_things_by_hand(tmp_path):
    root = str(drawn(tmp_path / "photo", 3))
    everything = lambda pixels: np.ones((len(pixels), 4, 4), bool)  # noqa: E731
    found = object_overlap(root, {"all": everything, "none": lambda p: ~everything(p)}, 32, 8, seed=0)
    assert 0.0 < found["share"] < 1.0 and found["all"] == pytest.approx(found["share"]) and found["none"] == 0.0


def test_faults_are_one_line(tmp_path):
    with pytest.raises(UserError, match="nowhere: no images there"):
        run_stages(stages(small(tmp_path / "nowhere")), tmp_path / "work", {}, lambda _: None)
    with pytest.raises(UserError, match="local_size: 12 is no multiple"):
        small(tmp_path, views=ViewConfig(size=16, local_size=12))
    with pytest.raises(UserError, match="heads: 3 do not divide"):
        small(tmp_path, model=ModelConfig(8, 16, 1, 3, 32))
    root = drawn(tmp_path / "photo", 1)
    (root / "images/000000.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match="000000.png"):
        ImageFolders([root])[0]


def test_a_broken_image_is_named_before_the_first_step(tmp_path):
    for name in "abc":
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.zeros((8, 8, 3), np.uint8))
    (tmp_path / ".hidden.png").write_bytes(b"")
    assert len(ImageFolders([tmp_path])) == 3
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 of 3 images cannot be used: .*b\.png: an empty file"):
        ImageFolders([tmp_path])
