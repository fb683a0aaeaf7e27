"""CLOUDS' joint objective: against a torch rendering; the teacher's schedule; what the student sees."""

import copy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_diffusion import quickly
from torch_shaken import shaken

import fmda
from fmda import trees
from fmda.augment.photometric import ssd_amounts
from fmda.data import ClassList
from fmda.losses.masks import draw_points
from fmda.methods.clouds.objective import GREY, initial_aux, labeller_of, make_objective, teacher_decay
from fmda.methods.dense import normalised
from fmda.methods.mask_head import MaskHeadConfig, MaskNetwork
from fmda.train import OptimConfig, TrainState, create_state, make_optimizer, make_step

CLASSES = 4
HEAD = MaskHeadConfig(
    width=64, mask_width=16, heads=2, pixel_layers=1, pixel_hidden=24, layers=1, hidden=40, queries=6, points=40,
    ignore="negative",
)  # fmt: skip


def stub():
    """A network whose loss is the distance of a parameter to the mean of what it sees, which it returns too."""

    def loss(params, batch, key):
        image = batch["image"]
        return jnp.square(params["head"]["w"] - image.mean() / 255).sum(), {"seen": image}

    return types.SimpleNamespace(loss=loss)


def batch_of(generated):
    image = np.random.default_rng(0).integers(0, 256, (len(generated), 8, 8, 3))
    labels = np.zeros((len(generated), 8, 8), np.uint8)
    return {"image": jnp.asarray(image), "labels": jnp.asarray(labels), "generated": jnp.asarray(generated)}


def test_the_teacher_and_the_labels_change_on_their_schedules_alone():
    head = {"w": jnp.full(3, 2.0)}
    optim = make_optimizer(OptimConfig(method="sgd", learning_rate=0.02, schedule="constant"), 9)
    objective = make_objective(stub(), check_every=3, moved=0.1)
    decay = teacher_decay(0.5, 2)
    step = jax.jit(make_step(objective, optim, teacher_decay=decay, teacher_when="before"))
    state = create_state(head, optim, aux=initial_aux(head))
    np.testing.assert_array_equal(state.teacher["w"], head["w"])
    assert labeller_of(state)[0] == 0 and labeller_of(state)[1] is state.teacher
    students, teachers, versions = [state.params["w"]], [state.teacher["w"]], []
    for _ in range(7):
        state, metrics = step(state, {"encoder": {}}, batch_of([True, False]), jax.random.key(0))
        students.append(state.params["w"])
        teachers.append(state.teacher["w"])
        version, labeller = labeller_of(state)
        versions.append(version)
        np.testing.assert_array_equal(labeller["w"], teachers[version + 1])
    # averaged before steps 0, 2, 4, 6; the teacher is the student before step 0
    np.testing.assert_array_equal(teachers[1], head["w"])
    for place in (1, 3, 5):
        np.testing.assert_array_equal(teachers[place + 1], teachers[place] if place % 2 else None)
    for place in (2, 4, 6):
        np.testing.assert_allclose(teachers[place + 1], (teachers[place] + students[place]) / 2, rtol=1e-6)
    # at step 3 the teacher moved by less than a tenth, at step 6 by more
    assert versions == [0, 0, 0, 0, 0, 0, 6] and metrics["teacher_moved"] == 0
    assert metrics["generated"] == 0.5


def test_the_student_sees_jitter_and_of_generated_images_hidden_patches():
    head = {"w": jnp.zeros(3)}
    state = TrainState(jnp.int32(1), head, (), head, initial_aux(head))
    batch = batch_of([True, False])
    see = lambda batch, hidden, key: make_objective(  # noqa: E731
        stub(), check_every=2, moved=0.1, hidden=hidden, patch=4
    )(head, state, {"encoder": {}}, batch, jax.random.key(key))
    seen = see(batch, 0.0, 3).metrics["seen"]
    assert seen.min() >= 0 and seen.max() <= 255 and not np.allclose(seen, batch["image"])
    hidden = see(batch, 1.0, 3).metrics["seen"]
    assert (hidden[0] == GREY).all()
    np.testing.assert_array_equal(hidden[1], seen[1])
    # without generated images nothing is hidden
    source = see(batch | {"generated": jnp.zeros(2, bool)}, 1.0, 3)
    np.testing.assert_array_equal(source.metrics["seen"], seen)
    assert source.metrics["generated"] == 0 and np.isfinite(source.loss)


def test_jitter_is_that_of_ssd():
    order, amounts = ssd_amounts(jax.random.key(0), 400)
    assert {tuple(row) for row in order.tolist()} == {(0, 1, 2, 3), (0, 2, 3, 1)}
    np.testing.assert_allclose((order[:, 1] == 1).mean(), 0.5, atol=0.1)
    np.testing.assert_allclose((amounts != 0).mean(0), 0.5, atol=0.1)
    np.testing.assert_allclose(jnp.abs(amounts).max(0), [32 / 255, 0.5, 0.5, 0.1], rtol=0.05)


@pytest.mark.parity
def test_loss_and_gradients_equal_the_torch_rendering(tmp_path):
    import torch
    import torch_joint
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 1, 1], layer_type="bottleneck",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=64, mask_feature_size=16, hidden_dim=64, encoder_feedforward_dim=24,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=40, num_queries=6,
        num_labels=CLASSES,
    )  # fmt: skip
    peer = shaken(Mask2FormerForUniversalSegmentation(config))
    peer.save_pretrained(tmp_path / "peer")
    ours = fmda.load_mask2former(tmp_path / "peer")

    def maps(params, pixels):
        return nnx.merge(ours.graphdef, ours.params | {"encoder": params}).encoder.stages(normalised(pixels))

    encoder = types.SimpleNamespace(params=ours.params["encoder"], maps=maps)
    network = MaskNetwork(encoder, HEAD, ClassList([f"class {k}" for k in range(CLASSES)]))
    # a source image, and a generated one with refined masks of two classes and a hole
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    labels = rng.integers(0, CLASSES, (2, 8, 8)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
    labels[1] = 255
    labels[1, 8:40, :24], labels[1, 30:60, 30:] = 1, 3
    batch = {"image": image, "labels": labels, "generated": np.array([False, True])}
    head, key = ours.params["head"], jax.random.key(5)
    state = TrainState(jnp.int32(0), head, (), head, initial_aux(head))
    objective = make_objective(network, check_every=100, moved=0.0)

    def run(head):
        def loss(head):
            outcome = objective(head, state, {"encoder": encoder.params}, batch, key)
            return outcome.loss, outcome.metrics

        return jax.value_and_grad(loss, has_aux=True)(head)

    (loss, metrics), slopes = quickly(run, head)
    assert metrics["non_finite"] == 0

    jitter_key, _, loss_key = jax.random.split(key, 3)
    match_key, point_key = jax.random.split(loss_key)
    rule = network._loss
    draws = []
    for shared, drawn in zip(jax.random.split(match_key, 2), jax.random.split(point_key, 2), strict=True):
        points = draw_points(drawn, (2, CLASSES), rule)
        parts = (jax.random.uniform(shared, (2, rule.points, 2)), *points)
        draws.append(tuple(torch.tensor(np.asarray(part)) for part in parts))
    pixels = normalised(torch_joint.jittered(image, *map(np.asarray, ssd_amounts(jitter_key, 2))))
    out = peer.model(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
    classes = [peer.class_predictor(x.transpose(0, 1)) for x in out.transformer_decoder_intermediate_states]
    theirs = torch_joint.joint_loss(classes, out.masks_queries_logits, labels, draws, rule.uncertain)
    assert abs(float(loss) / theirs.item() - 1) < 1e-4
    theirs.backward(retain_graph=True)
    # gradients under our names: they are saved and loaded as if they were weights
    copied = copy.deepcopy(peer)
    for (name, parameter), other in zip(peer.named_parameters(), copied.parameters(), strict=True):
        other.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert parameter.grad is not None or "encoder" in name or name.startswith("criterion"), name
    copied.save_pretrained(tmp_path / "gradients")
    expected = trees.flatten(fmda.load_mask2former(tmp_path / "gradients").params["head"])
    for path, slope in trees.flatten(slopes).items():
        # a bias of keys has no gradient but rounding
        scale = max(np.abs(expected[path]).max(), 1e-3)
        assert np.abs(np.asarray(slope) - expected[path]).max() < 1e-4 * scale, path
    # faulty twin: pixels that no mask covers are ignored where the released code counts them as negative
    twin = torch_joint.joint_loss(classes, out.masks_queries_logits, labels, draws, rule.uncertain, ignored=True)
    assert abs(float(loss) / twin.item() - 1) > 1e-3
