"""Steps of self-training written plainly in PyTorch, beside those of the library, and how far they are apart."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from torch_shaken import shaken

from fmda.methods.uda import self_training
from fmda.methods.uda.objective import make_objective
from fmda.methods.uda.self_training import Optimizer, initial_aux
from fmda.models.mit import MitConfig
from fmda.models.module import separated
from fmda.train.optim import make_optimizer
from fmda.train.step import create_state, make_step
from fmda.weights import mit
from fmda.weights.checkpoint import network_graph
from fmda.weights.layers import torch_rows
from fmda.weights.table import Table

CLASSES, CHOSEN, THINGS = 5, (0, 2, 255), (1, 3)
MIT = MitConfig((8, 16, 24, 32), (1, 1, 1, 1), (1, 2, 3, 4), drop_path=0.0)
SETTINGS = dict(
    hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 3, 4], decoder_hidden_size=12,
    num_labels=CLASSES, drop_path_rate=0.0, classifier_dropout_prob=0.0, layer_norm_eps=1e-6,
)  # fmt: skip
"""The same of transformers' SegFormer."""
# larger steps than DAFormer's, so that a wrong teacher shows, and an epsilon above the noise of vanishing gradients
OPTIM = replace(Optimizer(), learning_rate=2e-3, warmup_steps=2, eps=1e-4, weight_decay=0.1)


class Peer(NamedTuple):
    """A torch network whose encoder is `segformer`, and the same network here.

    Attributes:
        network, frozen: in torch, and its encoder before training.
        logits: (network, normalised images [b, 3, h, w]) -> the teacher's logits at any size.
        seen: the same -> [(logits, rows, columns, share of the loss)] of what is seen of the images in training.
        features: (an encoder, the same) -> the map whose distance counts.
        family, config: of the network here.
        table: of checkpoints' names and the paths here.
        names: {name in torch: name in checkpoints} where these differ.
        side: of an image, pixels.
    """

    network: Any
    frozen: Any
    logits: Callable[[Any, Any], Any]
    seen: Callable[[Any, Any], list[Any]]
    features: Callable[[Any, Any], Any]
    family: str
    config: Any
    table: Table
    names: dict[str, str]
    side: int

    def graph(self):
        """Returns (graphdef, parameters, running statistics, the encoder before training) of the network here."""
        graphdef, shapes = network_graph(self.family, self.config)

        def read(network):
            arrays = {self.names.get(name, name): value.numpy() for name, value in network.state_dict().items()}
            return self.table.read(arrays, shapes, "torch")

        params, statistics = separated(graphdef, read(self.network))
        return graphdef, params, statistics, read(self.frozen)["encoder"]

    def named(self, tree):
        """Returns {name in torch: tensor} of a tree here."""
        import torch

        names = {stored: name for name, stored in self.names.items()}
        return {names.get(name, name): torch.tensor(array) for name, array in self.table.write(tree).items()}


def stored_names(network, folder, prefix=""):
    """Returns {name in torch: name in its checkpoint} of a network of transformers whose arrays all differ."""
    from safetensors.numpy import load_file

    network.save_pretrained(folder)
    stored = {array.tobytes(): name for name, array in load_file(folder / "model.safetensors").items()}
    arrays = {name: value.numpy() for name, value in network.state_dict().items() if value.is_floating_point()}
    return {f"{prefix}{name}": f"{prefix}{stored[array.tobytes()]}" for name, array in arrays.items()}


def pair(make_head, classifying):
    """Returns two networks under a head whose part `classifying(head)` is confident of some pixels."""
    import torch_daformer

    networks = [torch_daformer.Network(SETTINGS, make_head) for _ in range(2)]
    for seed, one in enumerate(networks):
        classifying(shaken(one, seed).decode_head).conv_seg.weight.detach().mul_(12)
    return networks


def with_transformers_encoder(table):
    """Returns a table of OpenMMLab's names with transformers' names of the encoder."""
    heads = (row for row in table.rows if row.source.startswith("decode_head."))
    return Table((*torch_rows(mit.layers(mit.PREFIX, "encoder/")), *heads))


# what both sides use in place of random draws
def look(images):
    return 0.8 * images + 10


def hide(images):
    return images * (np.arange(images.shape[1]) % 16 < 8).reshape(1, -1, 1, 1)


def batches(side, steps):
    rng = np.random.default_rng(0)
    for _ in range(steps):
        labels = rng.choice([0, 1, 2, 3, 4, 255], (2, 2, 2)).astype(np.uint8)
        labels = labels.repeat(side // 2, 1).repeat(side // 2, 2)
        labels[:, ::7, ::5] = 4
        images = rng.integers(0, 256, (2, 2, side // 8, side // 8, 3), dtype=np.uint8).repeat(8, 2).repeat(8, 3)
        yield {"source": {"image": images[0], "labels": labels}, "target": {"image": images[1]}}


def torch_run(peer, learn, steps):
    """Returns (losses of each step, last gradients, parameters, teacher, running statistics), {name: array} each."""
    import copy

    import torch
    from torch.nn import functional as F

    config, side = learn.self_training, peer.side
    student = copy.deepcopy(peer.network).train()
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

    def up(x, size):
        return F.interpolate(x, size, mode="bilinear", align_corners=False)

    def weighted(images, labels, weights):
        total = 0
        for logits, rows, columns, part in peer.seen(student, images):
            target = labels[:, rows, columns]
            losses = F.cross_entropy(up(logits, target.shape[1:]), target, reduction="none", ignore_index=255)
            total = total + part * (losses * weights[:, rows, columns]).mean()
        return total

    def distance(images, labels):
        features = peer.features(student.segformer, images)
        with torch.no_grad():
            reference = peer.features(peer.frozen.segformer.eval(), images)
        hot = F.one_hot(torch.where(labels == 255, CLASSES, labels), CLASSES + 1).permute(0, 3, 1, 2).float()
        shares, best = F.avg_pool2d(hot, side // features.shape[2]).max(1)
        kept = (shares >= 0.75) & torch.isin(best, torch.tensor(THINGS))
        assert kept.any() and not kept.all()
        return (features - reference).norm(dim=1)[kept].mean()

    for step, batch in enumerate(batches(side, steps)):
        keep = min(1 - 1 / (step + 1), config.decay)
        with torch.no_grad():
            for average, current in zip(teacher.parameters(), student.parameters(), strict=True):
                average.mul_(keep).add_(current, alpha=1 - keep)
            logits = peer.logits(teacher, pixels(batch["target"]["image"]))
            probabilities = up(logits, (side, side)).softmax(1)
        confidence, pseudo = probabilities.max(1)
        share = (confidence >= config.threshold).float().mean()
        weights = torch.ones(pseudo.shape) * share
        weights[:, : config.ignored_rows[0]] = 0
        weights[:, side - config.ignored_rows[1] :] = 0

        labels = torch.as_tensor(batch["source"]["labels"]).long()
        source = pixels(batch["source"]["image"])
        losses = {"source": weighted(source, labels, torch.ones_like(weights))}
        if learn.distance:
            losses["distance"] = learn.distance.weight * distance(source, labels)
        inside = torch.isin(labels, torch.tensor(CHOSEN))
        images = (torch.as_tensor(batch[name]["image"]).float() for name in ("source", "target"))
        mixture = look(torch.where(inside[..., None], *images))
        mixed = (torch.where(inside, labels, pseudo), torch.where(inside, torch.ones_like(weights), weights))
        losses["mixed"] = weighted(pixels(mixture), *mixed)
        running = {name: value.clone() for name, value in student.named_buffers() if "running" in name}
        if config.masked:
            changed = pixels(look(torch.as_tensor(batch["target"]["image"]).float()))
            changed = torch.as_tensor(hide(changed.permute(0, 2, 3, 1).numpy())).float().permute(0, 3, 1, 2)
            losses["masked"] = config.masked * weighted(changed, pseudo, weights)
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


def first_losses(peer, learn):
    """Returns {name: loss} of the first step here."""
    graphdef, params, statistics, encoder = peer.graph()
    state = create_state(params, make_optimizer(OPTIM, 10), aux=initial_aux(statistics, CLASSES))
    with equal_draws():
        objective = jax.jit(make_objective(graphdef, CLASSES, learn))
        _, metrics, _ = objective(params, state, {"encoder": encoder}, next(batches(peer.side, 1)), jax.random.key(0))
    return {name.removeprefix("loss_"): float(value) for name, value in metrics.items()}


def our_run(peer, learn, steps, when="before"):
    """Returns what `torch_run` does, under its names."""
    graphdef, params, statistics, encoder = peer.graph()
    keep = optax.GradientTransformation(lambda tree: tree, lambda updates, state, params: (updates, updates))
    tx = optax.chain(keep, make_optimizer(OPTIM, 10))
    decay = self_training.teacher_decay(learn.self_training.decay)
    step = make_step(make_objective(graphdef, CLASSES, learn), tx, teacher_decay=decay, teacher_when=when)
    state, records = create_state(params, tx, aux=initial_aux(statistics, CLASSES)), []
    with equal_draws():
        step = jax.jit(step)
        for batch in batches(peer.side, steps):
            state, metrics = step(state, {"encoder": encoder}, batch, jax.random.key(0))
            records.append({name.removeprefix("loss_"): float(value) for name, value in metrics.items()})

    assert float(state.aux["shares"].sum()) == pytest.approx(1) and float(state.aux["shares"].max()) < 0.99

    def moved(tree):
        return peer.named(jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), tree, params))

    statistics = peer.named(state.aux["statistics"])
    return records, peer.named(state.opt[0]), moved(state.params), moved(state.teacher), statistics


def losses_apart(ours, theirs):
    return max(
        abs(a[name] - value) / abs(value) for a, b in zip(ours, theirs, strict=False) for name, value in b.items()
    )


def arrays_apart(ours, theirs, rounding=0.0):
    scale = max(float(value.abs().max()) for value in theirs.values())
    pairs = ((ours[name], value) for name, value in theirs.items())
    return max(float(((a - b).abs().max() - rounding) / max(b.abs().max(), 1e-2 * scale)) for a, b in pairs)


def apart(ours, theirs):
    """Returns the largest relative deviations (of losses, of gradients, of running statistics)."""
    return losses_apart(ours[0], theirs[0]), arrays_apart(ours[1], theirs[1]), arrays_apart(ours[4], theirs[4])


def moved_apart(ours, theirs):
    """Returns the largest relative deviations (of parameters, of the teacher's)."""

    def moved(ours, theirs):
        # Biases in front of a norm or of all keys have no gradient but rounding errors, which AdamW enlarges.
        meant = {name: value for name, value in theirs.items() if gradients[name].abs().max() > 1e-6}
        assert len(theirs) - len(meant) < 12
        return arrays_apart(ours, meant, rounding=2.5e-7)  # of parameters around 1

    _, gradients, parameters, teacher, _ = theirs
    return moved(ours[2], parameters), moved(ours[3], teacher)
