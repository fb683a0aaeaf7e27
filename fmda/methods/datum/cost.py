"""What a personalisation costs, from traces of its objective; nothing is loaded."""

import functools
import math

import jax
import jax.numpy as jnp

from fmda import trees
from fmda.data.streams import Stream
from fmda.diffusion.draw import check_size
from fmda.diffusion.schedule import ScheduleConfig
from fmda.errors import UserError
from fmda.mesh import FSDP_RULES, make_mesh
from fmda.methods.datum.settings import Config
from fmda.methods.datum.setup import training_task
from fmda.methods.generate.cost import UnknownModel, parameter_shapes, read_networks, shardings
from fmda.methods.planning import Training, check_need, training_plan
from fmda.models.catalog import DiffusionConfig
from fmda.runs.plan import Plan
from fmda.trees import Tree


def training(config: Config, networks: DiffusionConfig) -> Training:
    """Returns the pieces of the training, by shapes alone."""
    params, text, vae = parameter_shapes(networks), networks.text_encoder, networks.vae
    images, tokens = len(config.prompts), text.context
    if "text_encoder" in config.trained_parts:
        captions: Tree = {"ids": jax.ShapeDtypeStruct((images, tokens), jnp.int32)}
    else:
        captions = {"context": jax.ShapeDtypeStruct((images, tokens, text.width), jnp.float32)}

    def batch(rows: int) -> Tree:
        if config.bank:
            side = config.crop // vae.factor
            name, shape, kind = "moments", (side, side, 2 * vae.latent_channels), jnp.float32
        else:
            name, shape, kind = "pixels", (config.crop, config.crop, 3), jnp.uint8
        return {
            name: jax.ShapeDtypeStruct((rows, images, *shape), kind),
            "seed": jax.ShapeDtypeStruct((rows, images), jnp.uint32),
        }

    task = training_task(config, networks, ScheduleConfig(), params, captions, Stream(range(1), None, config.batch))
    return Training.of(task, config.steps, batch, frozen_rules=FSDP_RULES)


def check_batch(config: Config) -> None:
    """Raises UserError for a batch that cannot be split over the mesh."""
    mesh = make_mesh(*config.mesh)
    if config.batch % mesh.size:
        next_one = -(-config.batch // mesh.size) * mesh.size
        raise UserError(
            f"batch: {config.batch} does not divide over {mesh.size} devices; batch={next_one} does, or "
            f"mesh=[{math.gcd(config.batch, mesh.size)},1] takes fewer of them"
        )


def check_memory(config: Config, networks: DiffusionConfig) -> None:
    """Raises UserError where a device cannot hold its share of a batch, with the largest batch that fits.

    Checked where the device's memory is known: from `device_memory`, or from the device.
    """
    mesh = make_mesh(*config.mesh)
    check_need(
        functools.partial(training(config, networks).need, shards=mesh.shape["fsdp"]), config.batch,
        config.accumulate * mesh.size, mesh.size, config.device_memory, "example", "batch",
        "accumulate=, remat=dots or remat=blocks, precision=bfloat16, trained=lora or more devices (mesh=)",
    )  # fmt: skip


def plan(config: Config) -> Plan:
    """Returns stages and, where the model's sizes are known, parameters, FLOPs and memory; writes nothing."""
    prior, probe, last = config.prior, config.probe, config.snapshot_steps[-1]
    drawn = f", {prior.count} class images" if prior is not None and prior.images is None else ""
    encoded = f", {config.bank} crops encoded" if config.bank else ""
    kept = ", ".join(map(str, config.snapshot_steps))
    stages = [
        ("prepare", f"{config.image}, crops of {config.crop}{drawn}{encoded}"),
        ("train", f"{config.trained} of {config.model}, {config.steps} steps of {config.batch}, kept at {kept}"),
    ]
    if probe is not None:
        stages.append(("probe", f"{probe.count} images of each of {len(config.probed_steps)} steps"))
        stages.append(("choose", f"a step by alignment, diversity and coverage, measured by {probe.clip}"))
    exported = f"step {last}" if probe is None else "the chosen step"
    if config.export is not None:
        exported = f"steps {', '.join(map(str, config.export))}"
    stages.append(("export", f"{exported} in diffusers' layout, {config.store}"))
    try:
        networks = read_networks(config.model)
    except UnknownModel as unknown:
        return Plan(stages=tuple(stages), notes=(f"no sizes are known: {unknown}",))
    check_size((config.crop, config.crop), networks, "crop")
    return training_plan(
        training(config, networks), stages=stages, batch=config.batch, steps=config.steps,
        parameters={part: trees.count(tree) for part, tree in parameter_shapes(networks).items()},
        shardings=shardings(networks, 8),
    )  # fmt: skip
