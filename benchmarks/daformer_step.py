"""A training step of DAFormer: ours against transformers' Mix Transformer with DAFormer's head in torch.

Both average the teacher, label two target crops with it, learn two source crops with the feature distance and two mixed
crops, and update by AdamW. Both start from the same random weights and see the same crops. Nothing is random in a step:
no dropout, no dropped branches, no jitter and no blur on either side, and source labels of one class, all of which
ClassMix pastes. Each side runs in a process of its own; losses and gradient norms of the first steps are compared.

    python benchmarks/daformer_step.py --out benchmarks/results/daformer-step.json

On a GPU MiT-B5, crops of 512 pixels, bfloat16 (the peer under autocast, channels last, fused AdamW); `--small`, and any
CPU, takes crops of 128 pixels in float32. `--tiny` takes MiT-B0 and crops of 64 pixels. `batch` counts source crops; as
many are of the target.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

# this process only starts others: it must not claim the device's memory
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from sides.networks import random_parameters, torch_compiled, torch_device, wait_for_torch
from sides.processes import BATCHES, answer, arguments, parsed, sweep, timed

from fmda import trees
from fmda.losses.features import THINGS
from fmda.methods.uda.objective import DistanceConfig, LearnConfig, make_objective
from fmda.methods.uda.self_training import Optimizer, SelfTrainingConfig, initial_aux, teacher_decay
from fmda.models.daformer import DaFormerConfig
from fmda.models.mit import MIT
from fmda.models.module import separated, with_blocks
from fmda.perf import compiled_memory
from fmda.train.optim import make_optimizer
from fmda.train.step import TrainState, create_state, make_step, step_flops
from fmda.trees import Tree
from fmda.weights.checkpoint import network_graph

COMPARED, STEPS = 3, 40000
LOSSES = ("loss_source", "loss_distance", "loss_mixed", "grad_norm")
# an epsilon above the noise of vanishing gradients, which AdamW would enlarge
OPTIM = Optimizer(warmup_steps=0, eps=1e-4)
# a threshold that random weights reach
LEARN = LearnConfig(SelfTrainingConfig(threshold=0.1, jitter=0.0, blur=0.0), DistanceConfig())
LABEL = THINGS[0]


def config(options: argparse.Namespace) -> DaFormerConfig:
    """Returns the shape of the network; transformers has one epsilon for all norms."""
    return DaFormerConfig(replace(MIT["mit-b0" if options.tiny else "mit-b5"], drop_path=0.0, norm_eps=1e-5), dropout=0)


def weights(options: argparse.Namespace) -> tuple[Tree, Tree]:
    """Returns random parameters, and running statistics of mean 0 and variance 1."""
    graphdef, shapes = network_graph("daformer", config(options))
    params, statistics = separated(graphdef, shapes)
    blank = {
        path: (np.ones if path.endswith("var") else np.zeros)(leaf.shape, np.float32)
        for path, leaf in trees.flatten(statistics).items()
    }
    return random_parameters(params), trees.unflatten(blank)


def before_training(encoder: Tree) -> Tree:
    """Returns the encoder that features are compared with: another one, so that the first distance is not 0."""
    return jax.tree.map(lambda leaf: 0.9 * leaf, encoder)


def batches(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns crops of the source, all of one class, and of the target."""
    (batch,), side, rng = options.batch, options.crop, np.random.default_rng(2)
    images = rng.integers(256, size=(BATCHES, 2, batch, side, side, 3), dtype=np.uint8)
    labels = np.full((batch, side, side), LABEL, np.uint8)
    return [{"source": {"image": ours, "labels": labels}, "target": {"image": theirs}} for ours, theirs in images]


def our_step(options: argparse.Namespace) -> dict[str, Any]:
    """Returns times, memory and losses of ours."""
    shape = config(options)
    graphdef, shapes = network_graph("daformer", shape, jnp.dtype(options.dtype))
    if options.scan:
        graphdef = with_blocks(graphdef, shapes, scan=True)
    tx = make_optimizer(OPTIM, STEPS)
    objective = make_objective(graphdef, shape.classes, LEARN)
    decay = teacher_decay(LEARN.self_training.decay) if LEARN.self_training else None
    step = make_step(objective, tx, teacher_decay=decay, teacher_when="before")
    params, statistics = (jax.tree.map(jnp.asarray, tree) for tree in weights(options))
    frozen = {"encoder": before_training(params["encoder"])}
    given, key = [jax.tree.map(jnp.asarray, batch) for batch in batches(options)], jax.random.key(0)
    state = create_state(params, tx, aux=initial_aux(statistics, shape.classes))
    begin = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, frozen, given[0], key).compile()
    seconds = time.perf_counter() - begin
    # a teacher that is the student cannot be donated with it
    state = state._replace(teacher=jax.tree.map(jnp.copy, state.teacher))
    seen = []

    def launch(i: int) -> Any:
        nonlocal state
        state, metrics = compiled(state, frozen, given[i % BATCHES], key)
        seen.append(metrics)
        return state

    times = timed(launch, jax.block_until_ready, options)
    found = {name: [float(metrics[name]) for metrics in seen[:COMPARED]] for name in LOSSES}
    return times | {"found": found, "compile_s": seconds, "compiled_bytes": compiled_memory(compiled)}


def peer_step(options: argparse.Namespace) -> dict[str, Any]:
    """Returns times and losses of the peer."""
    import torch
    from sides.daformer import torch_daformer
    from torch.nn import functional

    device, shape = torch_device(options), config(options)
    params, statistics = weights(options)
    tree = trees.joined(params, statistics)
    student, teacher = (torch_daformer(shape, tree, device) for _ in range(2))
    frozen = torch_daformer(shape, tree | {"encoder": before_training(tree["encoder"])}, device)
    teacher.requires_grad_(False)
    frozen.requires_grad_(False).eval()
    parameters, averages = list(student.parameters()), list(teacher.parameters())
    groups: dict[tuple[float, float], list[Any]] = {}
    for name, parameter in student.named_parameters():
        encoder = name.startswith("encoder.")
        decay = 0.0 if encoder and "norm" in name else OPTIM.weight_decay
        groups.setdefault((1.0 if encoder else 10.0, decay), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": members, "weight_decay": decay} for (_, decay), members in groups.items()],
        OPTIM.learning_rate, (OPTIM.b1, OPTIM.b2), OPTIM.eps, fused=True,
    )  # fmt: skip
    learn, label, encode = (torch_compiled(call, options) for call in (student, teacher, frozen.features))
    mean, std = (torch.tensor(x, device=device) for x in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    given = [
        [torch.as_tensor(x, device=device) for x in (b["source"]["image"], b["source"]["labels"], b["target"]["image"])]
        for b in batches(options)
    ]
    assert LEARN.self_training is not None and LEARN.distance is not None
    keep, threshold, share = LEARN.self_training.decay, LEARN.self_training.threshold, LEARN.distance.weight
    seen = []

    def pixels(image: Any) -> Any:
        return ((image.float() - mean) / std).permute(0, 3, 1, 2)

    def cross_entropy(logits: Any, labels: Any, weights: Any = 1.0) -> Any:
        return (functional.cross_entropy(logits.float(), labels.long(), reduction="none") * weights).mean()

    def launch(i: int) -> None:
        image, labels, target = given[i % BATCHES]
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - min(1 - 1 / (i + 1), keep))
        with torch.autocast(device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            logits, last = learn(pixels(image))
            source = cross_entropy(logits, labels)
            with torch.no_grad():
                reference = encode(pixels(image))[-1]
                said = label(pixels(target))[0].float()
            # all cells are of one class of things
            distance = share * (last.float() - reference.float()).pow(2).sum(1).add(1e-12).sqrt().mean()
            pseudo = said.argmax(1)
            weight = (said.softmax(1).amax(1) >= threshold).float().mean()
            # half of the one class that occurs, rounded up
            inside = labels == LABEL
            mix = torch.where(inside[..., None], image, target)
            truth = torch.where(inside, labels.long(), pseudo)
            logits, _ = learn(pixels(mix))
            mixed = cross_entropy(logits, truth, torch.where(inside, torch.ones_like(weight), weight))
        (source + distance + mixed).backward()
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([p.grad for p in parameters])))
        for group, (factor, _) in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = factor * OPTIM.learning_rate * (1 - i / STEPS)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen.append([value.detach() for value in (source, distance, mixed, norm)])

    times = timed(launch, wait_for_torch, options)
    values = zip(*([float(value) for value in step] for step in seen[:COMPARED]), strict=True)
    return times | {"found": {name: list(value) for name, value in zip(LOSSES, values, strict=True)}}


def cases(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], float]]:
    """Gives the batch of each row with its traced FLOPs."""
    shape = config(options)
    graphdef, shapes = network_graph("daformer", shape)
    params, statistics = separated(graphdef, shapes)
    tx = make_optimizer(OPTIM, STEPS)

    def init() -> TrainState:
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (params, statistics))
        return create_state(blank[0], tx, aux=initial_aux(blank[1], shape.classes))

    objective, state = make_objective(graphdef, shape.classes, LEARN), jax.eval_shape(init)
    key = jax.eval_shape(lambda: jax.random.key(0))
    for batch in options.batch:
        rows = argparse.Namespace(**vars(options) | {"batch": [batch]})
        flops = step_flops(objective, state, {"encoder": params["encoder"]}, batches(rows)[0], key)
        yield {"batch": batch}, flops


def main() -> None:
    """Runs the benchmark and prints its record."""
    parser = arguments(__doc__, latent=False)
    parser.add_argument("--crop", type=int, help="side of a crop, pixels")
    parser.add_argument("--scan", action="store_true", help="run the encoder's blocks in loops: ours compiles faster")
    small = {"batch": [2], "crop": 64 if "--tiny" in sys.argv else 128, "repeats": 5, "window": 1}
    full = {"batch": [2, 8], "crop": 512, "repeats": 10, "window": 10, "warmup": 3}
    options = parsed(parser, small, full)
    if options.side:
        return answer(options, our_step if options.side == "ours" else peer_step)
    shape = config(options)
    sweep(
        "daformer-step", __file__, cases(options), options,
        model=f"DAFormer, MiT-{'B0' if options.tiny else 'B5'}",
        peer="transformers' SegFormer encoder with DAFormer's head, torch, channels last",
        crop=options.crop, scan=options.scan, parameters=trees.count(separated(*network_graph("daformer", shape))[0]),
        synthetic="random weights and images, labels of one class",
    )  # fmt: skip


if __name__ == "__main__":
    main()
