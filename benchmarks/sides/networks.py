"""Stable Diffusion's networks with the same random weights on both sides, and the torch that the peer runs on."""

import argparse
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fmda import trees
from fmda.errors import UserError
from fmda.models.catalog import CATALOG, DiffusionConfig
from fmda.models.clip import TextConfig
from fmda.models.sd_unet import UNetConfig
from fmda.models.sd_vae import VaeConfig
from fmda.trees import Tree
from fmda.weights import diffusers_tables
from fmda.weights.checkpoint import network_graph
from fmda.weights.registry import FAMILIES

MODES = {"compiled": "default", "autotuned": "max-autotune-no-cudagraphs"}
"""Peers that go through torch.compile, and its mode; none has CUDA graphs, which spare small batches launches."""
DEVICES = {"cpu": "cpu", "gpu": "cuda"}
"""jax's backend -> torch's name for the same."""

TINY = DiffusionConfig(
    UNetConfig(channels=(32, 64), layers=1, attention=(True, False), heads=(2, 2), context_width=64, sample_size=16),
    VaeConfig(channels=(32, 64), layers=1),
    TextConfig(width=64, layers=1, heads=2, mlp_width=128),
)


def networks(options: argparse.Namespace) -> DiffusionConfig:
    """Returns the shapes of the networks."""
    config = CATALOG["stable-diffusion-v1-4"].config
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
    _, table, objects = FAMILIES[part].export(config, None)
    value = objects["config.json"]
    if part == "text_encoder":
        made = transformers.CLIPTextModel(transformers.CLIPTextConfig(**value, attn_implementation="sdpa"))
        old = next(iter(made.state_dict())).startswith("text_model.")
        table = table if old else diffusers_tables.BARE_TEXT_ENCODER
    else:
        network = diffusers.UNet2DConditionModel if part == "unet" else diffusers.AutoencoderKL
        with torch.device("meta"):
            made = network.from_config(value)
    arrays = table.write(random_parameters(network_graph(part, config)[1]))
    made.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}, assign=True)
    # diffusers' own `to` warns of every change of type
    return torch.nn.Module.to(made, device, getattr(torch, dtype), memory_format=torch.channels_last)


def torch_device(options: argparse.Namespace) -> str:
    """Returns "cuda" or "cpu", as jax has it, with float32 products as jax takes them: TensorFloat-32 on GPUs.

    Raises:
        UserError: torch does not reach the device that jax runs on.
    """
    import torch

    device = DEVICES.get(options.backend)
    if device is None or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(
            f"torch {torch.__version__}: reaches no {options.backend}, where jax runs; install a torch that does, or "
            "leave the peers out by a bare --peers"
        )
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    return device


def torch_build() -> dict[str, Any]:
    """Returns torch's device, the versions of the libraries it calls there, and its threads."""
    import torch

    found: dict[str, Any] = {"device": "cpu", "threads": torch.get_num_threads()}
    if torch.cuda.is_initialized():
        cudnn = torch.backends.cudnn.version()
        found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "cudnn": cudnn}
    return found


def torch_compiled(call: Any, options: argparse.Namespace) -> Any:
    """Returns the network or function as this side runs it: through torch.compile, or as it is."""
    import torch

    return torch.compile(call, mode=MODES[options.side]) if options.side in MODES else call


def wait_for_torch(out: Any = None) -> None:
    """Waits until the device has done all that was started."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
