"""What a set of generated images costs, from a trace of the program that draws them."""

import functools
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from fmda import trees
from fmda.diffusion.draw import SamplerConfig, image_size, latent_shape, make_graphs, make_program
from fmda.diffusion.schedule import ScheduleConfig
from fmda.errors import UserError, did_you_mean
from fmda.mesh import FSDP_RULES
from fmda.methods.generate.settings import Config, make_prompts
from fmda.methods.planning import check_need, fit_lines, placed, sharding, stored_bytes
from fmda.models.catalog import ENTRIES, DiffusionConfig
from fmda.perf.flops import count_flops
from fmda.perf.trace import Program
from fmda.precision import cast
from fmda.runs.plan import Plan
from fmda.runs.stages import pending
from fmda.trees import Tree
from fmda.weights.checkpoint import network_graph, open_checkpoint
from fmda.weights.source import PARTS, asset_names, assets_folder


def plan(config: Config) -> Plan:
    """Returns the stage, and parameters, FLOPs and bytes where the model's sizes are known; writes nothing.

    Prompts that an earlier run writes are not shown. Raises UserError for invalid prompts, and sizes that do not fit
    the networks.
    """
    prompts = [] if pending(config.prompts.file) else make_prompts(config.prompts)
    notes = tuple(f"prompt {i}: {prompt.text}" for i, prompt in enumerate(prompts[:12]))
    number = f"{len(prompts)} prompts" if prompts else f"the prompts of {config.prompts.file}"
    stages = [("images", f"{config.count} images of {number} by {config.model}")]
    if config.copies:
        stages.append(("copies", f"patches of {config.copies.encoder} against crops of {config.copies.image}"))
    try:
        networks = read_networks(config.model)
    except UnknownModel as unknown:
        return Plan(stages=tuple(stages), notes=(f"no sizes are known: {unknown}", *notes))
    flops = image_flops(config, networks)
    total = config.count * flops["an image"] / 1e15
    sums = []
    for devices in (1, 4, 8):
        rows = -(-config.batch // devices)
        name = f"{devices} device{'s' if devices > 1 else ''}, {rows} image{'s' if rows > 1 else ''} on each at once"
        sums.append((name, _need(config, networks, rows, _shards(config, devices))))
    shares = ", ".join(f"{total / devices:,.4g} on each of {devices}" for devices in (4, 8))
    return Plan(
        stages=tuple(stages),
        parameters=tuple((part, trees.count(tree)) for part, tree in parameter_shapes(networks).items()),
        flops=tuple(flops.items()),
        memory=(*memory(config, networks, config.batch, 1).items(), *sums),
        shardings=shardings(networks, _shards(config, 8)),
        notes=(
            f"{config.count} images: {total:,.4g} PFLOP on one device, {shares}",
            *fit_lines(lambda rows, shards: _need(config, networks, rows, _shards(config, shards)), "image"),
            *notes,
        ),
    )


class UnknownModel(UserError):
    """A model whose sizes are not known before it is on this machine."""


def read_networks(model: str) -> DiffusionConfig:
    """Returns the configurations of the networks of a folder, an embedded model or one of the catalogue.

    Raises UnknownModel for any other, and UserError for a folder in which a configuration is missing or does not fit.
    """
    folder = assets_folder() / model if model in asset_names() else Path(model).expanduser()
    if folder.is_dir():
        return DiffusionConfig(*(open_checkpoint(part, folder / part).config for part in PARTS))
    for entry in ENTRIES:
        if model in (entry.source, *entry.mirrors) and isinstance(entry.config, DiffusionConfig):
            return entry.config
    near = "" if "/" in model else did_you_mean(model, asset_names())
    raise UnknownModel(f"model: '{model}' is no folder and not in the catalogue{near}; plan again when it is there")


def image_flops(config: Config, networks: DiffusionConfig) -> dict[str, float]:
    """Returns FLOPs by name: one call of each network, and one more image in a batch.

    The empty prompt is encoded once for a batch and is not in the FLOPs of an image.
    """
    program = _program(config, networks)
    one_more = program.flops(2) - program.flops(1)
    return _call_flops(networks, latent_shape(config.sample, networks)) | {"an image": one_more}


def memory(config: Config, networks: DiffusionConfig, rows: int, shards: int) -> dict[str, int]:
    """Returns the bytes of each device by name, with `rows` images on it and parameters over `shards` devices."""
    size, cut = _stored(networks, config.dtype, shards)
    return {"parameters": size, "activations": _program(config, networks).peak(rows, gathered=cut)}


def check_memory(config: Config, networks: DiffusionConfig, devices: int, shards: int, prefix: str = "") -> None:
    """Raises UserError where a device cannot hold its share of a batch, as `check_need`; `prefix` is of options."""
    check_need(
        functools.partial(_need, config, networks, shards=shards), config.batch, devices, devices,
        config.device_memory, "image", f"{prefix}batch", "bfloat16, smaller images or more devices",
    )  # fmt: skip


def shardings(networks: DiffusionConfig, shards: int) -> tuple[tuple[str, str], ...]:
    """Returns (network, how its arrays lie) with the axis fsdp over so many devices."""
    return tuple((part, sharding(tree, FSDP_RULES, shards)) for part, tree in parameter_shapes(networks).items())


def parameter_shapes(networks: DiffusionConfig) -> dict[str, Tree]:
    """Returns the shapes of all parameters, by network."""
    return {part: network_graph(part, getattr(networks, part))[1] for part in PARTS}


@functools.lru_cache(maxsize=8)
def _call_flops(networks: DiffusionConfig, latent: tuple[int, int, int]) -> dict[str, float]:
    """Returns the FLOPs of one call of each network."""
    text = networks.text_encoder

    def one(part: str, method: str, *shapes: tuple[int, ...], dtype: type = jnp.float32) -> int:
        graph, params = network_graph(part, getattr(networks, part))
        inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
        return count_flops(lambda params, *inputs: getattr(nnx.merge(graph, params), method)(*inputs), params, *inputs)

    return {
        "UNet, one call": one("unet", "__call__", (1, *latent), (1,), (1, text.context, text.width)),
        "decoder": one("vae", "decode", (1, *latent)),
        "text encoder": one("text_encoder", "hidden", (1, text.context), dtype=jnp.int32),
    }


@functools.lru_cache(maxsize=32)
def _stored(networks: DiffusionConfig, dtype: str, shards: int) -> tuple[int, tuple[int, ...]]:
    """Returns the bytes of the parameters on each device, and the positions of those that are sharded."""
    params = cast(parameter_shapes(networks), dtype)
    where = placed(params, FSDP_RULES, shards)
    cut = (position for position, one in enumerate(jax.tree.leaves(where)) if not one.is_fully_replicated)
    return stored_bytes(params, where), tuple(cut)


def _program(config: Config, networks: DiffusionConfig) -> Program:
    """Returns the traced program that draws images; equal ones are traced once."""
    size = image_size(config.sample, networks)
    return _traced(networks, replace(config.sample, size=size, negative=""), config.dtype)


@functools.lru_cache(maxsize=8)
def _traced(networks: DiffusionConfig, sample: SamplerConfig, dtype: str) -> Program:
    program = make_program(make_graphs(networks, ScheduleConfig(), dtype), sample, latent_shape(sample, networks))
    params, context = cast(parameter_shapes(networks), dtype), networks.text_encoder.context

    def arguments(batch: int) -> tuple[Tree, ...]:
        inputs = ((batch, context), jnp.int32), ((context,), jnp.int32), ((batch,), jnp.uint32)
        return params, *(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in inputs)

    return Program(program, arguments)


def _need(config: Config, networks: DiffusionConfig, rows: int, shards: int) -> int:
    return sum(memory(config, networks, rows, shards).values())


def _shards(config: Config, devices: int) -> int:
    """Returns the size that the axis fsdp has on so many devices, 1 where the configured one does not fit."""
    data, fsdp = config.mesh
    if fsdp == -1:
        return devices // data if devices % data == 0 else 1
    return fsdp if devices % fsdp == 0 else 1
