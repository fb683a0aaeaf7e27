"""From prompts and seeds to images: text states, sampling and decoding as one compiled program over all devices."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Int, UInt8, UInt32

from fmda.config import PositiveInt
from fmda.diffusion.guidance import guided
from fmda.diffusion.load import StableDiffusion
from fmda.diffusion.samplers import SAMPLERS, Denoise, make_table, sample
from fmda.diffusion.schedule import ScheduleConfig
from fmda.errors import UserError, did_you_mean
from fmda.mesh import FSDP_RULES, batch_sharding, place, replicated
from fmda.models.catalog import DiffusionConfig
from fmda.models.sd_unet import Remat
from fmda.weights.checkpoint import network_graph

Program = Callable[[Any, Int[Array, "n t"], Int[Array, "t"], UInt32[Array, "n"]], UInt8[Array, "n H W 3"]]


@dataclass(frozen=True)
class SamplerConfig:
    """How images are sampled; the defaults are those of DATUM.

    Attributes:
        sampler: one of `SAMPLERS`.
        steps: of the sampler; plms calls the network once more.
        guidance: scale of classifier-free guidance; 1 leaves it out, and halves the cost.
        negative: caption to move away from.
        size: height and width of the images, pixels; by default what the model was trained on.
    """

    sampler: str = "plms"
    steps: PositiveInt = 50
    guidance: float = 7.5
    negative: str = ""
    size: tuple[PositiveInt, PositiveInt] | None = None

    def __post_init__(self) -> None:
        """Raises UserError for an unknown sampler, and a negative prompt that has no effect."""
        if self.sampler not in SAMPLERS:
            raise UserError(f"sampler: '{self.sampler}' does not exist{did_you_mean(self.sampler, SAMPLERS)}")
        if self.guidance == 1 and self.negative:
            raise UserError(f"negative: '{self.negative}' has no use with a guidance of 1; leave it out, or raise that")


def make_draw(
    model: StableDiffusion, config: SamplerConfig, mesh: Mesh
) -> Callable[[Sequence[str], Sequence[int]], UInt8[np.ndarray, "n H W 3"]]:
    """Returns draw(prompts, seeds) -> uint8 images, compiled once per number of prompts.

    The seed of an image decides its noise, whatever the batch, its place in it, or the devices. Prompts are split over
    all devices of the mesh, parameters over its `fsdp` axis; a number of prompts that does not divide is filled up.
    There are as many seeds as prompts, at least one, each from 0 to 2^32 - 1; `draw` raises UserError for others.
    Raises UserError for sizes that do not fit the networks, or steps that do not fit the schedule.
    """
    shape = latent_shape(config, model.networks)
    make_table(model.schedule, config.sampler, config.steps)
    split, whole = batch_sharding(mesh), replicated(mesh)
    params = jax.device_put(model.params, place(model.params, FSDP_RULES, mesh))
    empty = jax.device_put(model.tokenize([config.negative])[0], whole)
    graphs = make_graphs(model.networks, model.schedule, model.unet.dtype)
    # what the program does not depend on is left out, so that no other value of it compiles anew
    program = _compiled(graphs, replace(config, negative="", size=None), shape, split)

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> UInt8[np.ndarray, "n H W 3"]:
        count = len(prompts)
        if not count or len(seeds) != count or not all(0 <= seed < 2**32 for seed in seeds):
            raise UserError(
                f"seeds: {len(seeds)} for {count} prompts; give one for each of at least one prompt, from 0 to 2^32 - 1"
            )
        fill = -count % mesh.size
        ids = np.pad(model.tokenize(prompts), ((0, fill), (0, 0)), mode="edge")
        numbers = np.pad(np.asarray(seeds, np.uint32), (0, fill), mode="edge")
        images = program(params, jax.device_put(ids, split), empty, jax.device_put(numbers, split))
        return np.asarray(images)[:count]

    return draw


def image_size(config: SamplerConfig, networks: DiffusionConfig) -> tuple[int, int]:
    """Returns height and width of the images, pixels. Raises UserError for a size that does not fit the networks."""
    side = networks.unet.sample_size * networks.vae.factor
    size = config.size or (side, side)
    check_size(size, networks)
    return size


def latent_shape(config: SamplerConfig, networks: DiffusionConfig) -> tuple[int, int, int]:
    """Returns the shape of the latents of an image; raises UserError as `image_size`."""
    height, width = (side // networks.vae.factor for side in image_size(config, networks))
    return height, width, networks.unet.in_channels


def check_size(size: tuple[int, int], networks: DiffusionConfig, name: str = "size") -> None:
    """Raises UserError unless the networks can halve a height and width, in pixels; `name` is the option of them."""
    multiple = networks.vae.factor * networks.unet.factor
    if any(side < multiple or side % multiple for side in size):
        near = "x".join(str(max(1, round(side / multiple)) * multiple) for side in size)
        height, width = size
        raise UserError(f"{name}: {height}x{width} are no multiples of {multiple} pixels; {near} would be")


@dataclass(frozen=True)
class Graphs:
    """What of a model is fixed at compile time; equal for all snapshots of a personalisation."""

    unet: nnx.GraphDef
    vae: nnx.GraphDef
    text_encoder: nnx.GraphDef
    schedule: ScheduleConfig
    scale: float


def make_graphs(
    networks: DiffusionConfig, schedule: ScheduleConfig, dtype: DTypeLike = jnp.float32, remat: Remat = "none"
) -> Graphs:
    """Returns the graphs of networks that compute in `dtype`; `remat` is that of the UNet."""
    kind = jnp.dtype(dtype)
    return Graphs(
        network_graph("unet", networks.unet, kind, remat=remat)[0],
        network_graph("vae", networks.vae, kind)[0],
        network_graph("text_encoder", networks.text_encoder, kind)[0], schedule, networks.vae.scale,
    )  # fmt: skip


@functools.lru_cache(maxsize=4)
def _compiled(model: Graphs, config: SamplerConfig, shape: tuple[int, int, int], split: NamedSharding) -> Program:
    return jax.jit(make_program(model, config, shape), out_shardings=split)


def make_program(model: Graphs, config: SamplerConfig, shape: tuple[int, int, int]) -> Program:
    """Returns the pure function (params, ids, ids of no caption, seeds) -> images; `shape` is that of a latent.

    `params` is a tree like `StableDiffusion.params`.
    """

    def program(params: Any, ids: Array, empty: Array, seeds: Array) -> Array:
        encoder = nnx.merge(model.text_encoder, params["text_encoder"])
        context = encoder.hidden(ids)
        predict = nnx.merge(model.unet, params["unet"])
        denoise: Denoise
        if config.guidance == 1:
            denoise = lambda x, time: predict(x, jnp.broadcast_to(time, len(x)), context)  # noqa: E731
        else:
            denoise = guided(predict, context, encoder.hidden(empty[None])[0], config.guidance)
        # named, since other generators give under vmap what depends on the whole batch
        keys = jax.vmap(functools.partial(jax.random.key, impl="threefry2x32"))(seeds)
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        latents = sample(denoise, noise, model.schedule, sampler=config.sampler, steps=config.steps)
        images = nnx.merge(model.vae, params["vae"]).decode(latents / model.scale)
        return jnp.round(jnp.clip((images + 1) * 127.5, 0, 255)).astype(jnp.uint8)

    return program
