"""What a personalisation takes, in parameters, FLOPs and bytes, by closed formulas; nothing is loaded for it."""

import functools
import math

from fmda import trees
from fmda.diffusion.draw import check_size
from fmda.errors import UserError
from fmda.mesh import make_mesh
from fmda.methods.datum.lora import adapter_count, target_kernels
from fmda.methods.datum.settings import Config
from fmda.methods.generate.cost import (
    MACHINES,
    UnknownModel,
    check_need,
    fit_line,
    parameter_shapes,
    read_shapes,
    shardings,
)
from fmda.methods.pipeline import Plan
from fmda.models.catalog import DiffusionConfig
from fmda.perf.diffusion_flops import dreambooth_step_flops, unet_attention_flops, unet_flops, vae_encode_flops
from fmda.perf.diffusion_memory import (
    personalisation_memory,
    text_training_bytes,
    unet_training_bytes,
    vae_encode_bytes,
)
from fmda.perf.flops import text_flops
from fmda.precision import Policy


def check_crop(config: Config, shapes: DiffusionConfig) -> None:
    """Raises UserError for crops that the networks cannot halve down to whole places."""
    check_size((config.crop, config.crop), shapes.vae.factor * shapes.unet.factor, "crop")


def trained_count(config: Config, shapes: DiffusionConfig) -> int:
    """Returns the number of scalars that are trained."""
    parts = parameter_shapes(shapes)
    if config.trained == "lora":
        return sum(adapter_count(parts[part], config.lora.rank) for part in config.trained_parts)
    return sum(trees.count(parts[part]) for part in config.trained_parts)


def row_flops(config: Config, shapes: DiffusionConfig) -> float:
    """Returns the FLOPs of one row of a batch in training: a crop and, with prior preservation, a class picture.

    Captions are read once for a part of a batch, not once for a row.
    """
    unet, vae, text = shapes.unet, shapes.vae, shapes.text_encoder
    encode = vae_encode_flops(
        config.crop, channels=vae.channels, layers=vae.layers, latent_channels=vae.latent_channels
    )  # fmt: skip
    call = unet_flops(
        config.crop // vae.factor, text.context, channels=unet.channels, layers=unet.layers, attention=unet.attention,
        context_width=unet.context_width, in_channels=unet.in_channels, out_channels=unet.out_channels,
    )  # fmt: skip
    read = text_flops(text.context, width=text.width, layers=text.layers, mlp_width=text.mlp_width, embed_dim=0)
    share = 1 / (config.batch // config.accumulate) if "text_encoder" in config.trained_parts else 0
    adapted = share * text_flops(text.context, width=text.width, layers=text.layers, mlp_width=0)
    adapted += unet_attention_flops(
        config.crop // vae.factor, text.context, channels=unet.channels, layers=unet.layers, attention=unet.attention,
        context_width=unet.context_width,
    )  # fmt: skip
    picture = dreambooth_step_flops(
        unet=call, text=share * read, encode=0 if config.bank else encode,
        adapted=adapted if config.trained == "lora" else None,
    )  # fmt: skip
    return len(config.prompts) * picture


def memory(config: Config, shapes: DiffusionConfig, rows: int, shards: int) -> dict[str, int]:
    """Returns what each device holds in training, in bytes by name.

    `rows` of a batch are on it at once, parameters and moments are cut over `shards` devices.
    """
    unet, vae, text = shapes.unet, shapes.vae, shapes.text_encoder
    dtype = Policy.named(config.precision).compute
    parts, trained = parameter_shapes(shapes), config.trained_parts
    frozen = {part for part in parts if part not in trained and part != "text_encoder"}
    if config.trained == "lora":
        frozen |= set(trained)
    pictures = len(config.prompts)
    found = personalisation_memory(
        trained_count(config, shapes), sum(trees.count(parts[part]) for part in frozen),
        activations=unet_training_bytes(
            config.crop // vae.factor, text.context, channels=unet.channels, layers=unet.layers,
            attention=unet.attention, heads=unet.heads, dtype=dtype, remat=config.remat,
        ),
        encoding=0 if config.bank else vae_encode_bytes(config.crop, channels=vae.channels, dtype=dtype),
        images=pictures * rows, ema=config.ema is not None, accumulate=config.accumulate, dtype=dtype,
        frozen_dtype=dtype, shards=shards,
    )  # fmt: skip
    if "text_encoder" in trained:
        found["activations, text"] = pictures * text_training_bytes(
            text.context, width=text.width, layers=text.layers, mlp_width=text.mlp_width, heads=text.heads, dtype=dtype
        )
    if config.trained == "lora":
        kernels = [kernel for part in trained for kernel in target_kernels(parts[part]).values()]
        # the sums of weights and adapters, and the gradients that lead to the adapters
        found["kernels with adapters"] = 2 * 4 * trees.count(kernels)
    return found


def check_batch(config: Config) -> None:
    """Raises UserError for a batch that cannot be split over the mesh."""
    mesh = make_mesh(*config.mesh)
    if config.batch % mesh.size:
        next_one = -(-config.batch // mesh.size) * mesh.size
        raise UserError(
            f"batch: {config.batch} does not divide over {mesh.size} devices; batch={next_one} does, or "
            f"mesh=[{math.gcd(config.batch, mesh.size)},1] takes fewer of them"
        )


def check_memory(config: Config, shapes: DiffusionConfig) -> None:
    """Raises UserError where a device cannot hold its share of a batch, and says by how much.

    Only where the device's memory is known: given as `device_memory`, or told by the device.
    """
    mesh = make_mesh(*config.mesh)
    check_need(
        functools.partial(_need, config, shapes, mesh.shape["fsdp"]), config.batch, config.accumulate * mesh.size,
        mesh.size, config.device_memory, "example", "batch",
        "accumulate=, remat=dots or remat=blocks, precision=bfloat16, trained=lora or more devices (mesh=)",
    )  # fmt: skip


def _need(config: Config, shapes: DiffusionConfig, shards: int, rows: int) -> int:
    return sum(memory(config, shapes, rows, shards).values())


def plan(config: Config) -> Plan:
    """Returns stages and, where the model's sizes are known, parameters, FLOPs and memory. Touches nothing.

    Memory is given by name for what one device holds of the configured batch, and as a sum for 1, 4 and 8 devices.
    """
    kept = ", ".join(map(str, config.snapshot_steps))
    stages = (
        ("prepare", _preparation(config)),
        ("train", f"{config.trained} of {config.model}, {config.steps} steps of {config.batch}, kept at {kept}"),
        *_probing(config),
        ("export", f"{_exported(config)} in diffusers' layout, {config.store}"),
    )
    try:
        shapes = read_shapes(config.model)
    except UnknownModel as unknown:
        return Plan(stages=stages, notes=(f"no sizes are known: {unknown}",))
    check_crop(config, shapes)
    counts = {part: trees.count(tree) for part, tree in parameter_shapes(shapes).items()}
    row = row_flops(config, shapes)
    rows = config.batch // config.accumulate
    totals, work = [], []
    for devices in (1, 4, 8):
        share = -(-rows // devices)
        name = f"{devices} device{'s' if devices > 1 else ''}, fsdp={devices}, {share} on each at once"
        if config.batch % devices:
            name += f" (batch={share * devices * config.accumulate})"
        totals.append((name, sum(memory(config, shapes, share, devices).values())))
        work.append((name, row * share * config.accumulate * config.steps / 1e15))
    return Plan(
        stages=stages,
        parameters=(*counts.items(), ("trained", trained_count(config, shapes))),
        flops=(("an example in training", row),),
        memory=(*memory(config, shapes, rows, 1).items(), *totals),
        shardings=shardings(shapes, 8),
        notes=(
            *(f"the whole run, {name}: {share:,.4g} PFLOP a device" for name, share in work),
            *(
                fit_line(functools.partial(_need, config, shapes, devices), "example", name, devices, limit)
                for name, devices, limit in MACHINES
            ),
        ),
    )


def _preparation(config: Config) -> str:
    words = [f"{config.image}, crops of {config.crop}"]
    if config.prior is not None and config.prior.images is None:
        words.append(f"{config.prior.count} class pictures")
    if config.bank:
        words.append(f"{config.bank} crops encoded")
    return ", ".join(words)


def _probing(config: Config) -> tuple[tuple[str, str], ...]:
    if config.probe is None:
        return ()
    each = f"{config.probe.count} images of each of {len(config.probed_steps)} steps"
    return ("probe", each), ("choose", f"a step by alignment, diversity and coverage, seen by {config.probe.clip}")


def _exported(config: Config) -> str:
    if config.export is not None:
        return f"steps {', '.join(map(str, config.export))}"
    return f"step {config.snapshot_steps[-1]}" if config.probe is None else "the chosen step"
