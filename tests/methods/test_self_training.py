"""Self-training: three whole steps against a plain torch rendering, with faulty twins; small pieces by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_self_training import (
    CLASSES,
    MIT,
    SETTINGS,
    THINGS,
    Peer,
    apart,
    first_losses,
    losses_apart,
    moved_apart,
    our_run,
    stored_names,
    torch_run,
)  # fmt: skip
from torch_shaken import shaken

from fmda.losses.pixelwise import pseudo_labels
from fmda.methods.dense import normalised
from fmda.methods.uda import self_training
from fmda.methods.uda.objective import DistanceConfig, LearnConfig
from fmda.methods.uda.self_training import (
    SelfTrainingConfig,
    initial_aux,
    inside_border,
    pseudo_weights,
    running_shares,
)
from fmda.models.module import assembled
from fmda.models.segformer import SegFormerConfig
from fmda.nn.resize import resize
from fmda.weights import segformer

STEPS = 3
PLAIN = LearnConfig(SelfTrainingConfig(threshold=0.968))
WHOLE = LearnConfig(SelfTrainingConfig(ignored_rows=(3, 10), masked=1.0), DistanceConfig(0.5, THINGS))


def test_the_teacher_keeps_nothing_at_first_and_then_more_and_more():
    shares = [float(self_training.teacher_decay(0.9)(jnp.int32(step))) for step in (0, 1, 3, 8, 9, 20)]
    assert shares == pytest.approx([0, 1 / 2, 3 / 4, 8 / 9, 0.9, 0.9])


def test_rows_without_weight_by_hand():
    weights = pseudo_weights(jnp.float32(0.5), (2, 6, 3), (1, 2))
    np.testing.assert_array_equal(weights[1, :, 2], [0, 0.5, 0.5, 0.5, 0, 0])


def test_the_border_of_a_frame_by_hand():
    # the crop at the top and the right of its frame, and one at the left
    inside = inside_border(jnp.array([[0, 6, 2, 0], [3, 3, 0, 2]]), (4, 5), (1, 5, 3, 2))
    expected = np.zeros((2, 4, 5), bool)
    expected[0, 1:, 1:3] = expected[1, :2, 3:] = True
    np.testing.assert_array_equal(inside, expected)


def test_shares_are_a_plain_mean_at_first_and_then_a_running_one():
    shares = initial_aux({}, 3)["shares"]
    shares = running_shares(shares, jnp.array([[[0, 0], [0, 1]]]), jnp.int32(0))
    np.testing.assert_allclose(shares, [0.75, 0.25, 0])
    shares = running_shares(shares, jnp.array([[[1, 1], [1, 1]]]), jnp.int32(1))
    np.testing.assert_allclose(shares, [0.375, 0.625, 0])
    shares = running_shares(shares, jnp.array([[[2, 2], [2, 1]]]), jnp.int32(500))
    np.testing.assert_allclose(shares, [0.37125, 0.62125, 0.0075], rtol=1e-5)


def test_the_defaults_are_those_of_the_paper():
    config, rate = SelfTrainingConfig(), self_training.Optimizer()
    found = (config.decay, config.threshold, config.jitter, config.strength, config.blur, config.masked)
    assert found == (0.999, 0.968, 0.8, 0.2, 0.5, 0)
    assert (rate.learning_rate, rate.power, rate.warmup_steps, rate.weight_decay) == (6e-5, 1, 1500, 0.01)


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    import torch
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    network, other = (SegformerForSemanticSegmentation(SegformerConfig(**SETTINGS)) for _ in range(2))
    for seed, one in enumerate((network, other)):
        shaken(one, seed).decode_head.classifier.weight.detach().mul_(12)  # some pixels must be confident
    return Peer(
        network,
        other,
        logits=lambda network, images: network(images).logits,
        seen=lambda network, images: [(network(images).logits, slice(None), slice(None), 1)],
        features=lambda encoder, images: encoder(images).last_hidden_state,
        family="segformer",
        config=SegFormerConfig(MIT, 12, CLASSES, dropout=0.0),
        table=segformer.TABLE,
        names=stored_names(network, tmp_path_factory.mktemp("peer")),
        side=64,
    )


@pytest.fixture(scope="module")
def theirs(peer):
    return torch_run(peer, PLAIN, STEPS)[0]


@pytest.mark.parity
@pytest.mark.parametrize("learn", [PLAIN, WHOLE], ids=["plain", "whole"])
def test_three_steps_equal_the_torch_rendering(peer, learn):
    theirs = torch_run(peer, learn, STEPS)
    assert all(0.05 < row["confident"] < 0.95 for row in theirs[0])
    ours = our_run(peer, learn, STEPS)
    assert max(*apart(ours, theirs), *moved_apart(ours, theirs)) < 1e-4
    if learn == PLAIN:  # faulty twin: the average is taken after the step
        late = our_run(peer, learn, STEPS, "after")
        assert losses_apart(late[0], theirs[0]) > 1e-3 and moved_apart(late, theirs)[1] > 1e-3


def running_statistics(graphdef, state, images):
    teacher = assembled(graphdef, state.teacher, state.aux["statistics"])
    return resize(teacher(normalised(images)), images.shape[1:3])


def dropping(graphdef, state, images):
    module = assembled(graphdef, state.teacher, state.aux["statistics"], batch_statistics=True)
    module.head.dropout = 0.5
    return resize(module(normalised(images), jax.random.key(1)), images.shape[1:3])


def weight_per_image(logits, threshold):
    labels, _ = pseudo_labels(logits, threshold)
    confident = jax.nn.softmax(logits, -1).max(-1) >= threshold
    return labels, confident.mean((1, 2), keepdims=True)


TWINS = {
    "teacher by running statistics": ("teacher_logits", running_statistics),
    "teacher in training": ("teacher_logits", dropping),
    "weight of each image": ("pseudo_labels", weight_per_image),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", TWINS)
def test_faulty_twins_are_noticed(peer, theirs, name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_training, *TWINS[name])
        assert losses_apart([first_losses(peer, PLAIN)], theirs) > 1e-3
