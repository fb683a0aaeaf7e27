"""From captions to pictures with Stable Diffusion 1.4 at full size: ours against the same loop in diffusers' torch.

Text encoder, guided sampling (captioned and empty in one batched call), decoder, bytes. Each side runs in a process of
its own, one after another, so that each has the device to itself and its peak memory is its own. All hold the same
random weights, every leaf off the value where a fresh network has it, stored and computed with in the type asked for,
and take four batches of random captions and noise in turn; the first pictures are compared. Ours is the one program
that generation runs; the peer is a plain loop over diffusers' scheduler with the noise ready-made, and as `compiled`
its networks go through torch.compile. Both work out the empty caption's states in each call.

    python benchmarks/sd_sampling.py --out benchmarks/results/sd-sampling.json

On a GPU 512 pixels in bfloat16, 50 steps; `--small`, and any CPU, takes 128 pixels in float32 and 4 steps.
"""

import argparse
import os
import time
from collections.abc import Iterator
from typing import Any

# this process only starts others: it must not claim the device's memory
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from sides.networks import networks, random_parameters, torch_compiled, torch_device, torch_network, wait_for_torch
from sides.processes import AGREE, BATCHES, answer, arguments, check_memory, parsed, shown, sweep, timed

from fmda import trees
from fmda.diffusion.draw import Program, SamplerConfig, make_graphs, make_program
from fmda.diffusion.schedule import CLASSES, SAMPLERS, ScheduleConfig
from fmda.perf import compiled_memory, count_flops
from fmda.trees import Tree
from fmda.weights.checkpoint import network_graph

GUIDANCE = 7.5
PARTS = ("unet", "vae", "text_encoder")
# In bfloat16 the networks of both sides round differently, and guidance multiplies the difference of two predictions:
# over 50 steps, each of which starts from the last, that becomes visible where one call agrees within 1e-1.
SAMPLES_AGREE = AGREE | {"bfloat16": 0.25}


def shapes(options: argparse.Namespace) -> dict[str, Tree]:
    """Returns the parameters' shapes of all three networks."""
    config = networks(options)
    return {part: network_graph(part, getattr(config, part))[1] for part in PARTS}


def inputs(options: argparse.Namespace) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Returns the ids of no caption [T], and the batches: ids [B, T] and seeds [B]."""
    text, (batch,), rng = networks(options).text_encoder, options.batch, np.random.default_rng(2)

    def ids(*rows: int) -> np.ndarray:
        return rng.integers(text.vocab_size, size=(*rows, text.context), dtype=np.int32)

    return ids(), [(ids(batch), rng.integers(2**32, size=batch, dtype=np.uint32)) for _ in range(BATCHES)]


def drawing(options: argparse.Namespace, sampler: str) -> Program:
    """Returns the program that draws images."""
    config = networks(options)
    shape = (options.latent, options.latent, config.unet.in_channels)
    graphs = make_graphs(config, ScheduleConfig(), options.dtype)
    return make_program(graphs, SamplerConfig(sampler, options.steps, GUIDANCE), shape)


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """Returns times, memory and first pictures of ours."""
    dtype = options.dtype
    program = drawing(options, *options.sampler)
    params = {
        part: random_parameters(tree, lambda leaf: jnp.array(leaf, dtype)) for part, tree in shapes(options).items()
    }
    empty, batches = jax.tree.map(jnp.asarray, inputs(options))
    begin = time.perf_counter()
    compiled = jax.jit(program).lower(params, batches[0][0], empty, batches[0][1]).compile()
    seconds = time.perf_counter() - begin

    def launch(i: int) -> jax.Array:
        ids, seeds = batches[i % BATCHES]
        return compiled(params, ids, empty, seeds)

    times = timed(launch, jax.block_until_ready, options)
    found = {"pictures": shown(launch(0))}
    return times | {"found": found, "compile_s": seconds, "compiled_bytes": compiled_memory(compiled)}


def peer(options: argparse.Namespace) -> dict[str, Any]:
    """Returns times and first pictures of the peer."""
    import diffusers
    import torch

    device, config = torch_device(options), networks(options)
    dtype, (sampler,) = getattr(torch, options.dtype), options.sampler
    name = next(name for name, ours in CLASSES.items() if ours == sampler)
    scheduler = getattr(diffusers, name).from_config(ScheduleConfig().to_json())
    unet, vae, text = (
        torch_network(part, getattr(config, part), device, options.dtype).eval().requires_grad_(False) for part in PARTS
    )
    unet, decode, text = (torch_compiled(call, options) for call in (unet, vae.decode, text))
    empty, batches = inputs(options)
    shape = (options.latent, options.latent, config.unet.in_channels)
    given = []
    for ids, seeds in batches:
        noise = jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(jnp.asarray(seeds))
        start = torch.tensor(np.asarray(noise)).permute(0, 3, 1, 2).to(device)
        given.append((torch.tensor(ids).to(device), start))
    nothing = torch.tensor(empty)[None].to(device)
    # the scheduler looks its timesteps up in tables of the host: on the device each look would wait for all that was
    # started; the network has its own copy
    scheduler.set_timesteps(options.steps)
    places = scheduler.timesteps.to(device)

    @torch.no_grad()
    def launch(i: int) -> Any:
        ids, start = given[i % BATCHES]
        without = text(nothing).last_hidden_state.expand(len(ids), -1, -1)
        states = torch.cat([without, text(ids).last_hidden_state])
        scheduler.set_timesteps(options.steps)
        # the steps are taken in float32, as ours: in bfloat16 the noise level itself is rounded
        latents = start * scheduler.init_noise_sigma
        for t, place in zip(scheduler.timesteps, places, strict=True):
            twice = scheduler.scale_model_input(torch.cat([latents, latents]), t).to(dtype)
            first, second = unet(twice, place, states, return_dict=False)[0].float().chunk(2)
            latents = scheduler.step(first + GUIDANCE * (second - first), t, latents, return_dict=False)[0]
        images = decode((latents / config.vae.scale).to(dtype), return_dict=False)[0].float()
        return ((images + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)

    times = timed(launch, wait_for_torch, options)
    return times | {"found": {"pictures": shown(launch(0).cpu().numpy())}}


def image_flops(options: argparse.Namespace, sampler: str, batch: int) -> float:
    """Returns the traced FLOPs of one picture; the empty caption is read once for the batch."""
    config = networks(options)
    ids = jax.ShapeDtypeStruct((batch, config.text_encoder.context), jnp.int32)
    empty, seeds = ids.update(shape=ids.shape[1:]), jax.ShapeDtypeStruct((batch,), jnp.uint32)
    return count_flops(drawing(options, sampler), shapes(options), ids, empty, seeds) / batch


def cases(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], float]]:
    """Gives sampler and batch of each row with its traced FLOPs."""
    for sampler in options.sampler:
        for batch in options.batch:
            yield {"sampler": sampler, "batch": batch}, batch * image_flops(options, sampler, batch)


def main() -> None:
    """Runs the benchmark and prints its record."""
    parser = arguments(__doc__)
    parser.add_argument("--sampler", nargs="+", choices=SAMPLERS, default=["ddim", "plms"])
    parser.add_argument("--steps", type=int)
    small = {"batch": [1], "repeats": 3, "window": 1, "steps": 4}
    # a call is 50 steps long: what the host does between two calls is little beside it
    full = {"batch": [1, 4, 16], "repeats": 5, "window": 2, "warmup": 2, "steps": 50}
    options = parsed(parser, small, full)
    if options.side:
        return answer(options, ours if options.side == "ours" else peer)
    # torch takes the weights from copies of them
    check_memory(2 * 4 * trees.count(shapes(options)))
    sweep(
        "sd-sampling", __file__, cases(options), options, SAMPLES_AGREE, steps=options.steps, guidance=GUIDANCE,
        pixels=options.latent * networks(options).vae.factor, synthetic="random weights, captions and noise",
    )  # fmt: skip


if __name__ == "__main__":
    main()
