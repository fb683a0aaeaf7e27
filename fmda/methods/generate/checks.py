"""Checks of a set of generated images before any network is loaded."""

import jax
from jax.sharding import Mesh

from fmda.diffusion.draw import image_size
from fmda.diffusion.filters import PromptFilter, banned_words, choose_prompts, duplicate_prompt, similar_prompt
from fmda.diffusion.load import Checked, check_stable_diffusion
from fmda.diffusion.samplers import make_table
from fmda.errors import UserError
from fmda.mesh import make_mesh
from fmda.methods.endpoint import check_endpoint
from fmda.methods.generate.cost import check_memory
from fmda.methods.generate.settings import Config, FilterConfig, make_prompts
from fmda.places import below_data
from fmda.runs.stages import pending
from fmda.weights import files
from fmda.weights.source import resolve, weight_file


def check(config: Config) -> Checked | None:
    """Returns the checked model, or None where it is pending; values that are `fmda.runs.stages.pending` are left out.

    Raises UserError for prompts, filters, sizes or batches that cannot work, and for damaged checkpoint folders.
    """
    mesh = local_mesh(config)
    if not pending(config.prompts.file):
        prompts = make_prompts(config.prompts)
        choose_prompts(prompts, text_filters(config.filters))
        if config.filters.class_presence is not None and not any(prompt.class_name for prompt in prompts):
            raise UserError(
                "filters.class_presence: the prompts name no class, as those of prompts.texts and of a text file never "
                "do; leave the filter out, or give prompts.classes or a prompts.jsonl"
            )
    if config.filters.judge is not None:
        check_endpoint(config.filters.judge, "filters.judge")
        if config.filters.clip_score is None and config.filters.class_presence is None:
            raise UserError(
                "filters.judge: set filters.clip_score or filters.class_presence too, for when it is silent"
            )
    if config.filters.judge_images:
        check_weights(config.filters.clip)
    if config.copies is not None:
        check_weights(config.copies.encoder)
        for path in (config.copies.image, config.copies.others):
            if path is not None and not pending(path) and not below_data(path).exists():
                raise UserError(f"copies: {path} does not exist; fix the path, or leave it out")
    if pending(config.model):
        return None
    model = check_stable_diffusion(config.model, config.revision)
    check_drawing(config, model, mesh.size, mesh.shape["fsdp"])
    return model


def check_drawing(config: Config, model: Checked, devices: int, shards: int, prefix: str = "") -> None:
    """Raises UserError for sizes and steps that do not fit a model, and batches that do not fit the devices.

    `prefix` is the place of the settings in the configuration, as `check_memory` takes it.
    """
    image_size(config.sample, model.networks)
    make_table(model.schedule, config.sample.sampler, config.sample.steps)
    check_memory(config, model.networks, devices, shards, prefix)


def check_weights(source: str) -> None:
    """Raises UserError unless a checkpoint is there and its `config.json`, if any, can be read. Downloads a hub id."""
    if not pending(source):
        folder = resolve(source)
        weight_file(folder)
        if (folder / "config.json").is_file():
            files.read_json(folder / "config.json")


def text_filters(config: FilterConfig) -> list[PromptFilter]:
    """Returns the filters of prompts that need no tokenizer."""
    return [
        duplicate_prompt(),
        *([banned_words(config.banned)] if config.banned else []),
        *([] if config.similar_prompt is None else [similar_prompt(config.similar_prompt)]),
    ]


def local_mesh(config: Config) -> Mesh:
    """Returns the mesh of the devices of this process."""
    return make_mesh(*config.mesh, devices=jax.local_devices())
