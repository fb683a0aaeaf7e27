"""Image sets from prompts by a latent diffusion model: the kind `generate`, which DATUM and CLOUDS feed.

The folder of the stage `images` holds the images, `manifest.jsonl` and a contact sheet (`fmda.diffusion.generate`).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from fmda import trees
from fmda.config import FREE
from fmda.diffusion.draw import SamplerConfig, image_size, make_draw
from fmda.diffusion.filters import BannedWords, ClassPresence, ClipScore, DuplicatePrompt, LongPrompt, NearDuplicate
from fmda.diffusion.filters import PromptFilter as AnyPromptFilter
from fmda.diffusion.generate import SHEET, generate
from fmda.diffusion.load import StableDiffusion, load_stable_diffusion
from fmda.diffusion.manifest import Prompt
from fmda.errors import UserError
from fmda.evaluate.sections import Section, write_sections
from fmda.mesh import make_mesh
from fmda.methods.judges import clip_score, embed, grid_share
from fmda.methods.pipeline import Plan, Stage
from fmda.models.catalog import ENTRIES, DiffusionConfig
from fmda.perf.diffusion_flops import sampling_flops, unet_flops, vae_decode_flops
from fmda.perf.diffusion_memory import generation_memory, unet_sampling_bytes, vae_decode_bytes
from fmda.perf.flops import text_flops
from fmda.perf.memory import device_memory
from fmda.weights.clip import load_clip
from fmda.weights.diffusers import part_graph, read_config
from fmda.weights.source import PARTS, asset_names, assets_folder, resolve

THINGS: dict[str, str] = {
    "traffic light": "traffic lights",
    "traffic sign": "traffic signs",
    "person": "persons",
    "rider": "riders",
    "car": "cars",
    "truck": "trucks",
    "train": "trains",
    "bus": "buses",
    "motorcycle": "motorcycles",
    "bicycle": "bicycles",
}
"""Cityscapes' classes that DATUM prompts for, in its order, and their plurals."""

GIB = 2**30
LIMIT = " (XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 lets JAX take more of a GPU)"
MACHINES = (("80 GB card", 1, 80e9), ("v5e-8 slice", 8, 16.0 * GIB))
"""What a plan is made for: name, devices, bytes of each."""


@dataclass(frozen=True)
class PromptConfig:
    """What to draw. Give `form` and `classes`, or `file`, or `texts`.

    Attributes:
        form: prompt with the slots {token} and {classes} (plural) or {class} (singular).
        token: the rare word of a personalised model.
        classes: of `THINGS`; each gives a prompt, in this order.
        file: a text file with one prompt on each line.
        texts: prompts as they are.
    """

    form: str = "a photo of {token} {classes}"
    token: str = "sks"
    classes: tuple[str, ...] = tuple(THINGS)
    file: str | None = None
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class FilterConfig:
    """What is refused; None leaves a filter out. Scores and presence are read from the images by a CLIP.

    Attributes:
        clip: the CLIP that judges.
        clip_score: least cosine of an image and its prompt.
        near_duplicate: largest cosine of two images.
        class_presence: least share of a 4 x 4 grid of crops in which the prompt's class is the likeliest of all.
        banned: words that no prompt may hold.
        long_prompt: whether prompts that the text encoder does not read to their end are refused; else they are cut,
            with a warning that shows what was lost.
    """

    clip: str = "openai/clip-vit-base-patch16"
    clip_score: float | None = None
    near_duplicate: float | None = None
    class_presence: float | None = None
    banned: tuple[str, ...] = ()
    long_prompt: bool = False


@dataclass(frozen=True)
class Config:
    """A set of images.

    Attributes:
        model: a latent diffusion model: folder in diffusers' layout, model of the package, or hub id.
        revision: of a hub id.
        prompts: what to draw.
        count: images; image j shows prompt j modulo their number. A later run may ask for more.
        batch: images drawn at once, on all devices of a process.
        seed: decides every image, together with its index.
        sample: how images are sampled.
        filters: what is refused and drawn again.
        tries: images of one index at most.
        dtype: that the networks compute in.
        mesh: sizes of the axes data and fsdp within a process; -1 takes the rest of its devices.
        device_memory: GiB of a device; None asks the device, and checks nothing where it does not tell.
    """

    model: str
    revision: str | None = None
    prompts: PromptConfig = PromptConfig()
    count: int = field(default=2975, metadata=FREE)
    batch: int = field(default=8, metadata=FREE)
    seed: int = 0
    sample: SamplerConfig = SamplerConfig()
    filters: FilterConfig = FilterConfig()
    tries: int = field(default=8, metadata=FREE)
    dtype: Literal["float32", "bfloat16"] = "float32"
    mesh: tuple[int, int] = (-1, 1)
    device_memory: float | None = field(default=None, metadata=FREE)


def stages(config: Config) -> list[Stage]:
    """Returns the one stage, images. Raises UserError for prompts that cannot be made."""
    make_prompts(config.prompts)
    # always: an image that was deleted is drawn again, and another model in the same place is told
    return [Stage("images", functools.partial(_images, config), config, always=True)]


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
    except UserError as unknown:
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
        notes=(
            f"{config.count} images: {whole:,.4g} PFLOP on one device, {shares}",
            *(_fit(config, shapes, *machine) for machine in MACHINES),
            *notes,
        ),
    )


def read_shapes(model: str) -> DiffusionConfig:
    """Returns the configurations of a model's networks; never downloads.

    Raises UserError for a model that is neither a folder, nor in the package, nor in the catalogue.
    """
    folder = assets_folder() / model if model in asset_names() else Path(model).expanduser()
    if folder.is_dir():
        return DiffusionConfig(*(read_config(part, folder / part) for part in PARTS))
    for entry in ENTRIES:
        if model == entry.source and isinstance(entry.config, DiffusionConfig):
            return entry.config
    raise UserError(f"model: '{model}' is no folder and not in the catalogue; plan again when it is there")


def fetched_shapes(model: str, revision: str | None) -> DiffusionConfig:
    """Returns what `read_shapes` does, of a model that is downloaded first if it has to be."""
    return read_shapes(str(resolve(model, revision, "diffusers")))


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


def check_memory(config: Config, shapes: DiffusionConfig, devices: int, shards: int) -> None:
    """Raises UserError where a device cannot hold its share of a batch, and says by how much.

    Only where the device's memory is known: given as `device_memory`, or told by the device.
    """
    told = device_memory().get("limit") if config.device_memory is None else config.device_memory * GIB
    if told is None:
        return
    rows = -(-config.batch // devices)
    need = sum(memory(config, shapes, rows, shards).values())
    if need > told:
        fitting = _fitting(config, shapes, told, shards) * devices
        raise UserError(
            f"batch: {config.batch} needs about {need / GIB:.2f} GiB on each of {devices} "
            f"device{'s' if devices > 1 else ''}, {(need - told) / GIB:.2f} GiB more than the {told / GIB:.2f} GiB "
            f"there{LIMIT if config.device_memory is None else ''}; "
            f"{f'batch={fitting} fits' if fitting else 'not even one image fits'}; dtype=bfloat16, a smaller "
            "sample.size or more devices (mesh=) help too"
        )


def _checked_mesh(config: Config, shapes: DiffusionConfig) -> Mesh:
    """Returns this process's mesh. Raises UserError where one of its devices cannot hold its share of a batch."""
    mesh = make_mesh(*config.mesh, devices=jax.local_devices())
    check_memory(config, shapes, mesh.size, mesh.shape["fsdp"])
    return mesh


def _fitting(config: Config, shapes: DiffusionConfig, limit: float, shards: int) -> int:
    """Returns how many images a device of so many bytes draws at once."""
    one, two = (sum(memory(config, shapes, rows, shards).values()) for rows in (1, 2))
    return 0 if one > limit else 1 + int((limit - one) // (two - one))


def _fit(config: Config, shapes: DiffusionConfig, what: str, devices: int, limit: float) -> str:
    """Returns a line that says how many images each device of a machine draws at once."""
    shards = _shards(config, devices)
    one = sum(memory(config, shapes, 1, shards).values())
    if one > limit:
        return f"{what}: does not fit, {(one - limit) / GIB:.2f} GiB short on each of {devices} with one image"
    most = _fitting(config, shapes, limit, shards)
    return f"{what}: {one / GIB:.2f} of {limit / GIB:.2f} GiB with one image a device; {most} fit at once"


def _shards(config: Config, devices: int) -> int:
    """Returns the size that the axis fsdp has on so many devices, 1 where the configured one does not fit."""
    data, fsdp = config.mesh
    if fsdp == -1:
        return devices // data if devices % data == 0 else 1
    return fsdp if devices % fsdp == 0 else 1


@functools.lru_cache(maxsize=4)
def _counts(shapes: DiffusionConfig) -> dict[str, int]:
    return {part: trees.count(part_graph(part, getattr(shapes, part))[1]) for part in PARTS}


def make_prompts(config: PromptConfig) -> list[Prompt]:
    """Returns the prompts in order. Raises UserError for an unknown class, slot, or empty file."""
    if config.texts:
        return [Prompt(text) for text in config.texts]
    if config.file is not None:
        try:
            lines = Path(config.file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"prompts.file: {config.file} cannot be read ({error}); name a text file") from None
        texts = [line.strip() for line in lines if line.strip()]
        if not texts:
            raise UserError(f"prompts.file: {config.file} holds no prompt; write one on each line")
        return [Prompt(text) for text in texts]
    if not config.classes:
        raise UserError("prompts.classes: names no class; give some, or a file or texts")
    prompts = []
    for index, name in enumerate(config.classes):
        if name not in THINGS:
            raise UserError(f"prompts.classes: '{name}' is not one of {', '.join(THINGS)}; correct it or give texts")
        try:
            text = config.form.format(**{"token": config.token, "class": name, "classes": THINGS[name]})
        except (KeyError, IndexError, ValueError, AttributeError, TypeError):
            raise UserError(
                f"prompts.form: '{config.form}' has another slot than {{token}}, {{class}}, {{classes}}; mend it"
            ) from None
        prompts.append(Prompt(" ".join(text.split()), index, name))
    return prompts


def draw_images(config: Config, model: StableDiffusion, folder: Path) -> dict[str, Any]:
    """Fills a folder with the images of a model that is loaded already; returns counts."""
    prompts = make_prompts(config.prompts)
    mesh = _checked_mesh(config, DiffusionConfig(model.unet.config, model.vae.config, model.text_encoder.config))
    sample = config.sample
    facts = {
        "sampler": sample.sampler,
        "steps": sample.steps,
        "guidance": sample.guidance,
        "negative": sample.negative,
        "size": list(image_size(sample, model.unet.config, model.vae.config)),
        "dtype": config.dtype,
        "checkpoint": model.fingerprint,
    }
    prompt_filters: list[AnyPromptFilter] = [DuplicatePrompt()]
    if config.filters.long_prompt:
        prompt_filters.append(LongPrompt(model.tokenizer.length, model.text_encoder.config.context))
    if config.filters.banned:
        prompt_filters.append(BannedWords(config.filters.banned))
    manifest = generate(
        make_draw(model, sample, mesh), prompts, folder, count=config.count, batch=config.batch, seed=config.seed,
        facts=facts, filters=image_filters(config.filters, prompts), prompt_filters=prompt_filters, tries=config.tries,
        process_index=jax.process_index(), process_count=jax.process_count(),
        wait=multihost_utils.sync_global_devices if jax.process_count() > 1 else None,
    )  # fmt: skip
    return {"images": len(manifest), "refused": dict(manifest.refused)}


def _images(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    # before the networks are loaded, which might be too large already
    _checked_mesh(config, fetched_shapes(config.model, config.revision))
    model = load_stable_diffusion(config.model, config.revision, jnp.dtype(config.dtype))
    counts = draw_images(config, model, folder)
    if jax.process_index() == 0:
        refused = ", ".join(f"{number} by {name}" for name, number in counts["refused"].items()) or "none"
        made = f"{counts['images']} images by {config.model}"
        text = f"{made}; refused and drawn again: {refused}. Shown is the first of each prompt."
        write_sections(folder, [Section("Images from prompts", text, image=SHEET)])
    return counts


def image_filters(config: FilterConfig, prompts: Sequence[Prompt]) -> list[Any]:
    """Returns the filters that a configuration asks for, all with one CLIP."""
    if config.clip_score is None and config.near_duplicate is None and config.class_presence is None:
        return []
    clip = load_clip(config.clip)
    found: list[Any] = []
    if config.clip_score is not None:
        found.append(ClipScore(functools.partial(clip_score, clip), config.clip_score, clip.fingerprint))
    if config.class_presence is not None:
        names = tuple(prompt.class_name or "" for prompt in prompts)
        found.append(ClassPresence(functools.partial(grid_share, clip, names), config.class_presence, clip.fingerprint))
    if config.near_duplicate is not None:
        found.append(NearDuplicate(functools.partial(embed, clip), config.near_duplicate, clip.fingerprint))
    return found
