"""The stage that draws a set of images: a model and its filters, opened and run over all devices of a process."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from fmda.diffusion.draw import SamplerConfig, image_size, make_draw
from fmda.diffusion.filters import (
    Filter,
    ImageFilter,
    NearDuplicate,
    PromptFilter,
    long_prompt,
    textured,
    unclipped,
)
from fmda.diffusion.generate import generate
from fmda.diffusion.load import StableDiffusion, load_stable_diffusion
from fmda.diffusion.manifest import SHEET, SUMMARY, Prompt
from fmda.evaluate.sections import Section, write_sections
from fmda.methods.generate.checks import check, local_mesh, text_filters
from fmda.methods.generate.copies import write_copies
from fmda.methods.generate.settings import Config, FilterConfig, make_prompts
from fmda.methods.generate.vision import JUDGE, VisionJudge
from fmda.methods.judges import clip_score, embed, grid_share
from fmda.runs.stages import Stage
from fmda.weights import files
from fmda.weights.load import load_clip


def stages(config: Config) -> list[Stage]:
    """Returns images and, where they are to be compared with a training image, copies."""
    # always: a deleted image is generated again, and another model in the same place is refused
    images = Stage("images", functools.partial(_images, config), config, always=True)
    if config.copies is None:
        return [images]
    copies = config.copies
    compare = Stage(
        "copies", lambda folder, done: write_copies(copies, done["images"], folder), copies, ("images",), alone=True
    )
    return [images, compare]


ORIGIN = "personalised.json"
"""File in the folder of a personalised model: fingerprint of the base model, steps, token and prompt."""


@dataclass(frozen=True, kw_only=True)
class Facts(SamplerConfig):
    """What determines an image besides prompt, seed and filters; written to every line of the manifest.

    Attributes:
        dtype: that the networks compute in.
        checkpoint: fingerprint of the model.
        personalised: content of `ORIGIN`, for a personalised model.
    """

    dtype: str
    checkpoint: str
    personalised: Mapping[str, Any] | None = None


def draw_images(
    config: Config,
    model: StableDiffusion,
    folder: Path,
    origin: Mapping[str, Any] | None = None,
    task: str = "generate",
) -> dict[str, Any]:
    """Fills a folder with the images of a model that is loaded already; returns counts.

    `origin` is the content of `ORIGIN` where the model was personalised, `task` the name in the progress line.
    """
    prompts = make_prompts(config.prompts)
    draw = make_draw(model, config.sample, local_mesh(config))
    sample = replace(config.sample, size=image_size(config.sample, model.networks))
    facts = Facts(**vars(sample), dtype=config.dtype, checkpoint=model.fingerprint, personalised=origin)
    prompt_filters = text_filters(config.filters)
    if config.filters.long_prompt:
        prompt_filters.append(long_prompt(model.tokenizer.length, model.text_encoder.config.context))
    filters, duplicates = image_filters(config.filters, prompts, prompt_filters)
    manifest = generate(
        draw, prompts, folder, count=config.count, batch=config.batch, seed=config.seed, facts=facts,
        filters=filters, duplicates=duplicates, prompt_filters=prompt_filters, tries=config.tries,
        process_index=jax.process_index(), process_count=jax.process_count(),
        wait=multihost_utils.sync_global_devices if jax.process_count() > 1 else lambda what: None,
        task=task,
    )  # fmt: skip
    counts: dict[str, Any] = {"images": len(manifest), "refused": dict(manifest.refused)}
    if config.filters.judge is not None:
        counts["without_verdict"] = sum(image.scores[JUDGE] is None for image in manifest)
    return counts


def _images(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    # checked before the networks are loaded, which takes long and may exceed the memory
    model = load_stable_diffusion(check(config) or config.model, dtype=jnp.dtype(config.dtype), on_host=True)
    origin = model.folder / ORIGIN
    counts = draw_images(config, model, folder, files.read_json(origin) if origin.is_file() else None)
    if jax.process_index() == 0:
        refused = ", ".join(f"{number} by {name}" for name, number in counts["refused"].items()) or "none"
        made = f"{counts['images']} images by {config.model}"
        if dropped := files.read_json(folder / SUMMARY)["refused_prompts"]:
            made += f"; prompts refused: {', '.join(f'{number} by {name}' for name, number in dropped.items())}"
        if silent := counts.get("without_verdict"):
            made += f"; {silent} judged by the CLIP, as the vision-language judge gave no verdict"
        text = f"{made}; refused and generated again: {refused}. The first image of each prompt."
        write_sections(folder, [Section("Images from prompts", text, image=SHEET)])
    return counts


def image_filters(
    config: FilterConfig, prompts: Sequence[Prompt], prompt_filters: Sequence[PromptFilter]
) -> tuple[list[Filter], NearDuplicate | None]:
    """Returns the configured filters of images, all with one CLIP; edited prompts have to pass the prompt filters."""
    chosen: list[Filter] = [
        make(least) for make, least in ((unclipped, config.unclipped), (textured, config.textured)) if least is not None
    ]
    if config.judge is not None:
        chosen.append(VisionJudge(config.judge, prompt_filters))
    if not config.judge_images:
        return chosen, None
    clip = load_clip(config.clip)
    names = list(dict.fromkeys(prompt.class_name for prompt in prompts if prompt.class_name))

    def cosines(images: np.ndarray, prompts: Sequence[Prompt]) -> list[float]:
        return clip_score(clip, images, [prompt.text for prompt in prompts]).tolist()

    def shares(images: np.ndarray, prompts: Sequence[Prompt]) -> list[float | None]:
        rows = grid_share(clip, names, images).tolist()
        return [row[names.index(p.class_name)] if p.class_name else None for row, p in zip(rows, prompts, strict=True)]

    chosen += [
        ImageFilter(name, what, score, least, clip.fingerprint, "" if config.judge is None else JUDGE)
        for name, what, score, least in (
            ("clip_score", "cosine of image and prompt", cosines, config.clip_score),
            ("class_presence", "share of the prompt's class", shares, config.class_presence),
        )
        if least is not None
    ]
    if config.near_duplicate is None:
        return chosen, None
    return chosen, NearDuplicate(functools.partial(embed, clip), config.near_duplicate, clip.fingerprint)
