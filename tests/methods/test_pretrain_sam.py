"""The small SAM's trainer: regions and prompts of scenes, squares of two images, a run from scenes to two graphs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_place import draw_scenes

from fmda import trees
from fmda.errors import UserError
from fmda.methods.pretrain import sam as trainer
from fmda.methods.pretrain.regions import PromptConfig, Prompts, noisy_box, region_map
from fmda.methods.pretrain.sam import Config, ModelConfig, encoder_weights, in_square, plan, pointed, stages
from fmda.models.sam import SamConfig, SamVitConfig
from fmda.runs.stages import run_stages
from fmda.sam import SamStage
from fmda.train import OptimConfig
from fmda.weights.load import load_dino, load_sam
from fmda.weights.network import network_graph
from fmda.weights.sam_export import export_sam

MODEL = ModelConfig(
    image_size=64, patch_size=8, width=16, layers=1, heads=2, mlp_width=32, whole=(0,), channels=16, decoder_heads=2,
    decoder_mlp_width=16, iou_width=16,
)  # fmt: skip


def scene(height=32, width=64):
    """Road below and sky above, parted by a car; a second car; pixels of no class; a spot of road in the sky."""
    labels, instances = np.zeros((height, width), np.uint8), np.zeros((height, width), np.uint16)
    labels[:16] = 10
    labels[:, 30:34] = 13
    instances[:, 30:34] = 3
    labels[20:24, 40:48] = 13
    instances[20:24, 40:48] = 7
    labels[28:, :8] = 255
    labels[2, 2] = 0
    return {"image": np.zeros((height, width, 3), np.uint8), "labels": labels, "instances": instances}


def test_regions_are_things_and_connected_parts_of_classes():
    one = scene()
    numbers = region_map(one["labels"], one["instances"], least=4)
    assert numbers.max() == 6  # two cars, two roads, two skies
    assert not numbers[28:, :8].any() and numbers[2, 2] == 0
    for mask in (one["instances"] == 3, one["instances"] == 7):
        assert len(np.unique(numbers[mask])) == 1
    assert numbers[18, 0] != numbers[18, 63] and numbers[0, 0] != numbers[0, 63] and numbers[0, 0] == numbers[15, 29]
    assert region_map(one["labels"], one["instances"], least=33).max() == 5


def test_first_prompts_lie_on_their_region_or_are_its_box():
    one, config = scene(), PromptConfig(count=64, least=4, boxes=0.5, noise=0.0)
    example = Prompts(config, 64, 2)(one, np.random.default_rng(0))
    kinds = set()
    for mask, points, labels in zip(example["masks"], example["points"], example["labels"], strict=True):
        kinds.add(tuple(labels.tolist()))
        if labels[0] == 1:
            x, y = points[0].astype(int)
            assert mask[y // 2, x // 2] and labels[1] == -1 and not points[1].any()
        else:
            rows, columns = np.nonzero(mask)
            # cells of two pixels: the box in pixels begins with a cell and ends with one
            assert points.tolist() == [[2 * columns.min(), 2 * rows.min()], [2 * columns.max() + 1, 2 * rows.max() + 1]]
    assert kinds == {(1, -1), (2, 3)} and example["masks"].shape == (64, 16, 32)
    areas = example["masks"].sum((1, 2))
    assert (areas == 8).any() and (areas == 32).any()


def test_larger_scenes_are_halved_with_their_prompts():
    one, config = scene(), PromptConfig(count=4, least=4)
    whole, half = (Prompts(config, size, 2)(one, np.random.default_rng(3)) for size in (64, 32))
    assert half["image"].shape == (16, 32, 3) and half["masks"].shape == (4, 8, 16)
    np.testing.assert_array_equal(half["points"], whole["points"] / 2)
    np.testing.assert_array_equal(half["masks"], whole["masks"].reshape(4, 8, 2, 16, 2).mean((2, 4)) >= 0.5)


def test_boxes_are_moved_by_a_tenth_of_their_sides_inside_the_image():
    mask = np.zeros((100, 200), bool)
    mask[40:60, 50:150] = True
    boxes = np.array([noisy_box(mask, PromptConfig(), np.random.default_rng(seed)) for seed in range(400)])
    np.testing.assert_allclose(boxes.mean(0), [[50, 40], [149, 59]], atol=2)
    np.testing.assert_allclose(boxes.std(0), [[10, 2]] * 2, rtol=0.15)
    far = np.array([noisy_box(mask, PromptConfig(noise=9.0), np.random.default_rng(seed)) for seed in range(50)])
    assert np.abs(far - [[50, 40], [149, 59]]).max() == 20


def test_images_that_fill_no_square_are_one_line():
    with pytest.raises(UserError, match="data: an image is 64x32; give images as wide as 128"):
        Prompts(PromptConfig(), 128, 2)(scene(), np.random.default_rng(0))


def test_masks_of_stacked_images_lie_at_their_place():
    masks = np.random.default_rng(0).random((4, 3, 2, 4)) < 0.5
    placed = np.asarray(in_square(jnp.asarray(masks), 2))
    assert placed.shape == (2, 6, 4, 4)
    for image in range(4):
        square, row = divmod(image, 2)
        for prompt in range(3):
            own = placed[square, 3 * row + prompt]
            np.testing.assert_array_equal(own[2 * row : 2 * row + 2], masks[image, prompt])
            assert own.sum() == masks[image, prompt].sum()


class Recorder:
    """Stands in for the network: answers with the target's complement once, then with the target, and notes prompts."""

    def __init__(self, target):
        self.target, self.calls = target, []
        self.config = SamConfig(SamVitConfig(image_size=64, patch_size=8))

    def encode(self, pixels):
        self.pixels = np.asarray(pixels)
        return jnp.zeros((len(pixels), 8, 8, 4))

    def decode_labelled(self, embedding, points, labels, masks=None):
        self.calls.append((np.asarray(points), np.asarray(labels), None if masks is None else np.asarray(masks)))
        mask = self.target if len(self.calls) > 1 else ~self.target
        logits = jnp.where(jnp.asarray(mask), 9.0, -9.0)[:, :, None]
        return jnp.repeat(logits, 4, axis=2), jnp.zeros((*labels.shape[:2], 4))


def test_zeros_fill_the_square_of_an_image_that_is_left_over(monkeypatch):
    row = Prompts(PromptConfig(count=3, least=4), 64, 2)(scene(), np.random.default_rng(0))
    batch = {name: values[None] for name, values in row.items()}
    target = np.concatenate([np.asarray(in_square(jnp.asarray(np.repeat(batch["masks"], 2, 0)), 2))[:, :3]] * 2, 1)
    recorder = Recorder(target)
    monkeypatch.setattr(trainer.nnx, "merge", lambda graphdef, params: recorder)
    outcome = trainer.make_objective(None, PromptConfig(count=3), 0.0)({}, None, {}, batch, jax.random.key(0))
    assert recorder.pixels.shape == (1, 64, 64, 3) and not recorder.pixels[0, 32:].any()
    # what is answered to the prompts of no image does not count
    assert float(outcome.metrics["last"]) == 1


@pytest.mark.parametrize("alone", [0.0, 1.0])
def test_each_round_adds_a_point_where_the_answer_was_wrong(monkeypatch, alone):
    config = PromptConfig(count=3, least=4, rounds=3)
    rows = [Prompts(config, 64, 2)(scene(), np.random.default_rng(seed)) for seed in (0, 1)]
    for row in rows:
        row["image"] = np.full_like(row["image"], 255)
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    recorder = Recorder(np.asarray(in_square(jnp.asarray(batch["masks"]), 2)))
    monkeypatch.setattr(trainer.nnx, "merge", lambda graphdef, params: recorder)
    outcome = trainer.make_objective(None, config, alone)({}, None, {}, batch, jax.random.key(0))
    first, second, third = recorder.calls
    # the second image of a square lies below the first one, or zeros do
    assert recorder.pixels.shape == (1, 64, 64, 3) and recorder.pixels[0, :32].min() > 2
    assert (recorder.pixels[0, 32:] == 0).all() == bool(alone)
    np.testing.assert_array_equal(first[0][0, :3], batch["points"][0])
    np.testing.assert_allclose(first[0][0, 3:, :, 1], batch["points"][1][..., 1] + 32, rtol=1e-6)
    assert first[2] is None and second[2] is None and third[2] is not None
    np.testing.assert_array_equal(third[2] > 0, recorder.target)
    for prompt in range(6):
        (x, y), label = second[0][0, prompt, 0], second[1][0, prompt, 0]
        assert (x % 2, y % 2) == (0.5, 0.5) and recorder.target[0, prompt, int(y) // 2, int(x) // 2] == bool(label)
        assert third[1][0, prompt].tolist() == [-1, label, *batch["labels"].reshape(6, 2)[prompt]]
    assert float(outcome.metrics["last"]) == 1 and float(outcome.metrics["point"]) < 0.5


def test_the_encoder_starts_as_the_dino_that_sees_each_window_alone():
    model = ModelConfig(whole=())
    graphdef, shapes = network_graph("sam", model.sam)
    sam = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    taken = trees.flatten(encoder_weights("street-dino", model))
    sam = trees.unflatten(trees.flatten(sam) | taken)
    dino, images = load_dino("street-dino"), np.random.default_rng(0).normal(size=(1, 128, 128, 3)).astype(np.float32)
    encoder = nnx.merge(graphdef, sam).encoder
    tokens = np.asarray(encoder.tokens(images))[0, 8:, :8]
    expected = np.asarray(nnx.merge(dino.graphdef, dino.params).tokens(images[:, 64:, :64]))[0, 1:].reshape(8, 8, 128)
    np.testing.assert_allclose(tokens, expected, atol=1e-5)
    # every block and nothing else but patches and positions
    assert len(taken) == 6 * 16 + 3 and set(taken) < set(trees.flatten(shapes))
    with pytest.raises(UserError, match="start: street-dino has other sizes than model"):
        encoder_weights("street-dino", MODEL)


def test_queries_between_prompts_and_image_start_as_the_keys():
    def layer(start):
        return {"query": {"kernel": start, "bias": 5.0}, "key": {"kernel": start + 1, "bias": 5.0}}

    block = {"self_attention": layer(1.0), "to_image": layer(3.0), "to_tokens": layer(5.0)}
    found = pointed({"decoder": {"final": layer(7.0), "blocks": {0: block}}})["decoder"]
    assert found["blocks"][0]["self_attention"] == layer(1.0)
    for key, one in ((4, found["blocks"][0]["to_image"]), (6, found["blocks"][0]["to_tokens"]), (8, found["final"])):
        assert one["query"] == one["key"] == {"kernel": pytest.approx(key * 2**0.25), "bias": 5.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ModelConfig(image_size=100)}, "model.image_size: 100 is no multiple of 8"),
        ({"model": ModelConfig(heads=5)}, "model.width: 128 is no multiple of 5"),
        ({"model": ModelConfig(patch_size=2)}, "model.patch_size: 2 is no multiple of 4"),
        ({"held": ("scenes",)}, "held: scenes is also in data"),
    ],
)
def test_values_that_cannot_be_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        Config(**({"data": ("scenes",)} | changes))


@pytest.mark.slow
def test_a_run_ends_in_a_checkpoint_that_exports_as_two_graphs(tmp_path):
    for folder in ("scenes", "held"):
        draw_scenes(tmp_path / folder, 4)
    config = Config(
        data=(str(tmp_path / "scenes"),), held=(str(tmp_path / "held"),), model=MODEL, steps=3, batch=8, log_every=1,
        prompts=PromptConfig(count=2, rounds=2), optim=OptimConfig(multipliers={"prompts/frequencies": 0.0}), seed=1,
    )  # fmt: skip
    assert dict(plan(config).parameters)["trained"] == trees.count(network_graph("sam", MODEL.sam)[1])
    done = run_stages(stages(config), tmp_path / "run", config, lambda _: None)
    lines = [json.loads(line) for line in (done["train"] / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(line["loss"] == pytest.approx(line["mask"] + line["score"]) for line in lines)
    checked = json.loads((done["check"] / "prompts.json").read_text())[str(tmp_path / "held")]
    assert set(checked) == {"point", "box", "last"} and all(0 <= value <= 1 for value in checked.values())
    sam = load_sam(done["export"])
    assert sam.config == config.model.sam and network_graph("sam", sam.config)[0] == sam.graphdef
    assert all(one.ok for one in export_sam(done["export"], tmp_path / "onnx"))
    assert SamStage(tmp_path / "onnx").embed(np.zeros((30, 40, 3), np.uint8)).arrays.shape == (1, 16, 8, 8)
