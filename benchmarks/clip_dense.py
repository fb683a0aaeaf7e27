"""CLIP dense features: ours against the torch model of transformers, in one process and in turns.

Both hold the same weights (random, every leaf moved off its initial value) and see the same photograph; the features
are compared before anything is timed. On a CPU torch runs with one thread and with one per core, and its faster
setting is the peer: its threads spin at barriers, so on a machine with other work several can be hundreds of times
slower than one. The ratio is withheld where the machine was busy or the times scatter.

Dense features = all patch tokens through the last norm and the projection, brought to unit length.

    python benchmarks/clip_dense.py --out benchmarks/results/clip-dense-cpu.json
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from typing import Any

# both frameworks share the device: neither may claim all of its memory at the start
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from PIL import Image
from sides.record import record, write_record
from sides.timing import alternate
from transformers import CLIPModel

from fmda.data import data_root, open_dataset
from fmda.models.clip import Clip, ClipConfig, TextConfig, VitConfig
from fmda.perf import count_flops, peak_flops
from fmda.weights.network import save

QUIET = 0.75  # processes a core before the run; this one has just started
STEADY = 0.15  # quartile distance over median

SIZES = {
    "B/16": VitConfig(),
    "B/32": VitConfig(patch_size=32),
    "L/14": VitConfig(patch_size=14, width=1024, layers=24, heads=16, mlp_width=4096),
    "tiny": VitConfig(image_size=32, patch_size=16, width=64, layers=2, heads=2, mlp_width=128),
}


def photograph(side: int) -> tuple[np.ndarray, str]:
    """Returns a square uint8 crop and where it comes from: a real photograph, else a rendered street."""
    if data_root() and (data_root() / "camvid").is_dir():
        image, source = open_dataset("camvid", split="val")[0].image, "photograph (CamVid)"
    else:
        from fmda.world import render

        drawn = render(jax.random.key(0), "photo", height=256, width=512)
        image, source = np.asarray(drawn.image), "rendered street"
    scale = side / min(image.shape[:2])
    size = (max(side, round(image.shape[1] * scale)), max(side, round(image.shape[0] * scale)))
    return np.asarray(Image.fromarray(image).resize(size))[:side, :side], source


def random_clip(vision: VitConfig) -> tuple[ClipConfig, nnx.GraphDef, dict]:
    """Returns a CLIP with random weights; noise moves zero- and one-initialised leaves too. The text tower is small."""
    text = TextConfig(vocab_size=64, context=8, width=64, layers=1, heads=2, mlp_width=64, bos_token_id=1)
    config = ClipConfig(embed_dim=512, vision=vision, text=text)
    graphdef, state = nnx.split(Clip(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: leaf + 0.02 * rng.normal(size=leaf.shape).astype(np.float32), nnx.to_pure_dict(state)
    )
    return config, graphdef, params


def our_features(graphdef: nnx.GraphDef, params: dict, dtype: str) -> Callable[[Any], jax.Array]:
    """Returns pixels -> unit features [B, patches, D] as one compiled function."""
    stored = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype if leaf.ndim else None), params)

    @jax.jit
    def features(params: dict, pixels: jax.Array) -> jax.Array:
        vision = nnx.merge(graphdef, params).vision
        x = vision.project(vision.hidden(pixels)[:, 1:])
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    return lambda pixels: features(stored, pixels)


def peer_features(folder: str, dtype: str, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the same function of transformers' torch model, with its default attention."""
    model = CLIPModel.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()

    @torch.inference_mode()
    def features(pixels: torch.Tensor) -> torch.Tensor:
        hidden = model.vision_model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        x = model.visual_projection(model.vision_model.post_layernorm(hidden[:, 1:]))
        x = x / x.norm(dim=-1, keepdim=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return x

    return features


def with_threads(peer: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor, count: int) -> Callable[[], Any]:
    """Returns the peer's call with `count` threads inside each operation."""

    def call() -> torch.Tensor:
        torch.set_num_threads(count)
        return peer(pixels)

    return call


def load_per_core() -> float:
    """Returns the processes that wanted to run during the last minute, divided by the cores."""
    return os.getloadavg()[0] / len(os.sched_getaffinity(0))


def main() -> None:
    """Runs the benchmark and prints its record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="B/16")
    parser.add_argument("--side", type=int, default=448, help="pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    config, graphdef, params = random_clip(SIZES[options.model])
    if options.dtype != "float32":
        graphdef = nnx.split(Clip(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))[0]
    ours = our_features(graphdef, params, options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        save("clip", folder, config, params)
        peer = peer_features(folder, options.dtype, device)

    image, source = photograph(options.side)
    pixels = (image / 255.0 - np.array(config.image_mean)) / np.array(config.image_std)
    # slightly different images, so that nothing can be shared between the rows of a batch
    batch = np.stack([np.roll(pixels, k, axis=1) for k in range(options.batch)]).astype(np.float32)
    x = jnp.asarray(batch, options.dtype)
    y = torch.from_numpy(batch.transpose(0, 3, 1, 2).copy()).to(device, getattr(torch, options.dtype))

    difference = np.abs(np.asarray(ours(x), np.float32) - peer(y).float().cpu().numpy()).max()
    counts = sorted({1, torch.get_num_threads()}) if device == "cpu" else [torch.get_num_threads()]
    names = {f"torch, {count} thread{'s' * (count > 1)}": count for count in counts}
    calls: dict[str, Callable[[], Any]] = {name: with_threads(peer, y, count) for name, count in names.items()}
    load = load_per_core()
    times = alternate({"ours": lambda: ours(x), **calls}, repeats=options.repeats)
    best = min(names, key=lambda name: times[name].median)
    spread = max(times["ours"].spread, times[best].spread)
    faults = ([f"{load:.1f} busy processes a core"] if load > QUIET else []) + (
        [f"spread {spread:.2f}"] if spread > STEADY else []
    )
    pixels = jax.ShapeDtypeStruct((options.batch, options.side, options.side, 3), jnp.float32)
    flops = count_flops(our_features(graphdef, params, options.dtype), pixels)
    peak = peak_flops(dtype=options.dtype)
    result = record(
        "clip-dense",
        model=options.model,
        side=options.side,
        batch=options.batch,
        dtype=options.dtype,
        synthetic=f"random weights; {source}",
        ours=times["ours"].to_json(),
        peer=times[best].to_json() | {"what": f"transformers CLIPModel, {best}, default attention", "device": device},
        peers={name: times[name].to_json() for name in names},
        ratio=None if faults else times[best].median / times["ours"].median,
        ratio_withheld=", ".join(faults) or None,
        spread=spread,
        load_per_core=load,
        flops=flops,
        flops_per_second=flops / times["ours"].median,
        mfu=flops / times["ours"].median / peak if peak else None,
        largest_difference=float(difference),
    )
    write_record(result, options.out)


if __name__ == "__main__":
    main()
