"""What a set of generated images takes, in parameters, FLOPs and bytes, by closed formulas."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import AbstractMesh

from fmda import trees
from fmda.diffusion.draw import image_size
from fmda.errors import UserError, did_you_mean
from fmda.mesh import FSDP_RULES, place
from fmda.methods.generate.settings import Config, make_prompts
from fmda.methods.pipeline import Plan
from fmda.models.catalog import ENTRIES, DiffusionConfig
from fmda.perf.diffusion_flops import sampling_flops, unet_flops, vae_decode_flops
from fmda.perf.diffusion_memory import generation_memory, unet_sampling_bytes, vae_decode_bytes
from fmda.perf.flops import text_flops
from fmda.perf.memory import device_memory
from fmda.trees import Tree
from fmda.weights.network import network_graph, open_checkpoint
from fmda.weights.source import PARTS, asset_names, assets_folder

GIB = 2**30
LIMIT = " (XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 lets JAX take more of a GPU)"
MACHINES = (("80 GB card", 1, 80e9), ("v5e-8 slice", 8, 16.0 * GIB))
"""What a plan is made for: name, devices, bytes of each."""


def plan(config: Config) -> Plan:
    """Returns the stage, and parameters, FLOPs and bytes where the model's sizes are known. Touches nothing.

    Known are folders, models of the package and those of the catalogue; for any other a note stands in place of
    numbers. Raises UserError for prompts that cannot be made, and sizes that do not fit the networks.
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
    detail = memory(config, shapes, config.batch, 1)
    totals = []
    for devices in (1, 4, 8):
        rows = -(-config.batch // devices)
        shards = _shards(config, devices)
        name = f"{devices} device{'s' if devices > 1 else ''}, {rows} image{'s' if rows > 1 else ''} on each at once"
        totals.append((name, sum(memory(config, shapes, rows, shards).values())))
    shares = ", ".join(f"{whole / devices:,.4g} on each of {devices}" for devices in (4, 8))
    return Plan(
        stages=(stage,),
        parameters=tuple(_counts(shapes).items()),
        flops=tuple(flops.items()),
        memory=(*detail.items(), *totals),
        shardings=shardings(shapes, _shards(config, 8)),
        notes=(
            f"{config.count} images: {whole:,.4g} PFLOP on one device, {shares}",
            *(_fit(config, shapes, *machine) for machine in MACHINES),
            *notes,
        ),
    )


class UnknownModel(UserError):
    """A model whose sizes are not known before it is there."""


def read_shapes(model: str) -> DiffusionConfig:
    """Returns the configurations of a model's networks; never downloads.

    Raises UnknownModel for one that is neither a folder, nor in the package, nor in the catalogue, and UserError for a
    folder in which a network's configuration is missing or does not fit.
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
    """Returns FLOPs by name: of a call of the UNet, of the decoder, of the prompt, and of an image with all of them."""
    unet, vae, text = shapes.unet, shapes.vae, shapes.text_encoder
    height, width = image_size(config.sample, unet, vae)
    sample = config.sample
    call = unet_flops(
        (height // vae.factor, width // vae.factor), text.context, channels=unet.channels, layers=unet.layers,
        attention=unet.attention, context_width=unet.context_width, in_channels=unet.in_channels,
        out_channels=unet.out_channels,
    )  # fmt: skip
    decode = vae_decode_flops(
        (height, width), channels=vae.channels, layers=vae.layers, latent_channels=vae.latent_channels
    )
    read = text_flops(text.context, width=text.width, layers=text.layers, mlp_width=text.mlp_width)
    calls = sample.steps + (sample.sampler == "plms" and sample.steps > 1)
    whole = sampling_flops(calls, unet=call, decode=decode, text=read, guidance=sample.guidance != 1)
    return {"UNet, one call": call, "decoder": decode, "text encoder": read, "an image": whole}


def memory(config: Config, shapes: DiffusionConfig, rows: int, shards: int) -> dict[str, int]:
    """Returns the bytes that each device holds, by name, with `rows` images on it and parameters over `shards`."""
    unet, vae = shapes.unet, shapes.vae
    height, width = image_size(config.sample, unet, vae)
    call = unet_sampling_bytes(
        (height // vae.factor, width // vae.factor), channels=unet.channels, layers=unet.layers,
        attention=unet.attention, heads=unet.heads, dtype=config.dtype,
    )  # fmt: skip
    return generation_memory(
        sum(_counts(shapes).values()), unet=call,
        decode=vae_decode_bytes((height, width), channels=vae.channels, dtype=config.dtype), images=rows,
        guidance=config.sample.guidance != 1, dtype=config.dtype, shards=shards,
    )  # fmt: skip


def check_memory(config: Config, shapes: DiffusionConfig, devices: int, shards: int, prefix: str = "") -> None:
    """Raises UserError where a device cannot hold its share of a batch, and says by how much.

    Only where the device's memory is known: given as `device_memory`, or told by the device. `prefix` stands before
    the names of options.
    """
    check_need(
        functools.partial(_need, config, shapes, shards), config.batch, devices, devices, config.device_memory,
        "image", f"{prefix}batch", "bfloat16, smaller images or more devices",
    )  # fmt: skip


def _fit(config: Config, shapes: DiffusionConfig, machine: str, devices: int, limit: float) -> str:
    need = functools.partial(_need, config, shapes, _shards(config, devices))
    return fit_line(need, "image", machine, devices, limit)


def _need(config: Config, shapes: DiffusionConfig, shards: int, rows: int) -> int:
    return sum(memory(config, shapes, rows, shards).values())


def check_need(
    need: Callable[[int], int],
    batch: int,
    share: int,
    devices: int,
    gib: float | None,
    row: str,
    name: str,
    remedies: str,
) -> None:
    """Raises UserError where a device cannot hold its part of a batch, and says by how much.

    Args:
        need: rows on a device at once -> bytes of it, on a straight line.
        batch: rows of a whole batch.
        share: rows of a batch that make one on each device at once.
        devices: their number.
        gib: of a device; None asks it, and checks nothing where it does not tell.
        row: what a row is called.
        name: the option that gives `batch`.
        remedies: what else would help.
    """
    limit = device_memory().get("limit") if gib is None else gib * GIB
    if limit is None:
        return
    bytes_needed = need(-(-batch // share))
    if bytes_needed <= limit:
        return
    most = _most(need, limit) * share
    raise UserError(
        f"{name}: {batch} needs about {bytes_needed / GIB:.2f} GiB on each of {devices} device"
        f"{'s' if devices > 1 else ''}, {(bytes_needed - limit) / GIB:.2f} GiB more than the {limit / GIB:.2f} GiB "
        f"there{LIMIT if gib is None else ''}; {f'{name}={most} fits' if most else f'not even one {row} fits'}; "
        f"{remedies} help too"
    )


def fit_line(need: Callable[[int], int], row: str, machine: str, devices: int, limit: float) -> str:
    """Returns a line that says how many rows each device of a machine holds at once; arguments as of `check_need`."""
    one, most = need(1), _most(need, limit)
    if not most:
        return f"{machine}: does not fit, {(one - limit) / GIB:.2f} GiB short on each of {devices} with one {row}"
    return f"{machine}: {one / GIB:.2f} of {limit / GIB:.2f} GiB with one {row} a device; {most} fit at once"


def _most(need: Callable[[int], int], limit: float) -> int:
    """Returns how many rows a device of so many bytes holds at once."""
    one, two = need(1), need(2)
    return 0 if one > limit else 1 + int((limit - one) // (two - one))


def shardings(shapes: DiffusionConfig, shards: int) -> tuple[tuple[str, str], ...]:
    """Returns (network, how its arrays lie) with the axis fsdp over so many devices."""
    if shards == 1:
        return tuple((part, "whole on every device, as fsdp is 1") for part in PARTS)
    mesh = AbstractMesh((1, shards), ("data", "fsdp"))
    found = []
    for part, tree in parameter_shapes(shapes).items():
        where = jax.tree.leaves(place(tree, FSDP_RULES, mesh))
        sizes = [(leaf.size, "fsdp" in one.spec) for leaf, one in zip(jax.tree.leaves(tree), where, strict=True)]
        cut, whole = (sum(size for size, is_cut in sizes if is_cut is kind) for kind in (True, False))
        number = sum(is_cut for _, is_cut in sizes)
        text = f"{number:,} of {len(sizes):,} arrays cut in {shards}, {whole:,} of {cut + whole:,} parameters whole"
        found.append((part, text))
    return tuple(found)


def _shards(config: Config, devices: int) -> int:
    """Returns the size that the axis fsdp has on so many devices, 1 where the configured one does not fit."""
    data, fsdp = config.mesh
    if fsdp == -1:
        return devices // data if devices % data == 0 else 1
    return fsdp if devices % fsdp == 0 else 1


@functools.lru_cache(maxsize=8)
def parameter_shapes(shapes: DiffusionConfig) -> dict[str, Tree]:
    """Returns the shapes of all parameters, by network."""
    return {part: network_graph(part, getattr(shapes, part))[1] for part in PARTS}


def _counts(shapes: DiffusionConfig) -> dict[str, int]:
    return {part: trees.count(tree) for part, tree in parameter_shapes(shapes).items()}
