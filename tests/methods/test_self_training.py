"""Self-training: three whole steps against a plain torch rendering, with faulty twins; small pieces by hand."""

from contextlib import contextmanager
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fmda
from fmda import trees
from fmda.losses.pixelwise import pseudo_labels
from fmda.methods.dense import normalised
from fmda.methods.uda import self_training
from fmda.methods.uda.objective import DistanceConfig, LearnConfig, make_objective
from fmda.methods.uda.self_training import (
    DAFORMER_OPTIM,
    SelfTrainingConfig,
    initial_aux,
    pseudo_weights,
    running_shares,
)
from fmda.models.module import assembled, separated
from fmda.nn.resize import resize
from fmda.train.optim import make_optimizer
from fmda.train.step import create_state, make_step
from fmda.weights.network import save

CLASSES, SIDE, STEPS, CHOSEN, THINGS = 5, 64, 3, (0, 2, 255), (1, 3)
PLAIN = LearnConfig(SelfTrainingConfig(threshold=0.968))
WHOLE = LearnConfig(SelfTrainingConfig(ignored_rows=(3, 10), masked=1.0), DistanceConfig(0.5, THINGS))
# larger steps than DAFormer's, so that a wrong teacher shows, and an epsilon above the noise of vanishing gradients
OPTIM = replace(DAFORMER_OPTIM, learning_rate=2e-3, warmup_steps=2, eps=1e-4, weight_decay=0.1)


def test_the_teacher_keeps_nothing_at_first_and_then_more_and_more():
    shares = [float(self_training.teacher_decay(0.9)(jnp.int32(step))) for step in (0, 1, 3, 8, 9, 20)]
    assert shares == pytest.approx([0, 1 / 2, 3 / 4, 8 / 9, 0.9, 0.9])


def test_rows_without_weight_by_hand():
    weights = pseudo_weights(jnp.float32(0.5), (2, 6, 3), (1, 2))
    np.testing.assert_array_equal(weights[1, :, 2], [0, 0.5, 0.5, 0.5, 0, 0])


def test_shares_are_a_plain_mean_at_first_and_then_a_running_one():
    shares = initial_aux({}, 3)["shares"]
    shares = running_shares(shares, jnp.array([[[0, 0], [0, 1]]]), jnp.int32(0))
    np.testing.assert_allclose(shares, [0.75, 0.25, 0])
    shares = running_shares(shares, jnp.array([[[1, 1], [1, 1]]]), jnp.int32(1))
    np.testing.assert_allclose(shares, [0.375, 0.625, 0])
    shares = running_shares(shares, jnp.array([[[2, 2], [2, 1]]]), jnp.int32(500))
    np.testing.assert_allclose(shares, [0.37125, 0.62125, 0.0075], rtol=1e-5)


def test_the_defaults_are_those_of_the_paper():
    config, rate = SelfTrainingConfig(), self_training.DAFORMER_OPTIM
    found = (config.decay, config.threshold, config.jitter, config.strength, config.blur, config.masked)
    assert found == (0.999, 0.968, 0.8, 0.2, 0.5, 0)
    assert (rate.learning_rate, rate.power, rate.warmup_steps, rate.weight_decay) == (6e-5, 1, 1500, 0.01)


# what both sides use in place of random draws
def look(images):
    return 0.8 * images + 10


def hide(images):
    return images * (np.arange(SIDE) % 16 < 8).reshape(1, SIDE, 1, 1)


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        labels = rng.choice([0, 1, 2, 3, 4, 255], (2, SIDE // 32, SIDE // 32)).astype(np.uint8)
        labels = labels.repeat(32, 1).repeat(32, 2)
        labels[:, ::7, ::5] = 4
        images = rng.integers(0, 256, (2, 2, SIDE // 8, SIDE // 8, 3), dtype=np.uint8).repeat(8, 2).repeat(8, 3)
        yield {"source": {"image": images[0], "labels": labels}, "target": {"image": images[1]}}


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """Returns (torch network, torch encoder before training, the same network here, the encoder's arrays here)."""
    import torch
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    settings = SegformerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 3, 4], decoder_hidden_size=12,
        num_labels=CLASSES, drop_path_rate=0.0, classifier_dropout_prob=0.0, layer_norm_eps=1e-6,
    )  # fmt: skip
    torch.manual_seed(0)
    network, other = (SegformerForSemanticSegmentation(settings) for _ in range(2))
    with torch.no_grad():
        for one in (network, other):
            for name, value in [*one.named_parameters(), *one.named_buffers()]:
                if value.is_floating_point():
                    noise = torch.randn(value.shape)
                    value.add_(0.1 * (noise.abs() if name.endswith("running_var") else noise))
            one.decode_head.classifier.weight.mul_(12)  # some pixels must be confident
    folder = tmp_path_factory.mktemp("self-training")
    for name, one in (("student", network), ("other", other)):
        one.save_pretrained(folder / name)
    ours, encoder = (fmda.load_segmentation(folder / name) for name in ("student", "other"))
    return network, other.segformer, ours, encoder.params["encoder"]


@pytest.fixture(scope="module")
def theirs(peers):
    return torch_run(peers, PLAIN)[0]


def torch_run(peers, learn):
    """Returns (losses of each step, last gradients, parameters, teacher, running statistics), {name: array} each."""
    import copy

    import torch
    from torch.nn import functional as F

    config = learn.self_training
    student, frozen = copy.deepcopy(peers[0]).train(), peers[1].eval()
    start = {name: value.detach().clone() for name, value in student.named_parameters()}
    decayed = {name: not (name.startswith("segformer.") and "norm" in name) for name in start}
    groups = [
        {"params": [p], "weight_decay": OPTIM.weight_decay if decayed[name] else 0.0, "name": name}
        for name, p in student.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.learning_rate, betas=(0.9, 0.999), eps=OPTIM.eps)
    teacher, records = copy.deepcopy(student), []

    def pixels(image):
        mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
        return ((torch.as_tensor(image).float() - mean) / std).permute(0, 3, 1, 2)

    def up(x):
        return F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False)

    def weighted(logits, labels, weights):
        losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=255)
        return (losses * weights).mean()

    def distance(features, image, labels):
        with torch.no_grad():
            reference = frozen(pixels(image)).last_hidden_state
        hot = F.one_hot(torch.where(labels == 255, CLASSES, labels), CLASSES + 1).permute(0, 3, 1, 2).float()
        shares, best = F.avg_pool2d(hot, 32).max(1)
        kept = (shares >= 0.75) & torch.isin(best, torch.tensor(THINGS))
        assert kept.any() and not kept.all()
        return (features - reference).norm(dim=1)[kept].mean()

    for step, batch in enumerate(batches()):
        keep = min(1 - 1 / (step + 1), config.decay)
        with torch.no_grad():
            for average, current in zip(teacher.parameters(), student.parameters(), strict=True):
                average.mul_(keep).add_(current, alpha=1 - keep)
            probabilities = up(teacher(pixels(batch["target"]["image"])).logits).softmax(1)
        confidence, pseudo = probabilities.max(1)
        share = (confidence >= config.threshold).float().mean()
        weights = torch.ones(pseudo.shape) * share
        weights[:, : config.ignored_rows[0]] = 0
        weights[:, SIDE - config.ignored_rows[1] :] = 0

        labels = torch.as_tensor(batch["source"]["labels"]).long()
        out = student(pixels(batch["source"]["image"]), output_hidden_states=True)
        losses = {"source": weighted(up(out.logits), labels, torch.ones_like(weights))}
        if learn.distance:
            found = distance(out.hidden_states[-1], batch["source"]["image"], labels)
            losses["distance"] = learn.distance.weight * found
        inside = torch.isin(labels, torch.tensor(CHOSEN))
        images = (torch.as_tensor(batch[name]["image"]).float() for name in ("source", "target"))
        mixture = look(torch.where(inside[..., None], *images))
        mixed = (torch.where(inside, labels, pseudo), torch.where(inside, torch.ones_like(weights), weights))
        losses["mixed"] = weighted(up(student(pixels(mixture)).logits), *mixed)
        running = {name: value.clone() for name, value in student.named_buffers() if "running" in name}
        if config.masked:
            changed = pixels(look(torch.as_tensor(batch["target"]["image"]).float()))
            changed = torch.as_tensor(hide(changed.permute(0, 2, 3, 1).numpy())).float().permute(0, 3, 1, 2)
            losses["masked"] = config.masked * weighted(up(student(changed).logits), pseudo, weights)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        student.load_state_dict(running, strict=False)
        factor = (1 - step / 10) * (1 - (1 - step / 2) * (1 - 1e-6) if step < 2 else 1)
        for group in optimizer.param_groups:
            head = group["name"].startswith("decode_head")
            group["lr"] = OPTIM.learning_rate * factor * (10 if head else 1)
        optimizer.step()
        records.append({name: loss.item() for name, loss in losses.items()} | {"confident": share.item()})
    named = dict(student.named_parameters())
    gradients = {name: p.grad for name, p in named.items()}
    averages = {name: p.detach() - start[name] for name, p in teacher.named_parameters()}
    return records, gradients, {name: p.detach() - start[name] for name, p in named.items()}, averages, running


@contextmanager
def equal_draws():
    """Puts `look`, `hide` and `CHOSEN` in place of what is random."""
    with jax.default_matmul_precision("highest"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_training, "class_masks", lambda key, labels, *_, **__: jnp.isin(labels, jnp.array(CHOSEN)))
        patch.setattr(self_training, "strong_augmentation", lambda key, images, **_: look(images.astype(jnp.float32)))
        patch.setattr(self_training, "patch_masked", lambda key, images, **_: hide(images))
        yield


def pieces(peers, config):
    """Returns (objective, frozen arrays, parameters, running statistics) of the network here."""
    network = replace(peers[2], config=replace(peers[2].config, dropout=0.0))
    params, statistics = separated(network.graphdef, network.params)
    objective = make_objective(network.graphdef, CLASSES, config)
    return objective, {"encoder": peers[3]}, params, initial_aux(statistics, CLASSES)


def our_run(peers, config, folder, when="before"):
    """Returns what `torch_run` does, under its names."""
    from transformers import SegformerForSemanticSegmentation

    objective, frozen, params, aux = pieces(peers, config)
    keep = optax.GradientTransformation(lambda tree: tree, lambda updates, state, params: (updates, updates))
    tx = optax.chain(keep, make_optimizer(OPTIM, 10))
    step = make_step(
        objective, tx, teacher_decay=self_training.teacher_decay(config.self_training.decay), teacher_when=when
    )
    state, records = create_state(params, tx, aux=aux), []
    with equal_draws():
        step = jax.jit(step)
        for batch in batches():
            state, metrics = step(state, frozen, batch, jax.random.key(0))
            records.append({name.removeprefix("loss_"): float(value) for name, value in metrics.items()})

    def named(tree):
        whole = trees.unflatten(trees.flatten(tree) | trees.flatten(state.aux["statistics"]))
        save("segformer", folder, peers[2].config, whole)
        return SegformerForSemanticSegmentation.from_pretrained(folder).state_dict()

    assert float(state.aux["shares"].sum()) == pytest.approx(1) and float(state.aux["shares"].max()) < 0.99

    def moved(tree):
        return named(jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), tree, params))

    parameters = moved(state.params)
    return records, named(state.opt[0]), parameters, moved(state.teacher), parameters


def losses_apart(ours, theirs):
    return max(
        abs(a[name] - value) / abs(value) for a, b in zip(ours, theirs, strict=False) for name, value in b.items()
    )


def apart(ours, theirs):
    """Returns the largest relative deviations (of losses, of gradients, of parameters, teacher and statistics)."""

    def arrays(ours, theirs, rounding=0.0):
        scale = max(float(value.abs().max()) for value in theirs.values())
        pairs = ((ours[name], value) for name, value in theirs.items())
        return max(float(((a - b).abs().max() - rounding) / max(b.abs().max(), 1e-2 * scale)) for a, b in pairs)

    def moved(ours, theirs):
        # Biases in front of a norm or of all keys have no gradient but rounding errors, which AdamW enlarges.
        meant = {name: value for name, value in theirs.items() if gradients[name].abs().max() > 1e-6}
        assert len(theirs) - len(meant) < 12
        return arrays(ours, meant, rounding=2.5e-7)  # of parameters around 1

    (_, gradients, parameters, teacher, statistics) = theirs
    return (
        losses_apart(ours[0], theirs[0]), arrays(ours[1], gradients), moved(ours[2], parameters),
        moved(ours[3], teacher), arrays(ours[4], statistics),
    )  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("config", [PLAIN, WHOLE], ids=["plain", "whole"])
def test_three_steps_equal_the_torch_rendering(peers, config, tmp_path):
    theirs = torch_run(peers, config)
    assert all(0.05 < row["confident"] < 0.95 for row in theirs[0])
    found = apart(our_run(peers, config, tmp_path), theirs)
    assert max(found) < 1e-4
    if config == PLAIN:  # faulty twin: the average is taken after the step
        found = apart(our_run(peers, config, tmp_path, "after"), theirs)
        assert found[0] > 1e-3 and found[3] > 1e-3


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
def test_faulty_twins_are_noticed(peers, theirs, name):
    objective, frozen, params, aux = pieces(peers, PLAIN)
    state = create_state(params, make_optimizer(OPTIM, 10), aux=aux)
    with equal_draws(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_training, *TWINS[name])
        _, metrics, _ = jax.jit(objective)(params, state, frozen, next(batches()), jax.random.key(0))
    ours = {name.removeprefix("loss_"): float(value) for name, value in metrics.items()}
    assert losses_apart([ours], theirs) > 1e-3
