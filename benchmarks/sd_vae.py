"""Stable Diffusion 1.4's autoencoder at full size: ours against diffusers' in torch, encoder and decoder.

Each side runs in a process of its own, one after another, so that each has the device to itself and its peak memory is
its own. All hold the same random weights, every leaf off the value where a fresh network has it, stored and computed
with in the type asked for, and take the same four random batches in turn; the first results are compared.

    python benchmarks/sd_vae.py --out benchmarks/results/sd-vae.json

On a GPU images of 512 pixels in bfloat16; `--small`, and any CPU, takes 128 pixels in float32. `launch_s` is how long
the host takes to start a call.

`sd_sampling.py` and `sd_unet_step.py` run and compare their sides by the functions of this file.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# this process only starts others: it must not claim the device's memory
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fmda import trees
from fmda.errors import UserError
from fmda.models.catalog import DiffusionConfig, entry
from fmda.models.clip import TextConfig
from fmda.models.sd_unet import UNetConfig
from fmda.models.sd_vae import VaeConfig
from fmda.perf import (
    compiled_memory,
    device_memory,
    measure,
    measured_peak,
    peak_flops,
    record,
    run_measured,
    write_record,
)
from fmda.perf.diffusion_flops import vae_decode_flops, vae_encode_flops
from fmda.trees import Tree
from fmda.weights import diffusers_configs, diffusers_tables
from fmda.weights.diffusers import part_graph, vae_graph

PEERS = ("eager", "compiled")
BATCHES = 4
"""Different inputs, taken in turn."""
SHOWN = 4096
"""Values of the first result that are compared, evenly taken."""
QUIET = 0.15  # share of the cores that other processes may take
STEADY = 0.15  # quartile distance over median
SPARE = 2e9  # bytes of the host to be left over
AGREE = {"float32": 1e-2, "bfloat16": 1e-1}  # float32 has TensorFloat-32 products on GPUs

TINY = DiffusionConfig(
    UNetConfig(channels=(32, 64), layers=1, attention=(True, False), heads=(2, 2), context_width=64, sample_size=16),
    VaeConfig(channels=(32, 64), layers=1),
    TextConfig(width=64, layers=1, heads=2, mlp_width=128),
)

Launch = Callable[[int], Any]
"""Starts call number i; may return before it is done."""


def arguments(about: str) -> argparse.ArgumentParser:
    """Returns a parser with what all three benchmarks take."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", help="a sweep")
    parser.add_argument("--latent", type=int, help="side of the latents: pixels / 8")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--warmup", type=int, help="calls that do not count, at least 1")
    parser.add_argument("--peers", nargs="*", choices=PEERS)
    parser.add_argument("--compile-mode", default="default", help="of torch.compile")
    parser.add_argument("--small", action="store_true", help="small pictures, float32, few calls; always on a CPU")
    parser.add_argument("--tiny", action="store_true", help="a very small network, to try the script")
    parser.add_argument("--out")
    # what `run_side` gives to a process of one side: a file with all options
    parser.add_argument("--side", help=argparse.SUPPRESS)
    return parser


def parsed(parser: argparse.ArgumentParser, small: dict[str, Any], full: dict[str, Any]) -> argparse.Namespace:
    """Returns the options; for what was not given, `small` values on a CPU or where asked for, else `full` ones.

    `options.side` is the side that this process is to run, None in the process that starts the others.
    """
    options = parser.parse_args()
    if options.side is not None:
        return argparse.Namespace(**json.loads(Path(options.side).read_text(encoding="utf-8")))
    for name, value in (small if options.small or jax.default_backend() == "cpu" else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def networks(options: argparse.Namespace) -> DiffusionConfig:
    """Returns the shapes of the networks."""
    config = entry("stable-diffusion-v1-4").config
    assert isinstance(config, DiffusionConfig)
    return TINY if options.tiny else config


def random_parameters(shapes: Tree, convert: Callable[[np.ndarray], Any] = np.asarray) -> Tree:
    """Returns a tree of random arrays, the same in every process; `convert` takes each as soon as it is drawn."""
    drawn = {}
    for n, (path, leaf) in enumerate(sorted(trees.flatten(shapes).items())):
        noise = np.random.default_rng((1, n)).random(leaf.shape, np.float32)
        noise -= 0.5
        kind = path.rsplit("/", 1)[-1]
        # kernels keep the variance of what they are given; scales lie about one, all else about zero
        noise *= math.sqrt(12 / math.prod(leaf.shape[:-1])) if kind == "kernel" else 0.2
        drawn[path] = convert(noise + np.float32(1) if kind == "scale" else noise)
    return trees.unflatten(drawn)


def torch_network(part: str, config: Any, device: str, dtype: str = "float32") -> Any:
    """Returns diffusers' (or transformers') torch module with the weights of `random_parameters`, channels last."""
    import diffusers
    import torch
    import transformers

    made: Any
    if part == "text_encoder":
        made = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(**diffusers_configs.write_text_encoder(config), attn_implementation="sdpa")
        )
        old = next(iter(made.state_dict())).startswith("text_model.")
        table = diffusers_tables.TEXT_ENCODER if old else diffusers_tables.BARE_TEXT_ENCODER
    elif part == "unet":
        with torch.device("meta"):
            made = diffusers.UNet2DConditionModel.from_config(diffusers_configs.write_unet(config))
        table = diffusers_tables.UNET[config.linear_projection]
    else:
        with torch.device("meta"):
            made = diffusers.AutoencoderKL.from_config(diffusers_configs.write_vae(config))
        table = diffusers_tables.VAE
    arrays = table.write(random_parameters(part_graph(part, config)[1]))
    made.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}, assign=True)
    # diffusers' own `to` warns of every change of type
    return torch.nn.Module.to(made, device, getattr(torch, dtype), memory_format=torch.channels_last)


def torch_device() -> str:
    """Returns "cuda" or "cpu", with float32 products as jax takes them: TensorFloat-32 where there is such."""
    import torch

    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    return "cuda" if torch.cuda.is_available() else "cpu"


def wait_for_torch(out: Any = None) -> None:
    """Waits until the device has done all that was started."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def busy_seconds() -> float | None:
    """Returns the seconds that all cores together have worked since the machine started; None where it is not told."""
    try:
        first = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()
    except OSError:
        return None
    user, nice, system, _, _, interrupt, soft, stolen = (int(word) for word in first[1:9])
    return (user + nice + system + interrupt + soft + stolen) / os.sysconf("SC_CLK_TCK")


def timed(launch: Launch, wait: Callable[[Any], Any], options: argparse.Namespace) -> dict[str, Any]:
    """Returns times of calls that are waited for at both ends, those of launching, and the load of other processes."""
    launches: list[float] = []

    def call() -> None:
        begin = time.perf_counter()
        out = launch(len(launches))
        launches.append(time.perf_counter() - begin)
        wait(out)

    begin = time.perf_counter()
    call()
    first = time.perf_counter() - begin
    for _ in range(options.warmup - 1):
        call()
    clock, own, busy = time.perf_counter(), time.process_time(), busy_seconds()
    timing = measure(call, repeats=options.repeats, warmup=0)
    wall, used = time.perf_counter() - clock, time.process_time() - own
    after = busy_seconds()
    others = None if busy is None or after is None else max(0.0, after - busy - used) / wall
    return timing.to_json() | {
        "launch_s": float(np.median(launches[-options.repeats :])),
        "first_call_s": first,
        "cpu_s": used / options.repeats,
        "cores_of_others": others,
    }


def run_side(script: str, side: str, options: argparse.Namespace, **changed: Any) -> dict[str, Any]:
    """Returns what a side answers in a new process, under the options but for `changed`, or {"failed": why}.

    "peak_bytes" is that of the device where it tells, else of the process.
    """
    # in the peer's process jax only shapes the weights and draws the noise
    env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true"} if side == "ours" else {"JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        told, path = Path(folder) / "options.json", Path(folder) / "answer.json"
        told.write_text(json.dumps(vars(options) | changed | {"side": side, "answer": str(path)}), encoding="utf-8")
        used = run_measured([sys.executable, script, "--side", str(told)], env=os.environ | env)
        if used.returncode:
            return {"failed": f"the process ended with {used.returncode}"}
        found = json.loads(path.read_text(encoding="utf-8"))
    return {"peak_bytes": used.peak_bytes} | found | {"process_peak_bytes": used.peak_bytes, "process_s": used.seconds}


def answer(options: argparse.Namespace, values: dict[str, Any]) -> None:
    """Writes what one side found, with the device's peak memory where it is told."""
    if options.side == "ours":
        peak = device_memory().get("peak")
    else:
        import torch

        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        values |= {"threads": torch.get_num_threads()}
    values |= {} if peak is None else {"peak_bytes": peak}
    Path(options.answer).write_text(json.dumps(values), encoding="utf-8")


def difference(ours: dict[str, list[float]], peer: dict[str, list[float]]) -> dict[str, float]:
    """Returns by name the largest difference over the peer's largest value."""
    pairs = {name: (np.array(ours[name]), np.array(values)) for name, values in peer.items()}
    return {name: float(np.abs(a - b).max() / np.abs(b).max()) for name, (a, b) in pairs.items()}


def compared(sides: dict[str, dict[str, Any]], images: int, flops: float, dtype: str) -> dict[str, Any]:
    """Returns a row of the record: rates of all sides, and the peers' times over ours where they mean something."""
    found = {name: side.pop("found", {}) for name, side in sides.items()}
    peak, cores = peak_flops(dtype=dtype), len(os.sched_getaffinity(0))
    for side in sides.values():
        if "failed" not in side:
            rate = flops / side["median_s"]
            side |= {"images_per_second": images / side["median_s"], "tflops_per_second": rate / 1e12}
            side |= {"mfu": rate / peak if peak else None}
    row: dict[str, Any] = {"flops": flops, **sides}
    for name in [name for name in sides if name != "ours"]:
        faults = [f"{side} failed" for side in ("ours", name) if "failed" in sides[side]]
        if not faults:
            apart = difference(found["ours"], found[name])
            others = max(sides[side]["cores_of_others"] or 0.0 for side in ("ours", name))
            spread = max(sides[side]["spread"] for side in ("ours", name))
            row |= {f"difference_{name}": apart, f"spread_{name}": spread}
            faults += [f"{others:.1f} cores busy with other work"] if others > QUIET * cores else []
            faults += [f"spread {spread:.2f}"] if spread > STEADY else []
            faults += ["results differ"] if not max(apart.values()) < AGREE[dtype] else []
        row[f"ratio_{name}"] = None if faults else sides[name]["median_s"] / sides["ours"]["median_s"]
        row[f"ratio_{name}_withheld"] = ", ".join(faults) or None
    return row


def finish(name: str, rows: Sequence[dict[str, Any]], options: argparse.Namespace, **values: Any) -> None:
    """Prints and writes the record."""
    stand_in = None if peak_flops(dtype=options.dtype) else measured_peak(options.dtype)
    write_record(
        record(
            name,
            model="tiny" if options.tiny else "Stable Diffusion 1.4, full size",
            dtype=options.dtype,
            **values,
            peer="diffusers and transformers, torch, scaled_dot_product_attention, channels last; "
            f"compiled: torch.compile, mode {options.compile_mode}",
            # no data sheet, so no MFU: what a matrix product of jax reaches here
            matmul_flops_per_second=stand_in,
            results=list(rows),
        ),
        options.out,
    )


def check_memory(need: float) -> None:
    """Raises UserError where the host's free memory is short of `need` bytes; nothing must be pushed out of memory."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    if need + SPARE > free:
        raise UserError(
            f"memory: a process needs {need / 1e9:.1f} GB and should leave {SPARE / 1e9:.0f}, but {free / 1e9:.1f} are "
            "free; wait, or take a machine with more (a training step: --optimizer none)"
        )


def shown(values: Any) -> list[float]:
    """Returns some of an array's values, evenly taken."""
    flat = np.asarray(values, np.float32).reshape(-1)
    return flat[:: max(1, flat.size // SHOWN)].tolist()


def inputs(options: argparse.Namespace) -> list[np.ndarray]:
    """Returns batches of noise: images [B, H, W, 3] to encode, or latents [B, h, w, 4] to decode."""
    config, (batch,), rng = networks(options).vae, options.batch, np.random.default_rng(2)
    side = options.latent * (config.factor if options.direction == ["encode"] else 1)
    channels = config.in_channels if options.direction == ["encode"] else config.latent_channels
    return [rng.uniform(-1, 1, (batch, side, side, channels)).astype(np.float32) for _ in range(BATCHES)]


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """Returns times, memory and first result of ours."""
    graph, shapes = vae_graph(networks(options).vae, options.dtype)
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

    device, (direction,) = torch_device(), options.direction
    vae = torch_network("vae", networks(options).vae, device, options.dtype).eval()
    batches = [torch.tensor(b).permute(0, 3, 1, 2).to(device, getattr(torch, options.dtype)) for b in inputs(options)]

    def encode(images: Any) -> Any:
        return vae.encode(images).latent_dist.mean

    def decode(latents: Any) -> Any:
        return vae.decode(latents, return_dict=False)[0]

    call = {"encode": encode, "decode": decode}[direction]
    if options.side == "compiled":
        call = torch.compile(call, mode=options.compile_mode)
    with torch.no_grad():
        times = timed(lambda i: call(batches[i % BATCHES]), wait_for_torch, options)
        first = call(batches[0]).float().permute(0, 2, 3, 1).cpu().numpy()
    return times | {"found": {direction: shown(first)}}


def main() -> None:
    """Runs the benchmark and prints its record."""
    parser = arguments(__doc__)
    parser.add_argument("--direction", nargs="+", choices=("encode", "decode"), default=["encode", "decode"])
    small = {"batch": [1, 4], "latent": 16, "dtype": "float32", "repeats": 5, "warmup": 1, "peers": ["eager"]}
    full = {"batch": [1, 4, 16], "latent": 64, "dtype": "bfloat16", "repeats": 20, "warmup": 3, "peers": list(PEERS)}
    options = parsed(parser, small, full)
    if options.side:
        return answer(options, ours(options) if options.side == "ours" else peer(options))
    config, rows = networks(options).vae, []
    pixels = options.latent * config.factor
    for direction in options.direction:
        count = vae_encode_flops if direction == "encode" else vae_decode_flops
        flops = count(pixels, channels=config.channels, layers=config.layers, latent_channels=config.latent_channels)
        for batch in options.batch:
            one = {"batch": [batch], "direction": [direction]}
            sides = {side: run_side(__file__, side, options, **one) for side in ("ours", *options.peers)}
            rows.append({"direction": direction, "batch": batch} | compared(sides, batch, batch * flops, options.dtype))
    finish("sd-vae", rows, options, pixels=pixels, synthetic="random weights; noise for images and latents")


if __name__ == "__main__":
    main()
