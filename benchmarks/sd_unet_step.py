"""A DreamBooth step of Stable Diffusion 1.4 at full size: ours against diffusers' torch UNet.

Forward, backward, clipping and AdamW, the UNet alone or with its text encoder. Each side runs in a process of its own,
one after another, so that each has the device to itself and its peak memory is its own. All hold the same random
weights, every leaf off the value where a fresh network has it, and take the same four random batches in turn. Losses
and gradient norms of the first steps are compared.

Ours is the step that personalisation trains with: compiled ahead of time, its state donated. The peer has noisy
latents and targets ready-made, runs under autocast where the type is bfloat16 (parameters and moments stay float32, as
ours), with channels-last weights and fused AdamW. Neither keeps an average of the weights.

    python benchmarks/sd_unet_step.py --out benchmarks/results/sd-unet-step.json

On a GPU latents of 64x64 (512 pixels) in bfloat16; `--small`, and any CPU, takes 16x16 (128 pixels) in float32.
`launch_s` is how long the host takes to start a call; `dispatch` is that of programs that do next to nothing, with as
many arrays as the step and with one.
"""

import argparse
import os
import time
from collections.abc import Iterator
from typing import Any, get_args

# this process only starts others: it must not claim the device's memory
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sides.networks import networks, random_parameters, torch_compiled, torch_device, torch_network, wait_for_torch
from sides.processes import BATCHES, answer, arguments, check_memory, parsed, sweep, timed

from fmda import trees
from fmda.diffusion.draw import Graphs, make_graphs
from fmda.diffusion.schedule import ScheduleConfig
from fmda.methods.datum.dreambooth import make_objective, noised
from fmda.methods.datum.settings import Optimizer
from fmda.methods.planning import Training
from fmda.models.sd_unet import Remat
from fmda.perf import compiled_memory
from fmda.train.optim import make_optimizer
from fmda.train.step import TrainState, create_state, make_step
from fmda.trees import Tree
from fmda.weights.checkpoint import network_graph

COMPARED = 3
"""First steps whose losses are compared."""


def graphs(options: argparse.Namespace) -> tuple[Graphs, dict[str, Tree]]:
    """Returns the networks and the shapes of what trains."""
    config = networks(options)
    parts = ("unet", "text_encoder") if options.trained == "unet+text" else ("unet",)
    trained = {part: network_graph(part, getattr(config, part))[1] for part in parts}
    return make_graphs(config, ScheduleConfig(), options.dtype, options.remat), trained


def inputs(options: argparse.Namespace) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Returns what all steps share, the caption's ids or states, and the batches: moments of latents, and seeds."""
    config, (batch,), side = networks(options), options.batch, options.latent
    rng = np.random.default_rng(2)
    text = config.text_encoder
    if options.trained == "unet+text":
        caption = {"ids": rng.integers(text.vocab_size, size=(1, text.context), dtype=np.int32)}
    else:
        caption = {"context": rng.normal(size=(1, text.context, text.width)).astype(np.float32)}
    found = []
    for _ in range(BATCHES):
        mean = 5 * rng.normal(size=(batch, 1, side, side, config.vae.latent_channels))
        moments = np.concatenate([mean, np.full_like(mean, -5.0)], axis=-1).astype(np.float32)
        found.append({"moments": moments, "seed": rng.integers(2**32, size=(batch, 1), dtype=np.uint32)})
    return caption, found


def our_step(options: argparse.Namespace) -> dict[str, Any]:
    """Returns times, memory and losses of ours."""
    modules, shapes = graphs(options)
    tx = optax.set_to_zero() if options.optimizer == "none" else make_optimizer(Optimizer(), 1000)
    step = make_step(make_objective(modules), tx)
    frozen, batches = (jax.tree.map(jnp.asarray, tree) for tree in inputs(options))
    key = jax.random.key(0)

    def init(params: Tree) -> Any:
        return create_state(params, tx, teacher=False)

    begin = time.perf_counter()
    abstract = jax.eval_shape(init, shapes)
    compiled = jax.jit(step, donate_argnums=0).lower(abstract, frozen, batches[0], key).compile()
    seconds = time.perf_counter() - begin
    params = {part: random_parameters(tree, jnp.array) for part, tree in shapes.items()}
    state = jax.jit(init, donate_argnums=0)(params)
    del params
    seen = []

    def launch(i: int) -> Any:
        nonlocal state
        state, metrics = compiled(state, frozen, batches[i % BATCHES], key)
        seen.append(metrics)
        return state

    times = timed(launch, jax.block_until_ready, options)
    found = {name: [float(step[name]) for step in seen[:COMPARED]] for name in ("loss", "grad_norm")}
    leaves = len(jax.tree.leaves((abstract, frozen, batches[0]))) + 1
    return times | {
        "found": found,
        "compile_s": seconds,
        "compiled_bytes": compiled_memory(compiled),
        "traced_bytes": training(options).need(*options.batch),
        "dispatch": dispatch(leaves),
    }


def dispatch(leaves: int) -> dict[str, Any]:
    """Returns the times of programs that add one to each of so many donated scalars, and to one."""
    found: dict[str, Any] = {"leaves": leaves}
    for name, count in (("all", leaves), ("one", 1)):
        state = [jnp.zeros(()) for _ in range(count)]
        compiled = jax.jit(lambda state: [x + 1 for x in state], donate_argnums=0).lower(state).compile()

        def launch(i: int, compiled: Any = compiled) -> Any:
            nonlocal state
            state = compiled(state)
            return state

        times = timed(launch, jax.block_until_ready, argparse.Namespace(warmup=3, repeats=20, window=1))
        found[name] = {key: times[key] for key in ("launch_s", "median_s", "spread")}
    return found


def peer_step(options: argparse.Namespace) -> dict[str, Any]:
    """Returns times, memory and losses of the peer."""
    import torch

    device, config = torch_device(options), networks(options)
    caption, batches = inputs(options)
    modules, shapes = graphs(options)
    asked = []
    for batch in batches:
        moments = jnp.asarray(batch["moments"][:, 0])
        latents, times, target = noised(modules, *jnp.split(moments, 2, axis=-1), jnp.asarray(batch["seed"][:, 0]))
        pictures = [torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).to(device) for x in (latents, target)]
        asked.append((pictures[0], torch.tensor(np.asarray(times)).to(device), pictures[1]))
    parts = {part: torch_network(part, getattr(config, part), device).train() for part in shapes}
    if options.remat == "blocks":
        parts["unet"].enable_gradient_checkpointing()
    call = {part: torch_compiled(network, options) for part, network in parts.items()}
    parameters = [p for network in parts.values() for p in network.parameters()]
    o = Optimizer()
    optimizer = None
    if options.optimizer == "adamw":
        optimizer = torch.optim.AdamW(
            parameters, o.learning_rate, (o.b1, o.b2), o.eps, o.weight_decay, fused=True
        )  # fmt: skip
    given = {name: torch.tensor(value).to(device) for name, value in caption.items()}
    seen = []

    def launch(i: int) -> None:
        latents, times, target = asked[i % BATCHES]
        with torch.autocast(device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            states = given["context"] if "context" in given else call["text_encoder"](given["ids"]).last_hidden_state
            states = states.expand(len(latents), -1, -1)
            prediction = call["unet"](latents, times, states, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(prediction.float(), target)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, o.clip_norm)
        if optimizer is not None:
            optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        seen.append((loss.detach(), norm.detach()))

    times = timed(launch, wait_for_torch, options)
    losses, norms = zip(*((float(loss), float(norm)) for loss, norm in seen[:COMPARED]), strict=True)
    return times | {"found": {"loss": list(losses), "grad_norm": list(norms)}}


def training(options: argparse.Namespace) -> Training:
    """Returns what the step trains, by shapes."""
    modules, shapes = graphs(options)
    config, side = networks(options), options.latent
    tx = optax.set_to_zero() if options.optimizer == "none" else make_optimizer(Optimizer(), 1000)
    tokens, width = config.text_encoder.context, config.text_encoder.width
    if options.trained == "unet+text":
        caption = {"ids": jax.ShapeDtypeStruct((1, tokens), jnp.int32)}
    else:
        caption = {"context": jax.ShapeDtypeStruct((1, tokens, width), jnp.float32)}

    def init(key: Any) -> TrainState:
        return create_state(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), tx, teacher=False)

    def batch(rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        moments = jax.ShapeDtypeStruct((rows, 1, side, side, 2 * config.vae.latent_channels), jnp.float32)
        return {"moments": moments, "seed": jax.ShapeDtypeStruct((rows, 1), jnp.uint32)}

    return Training(make_objective(modules), init, caption, batch)


def cases(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], float]]:
    """Gives the batch of each row with its traced FLOPs, where memory is enough for it."""
    traced = training(options)
    for batch in options.batch:
        if options.backend == "cpu":
            # one more set of parameters: the weights while they are given to torch, or XLA's clipped gradients
            check_memory(traced.need(batch) + trees.size_bytes(traced.state.params))
        yield {"batch": batch}, traced.flops(batch)


def main() -> None:
    """Runs the benchmark and prints its record."""
    parser = arguments(__doc__)
    parser.add_argument("--trained", choices=("unet", "unet+text"), default="unet")
    parser.add_argument(
        "--remat", choices=get_args(Remat), default="none", help="dots: the peer, without it, takes none"
    )
    parser.add_argument(
        "--optimizer", choices=("adamw", "none"), default="adamw",
        help="none: forward, backward and norm of the gradients, where memory is short",
    )  # fmt: skip
    small = {"batch": [1], "repeats": 5, "window": 2}
    # in smaller batches AdamW, whose work does not grow with them, takes most of the time
    full = {"batch": [8, 16, 32], "repeats": 10, "window": 10, "warmup": 3}
    options = parsed(parser, small, full)
    if options.side:
        return answer(options, our_step if options.side == "ours" else peer_step)
    sweep(
        "sd-unet-step", __file__, cases(options), options,
        trained=options.trained, optimizer=options.optimizer, remat=options.remat,
        pixels=networks(options).vae.factor * options.latent, parameters=trees.count(graphs(options)[1]),
        synthetic="random weights, latents, noise and caption",
    )  # fmt: skip


if __name__ == "__main__":
    main()
