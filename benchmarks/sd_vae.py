"""Stable Diffusion 1.4's autoencoder at full size: ours against diffusers' in torch, encoder and decoder.

Each side runs in a process of its own, one after another, so that each has the device to itself and its peak memory is
its own. All hold the same random weights, every leaf off the value where a fresh network has it, stored and computed
with in the type asked for, and take the same four random batches in turn; the first results are compared.

    python benchmarks/sd_vae.py --out benchmarks/results/sd-vae.json

On a GPU images of 512 pixels in bfloat16; `--small`, and any CPU, takes 128 pixels in float32. `launch_s` is how long
the host takes to start a call.
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
from flax import nnx
from sides.networks import networks, random_parameters, torch_compiled, torch_device, torch_network, wait_for_torch
from sides.processes import BATCHES, answer, arguments, parsed, shown, sweep, timed

from fmda.perf import compiled_memory, count_flops
from fmda.trees import Tree
from fmda.weights.checkpoint import network_graph


def inputs(options: argparse.Namespace) -> list[np.ndarray]:
    """Returns batches of noise: images [B, H, W, 3] to encode, or latents [B, h, w, 4] to decode."""
    config, (batch,), rng = networks(options).vae, options.batch, np.random.default_rng(2)
    side = options.latent * (config.factor if options.direction == ["encode"] else 1)
    channels = config.in_channels if options.direction == ["encode"] else config.latent_channels
    return [rng.uniform(-1, 1, (batch, side, side, channels)).astype(np.float32) for _ in range(BATCHES)]


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """Returns times, memory and first result of ours."""
    graph, shapes = network_graph("vae", networks(options).vae, options.dtype)
    (direction,), batches = options.direction, [jnp.asarray(batch) for batch in inputs(options)]

    def call(params: Tree, batch: jax.Array) -> Any:
        found = getattr(nnx.merge(graph, params), direction)(batch)
        return found[0] if direction == "encode" else found

    params = random_parameters(shapes, lambda leaf: jnp.array(leaf, options.dtype))
    begin = time.perf_counter()
    compiled = jax.jit(call).lower(params, batches[0]).compile()
    seconds = time.perf_counter() - begin
    times = timed(lambda i: compiled(params, batches[i % BATCHES]), jax.block_until_ready, options)
    found = {direction: shown(compiled(params, batches[0]))}
    return times | {"found": found, "compile_s": seconds, "compiled_bytes": compiled_memory(compiled)}


def peer(options: argparse.Namespace) -> dict[str, Any]:
    """Returns times and first result of the peer."""
    import torch

    device, (direction,) = torch_device(options), options.direction
    vae = torch_network("vae", networks(options).vae, device, options.dtype).eval()
    batches = [torch.tensor(b).permute(0, 3, 1, 2).to(device, getattr(torch, options.dtype)) for b in inputs(options)]

    def encode(images: Any) -> Any:
        return vae.encode(images).latent_dist.mean

    def decode(latents: Any) -> Any:
        return vae.decode(latents, return_dict=False)[0]

    call = torch_compiled({"encode": encode, "decode": decode}[direction], options)
    with torch.no_grad():
        times = timed(lambda i: call(batches[i % BATCHES]), wait_for_torch, options)
        first = call(batches[0]).float().permute(0, 2, 3, 1).cpu().numpy()
    return times | {"found": {direction: shown(first)}}


def cases(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], float]]:
    """Gives direction and batch of each row with its traced FLOPs."""
    config = networks(options).vae
    graph, shapes = network_graph("vae", config, options.dtype)
    side, pixels = options.latent, options.latent * config.factor
    given = {"encode": (1, pixels, pixels, 3), "decode": (1, side, side, config.latent_channels)}
    for direction in options.direction:
        flops = count_flops(
            lambda params, x, direction=direction: getattr(nnx.merge(graph, params), direction)(x),
            shapes, jax.ShapeDtypeStruct(given[direction], jnp.float32),
        )  # fmt: skip
        for batch in options.batch:
            yield {"direction": direction, "batch": batch}, batch * flops


def main() -> None:
    """Runs the benchmark and prints its record."""
    parser = arguments(__doc__)
    parser.add_argument("--direction", nargs="+", choices=("encode", "decode"), default=["encode", "decode"])
    small = {"batch": [1, 4], "repeats": 5, "window": 2}
    full = {"batch": [1, 4, 16], "repeats": 20, "window": 10, "warmup": 3}
    options = parsed(parser, small, full)
    if options.side:
        return answer(options, ours if options.side == "ours" else peer)
    sweep(
        "sd-vae", __file__, cases(options), options,
        pixels=options.latent * networks(options).vae.factor, synthetic="random weights; noise for images and latents",
    )  # fmt: skip


if __name__ == "__main__":
    main()
