"""What a set of generated images costs, from a trace of the program that draws them."""

import functools
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from fmda import trees
from fmda.diffusion.draw import Graphs, SamplerConfig, image_size, make_program
from fmda.diffusion.schedule import ScheduleConfig
from fmda.errors import UserError, did_you_mean
from fmda.mesh import FSDP_RULES
from fmda.methods.generate.settings import Config, make_prompts
from fmda.methods.planning import MACHINES, check_need, fit_line, placed, sharding, stored_bytes
from fmda.models.catalog import ENTRIES, DiffusionConfig
from fmda.perf.flops import count_flops
from fmda.perf.trace import Program
from fmda.precision import cast
from fmda.runs.plan import Plan
from fmda.trees import Tree
from fmda.weights.network import network_graph, open_checkpoint
from fmda.weights.source import PARTS, asset_names, assets_folder


def plan(config: Config) -> Plan:
    """Returns the stage, and parameters, FLOPs and bytes where the model's sizes are known; writes nothing.

    Sizes are known of folders, embedded models and those of the catalogue; for any other a note replaces the numbers.
    Raises UserError for invalid prompts, and sizes that do not fit the networks.
    """
    prompts = make_prompts(config.prompts)
    notes = tuple(f"prompt {i}: {prompt.text}" for i, prompt in enumerate(prompts[:12]))
    stage = ("images", f"{config.count} images of {len(prompts)} prompts by {config.model}")
    try:
        shapes = read_shapes(config.model)
    except UnknownModel as unknown:
        return Plan(stages=(stage,), notes=(f"no sizes are known: {unknown}", *notes))
    flops = image_flops(config, shapes)
    whole = config.count * flops["an image"] / 1e15
    totals = []
    for devices in (1, 4, 8):
        rows = -(-config.batch // devices)
        name = f"{devices} device{'s' if devices > 1 else ''}, {rows} image{'s' if rows > 1 else ''} on each at once"
        totals.append((name, _need(config, shapes, _shards(config, devices), rows)))
    shares = ", ".join(f"{whole / devices:,.4g} on each of {devices}" for devices in (4, 8))
    return Plan(
        stages=(stage,),
        parameters=tuple((part, trees.count(tree)) for part, tree in parameter_shapes(shapes).items()),
        flops=tuple(flops.items()),
        memory=(*memory(config, shapes, config.batch, 1).items(), *totals),
        shardings=shardings(shapes, _shards(config, 8)),
        notes=(
            f"{config.count} images: {whole:,.4g} PFLOP on one device, {shares}",
            *(
                fit_line(functools.partial(_need, config, shapes, _shards(config, n)), "image", name, n, limit)
                for name, n, limit in MACHINES
            ),
            *notes,
        ),
    )


class UnknownModel(UserError):
    """A model whose sizes are not known before it is on this machine."""


def read_shapes(model: str) -> DiffusionConfig:
    """Returns the configurations of a model's networks; never downloads.

    Raises UnknownModel for a model that is no folder, not embedded and not in the catalogue, and UserError for a folder
    in which a network's configuration is missing or does not fit.
    """
    folder = assets_folder() / model if model in asset_names() else Path(model).expanduser()
    if folder.is_dir():
        return DiffusionConfig(*(open_checkpoint(part, folder / part).config for part in PARTS))
    for entry in ENTRIES:
        if model in (entry.source, *entry.mirrors) and isinstance(entry.config, DiffusionConfig):
            return entry.config
    near = "" if "/" in model else did_you_mean(model, asset_names())
    raise UnknownModel(f"model: '{model}' is no folder and not in the catalogue{near}; plan again when it is there")


def image_flops(config: Config, shapes: DiffusionConfig) -> dict[str, float]:
    """Returns FLOPs by name: one call of each network, and one more image in a batch.

    The empty prompt is encoded once for a batch and is not in the FLOPs of an image.
    """
    unet, vae, text = shapes.unet, shapes.vae, shapes.text_encoder
    height, width = image_size(config.sample, unet, vae)
    latent = (1, height // vae.factor, width // vae.factor)

    def one(part: str, method: str, *inputs: jax.ShapeDtypeStruct) -> int:
        graph, params = network_graph(part, getattr(shapes, part))
        return count_flops(lambda params, *inputs: getattr(nnx.merge(graph, params), method)(*inputs), params, *inputs)

    program = _program(shapes, _sample(config), (height, width), config.dtype)
    return {
        "UNet, one call": one(
            "unet", "__call__", _floats(*latent, unet.in_channels), _floats(1), _floats(1, text.context, text.width)
        ),
        "decoder": one("vae", "decode", _floats(*latent, vae.latent_channels)),
        "text encoder": one("text_encoder", "hidden", jax.ShapeDtypeStruct((1, text.context), jnp.int32)),
        "an image": program.flops(2) - program.flops(1),
    }


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def memory(config: Config, shapes: DiffusionConfig, rows: int, shards: int) -> dict[str, int]:
    """Returns the bytes of each device by name, with `rows` images on it and parameters over `shards` devices."""
    params = cast(parameter_shapes(shapes), config.dtype)
    where = placed(params, FSDP_RULES, shards)
    program = _program(shapes, _sample(config), image_size(config.sample, shapes.unet, shapes.vae), config.dtype)
    cut = [position for position, one in enumerate(jax.tree.leaves(where)) if not one.is_fully_replicated]
    return {"parameters": stored_bytes(params, where), "activations": program.peak(rows, gathered=cut)}


def check_memory(config: Config, shapes: DiffusionConfig, devices: int, shards: int, prefix: str = "") -> None:
    """Raises UserError where a device cannot hold its share of a batch, with the largest batch that fits.

    Checked where the device's memory is known: from `device_memory`, or from the device. `prefix` stands before the
    names of options.
    """
    check_need(
        functools.partial(_need, config, shapes, shards), config.batch, devices, devices, config.device_memory,
        "image", f"{prefix}batch", "bfloat16, smaller images or more devices",
    )  # fmt: skip


def shardings(shapes: DiffusionConfig, shards: int) -> tuple[tuple[str, str], ...]:
    """Returns (network, how its arrays lie) with the axis fsdp over so many devices."""
    return tuple((part, sharding(tree, FSDP_RULES, shards)) for part, tree in parameter_shapes(shapes).items())


@functools.lru_cache(maxsize=8)
def parameter_shapes(shapes: DiffusionConfig) -> dict[str, Tree]:
    """Returns the shapes of all parameters, by network."""
    return {part: network_graph(part, getattr(shapes, part))[1] for part in PARTS}


@functools.lru_cache(maxsize=8)
def _program(shapes: DiffusionConfig, sample: SamplerConfig, size: tuple[int, int], dtype: str) -> Program:
    """Returns the traced program that draws images of `size` pixels."""
    unet, vae, text = shapes.unet, shapes.vae, shapes.text_encoder
    kind = jnp.dtype(dtype)
    graphs = {part: network_graph(part, getattr(shapes, part), kind)[0] for part in PARTS}
    latent = (size[0] // vae.factor, size[1] // vae.factor, unet.in_channels)
    params = cast(parameter_shapes(shapes), kind)
    empty = jax.ShapeDtypeStruct((text.context,), jnp.int32)
    return Program(
        make_program(Graphs(**graphs, schedule=ScheduleConfig(), scale=vae.scale), sample, latent),
        lambda batch: (
            params, empty.update(shape=(batch, text.context)), empty, jax.ShapeDtypeStruct((batch,), jnp.uint32)
        ),
    )  # fmt: skip


def _sample(config: Config) -> SamplerConfig:
    """Returns the settings of the sampler that change the program."""
    return replace(config.sample, negative="", size=None)


def _need(config: Config, shapes: DiffusionConfig, shards: int, rows: int) -> int:
    return sum(memory(config, shapes, rows, shards).values())


def _shards(config: Config, devices: int) -> int:
    """Returns the size that the axis fsdp has on so many devices, 1 where the configured one does not fit."""
    data, fsdp = config.mesh
    if fsdp == -1:
        return devices // data if devices % data == 0 else 1
    return fsdp if devices % fsdp == 0 else 1
