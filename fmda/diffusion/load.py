"""Stable Diffusion as one object: all networks, tokenizer and schedule of a checkpoint in diffusers' layout."""

import functools
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Int

from fmda import trees
from fmda.diffusion.schedule import ScheduleConfig
from fmda.errors import UserError, did_you_mean
from fmda.models.catalog import DiffusionConfig
from fmda.models.clip import TextConfig
from fmda.models.sd_unet import Remat
from fmda.weights import files
from fmda.weights.checkpoint import Checkpoint, open_checkpoint, weight_fingerprint
from fmda.weights.network import Loaded, restore, save
from fmda.weights.source import PARTS, resolve
from fmda.weights.tokenizer import Tokenizer

SCHEDULER_FILE = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class StableDiffusion:
    """A latent diffusion model ready for use."""

    unet: Loaded
    vae: Loaded
    text_encoder: Loaded
    tokenizer: Tokenizer
    schedule: ScheduleConfig
    folder: Path

    @property
    def params(self) -> dict[str, trees.Tree]:
        """{"unet", "vae", "text_encoder"}: the parameters of all networks as one tree."""
        return {"unet": self.unet.params, "vae": self.vae.params, "text_encoder": self.text_encoder.params}

    @property
    def networks(self) -> DiffusionConfig:
        """The configurations of all networks."""
        return DiffusionConfig(self.unet.config, self.vae.config, self.text_encoder.config)

    def with_params(self, params: Mapping[str, trees.Tree]) -> "StableDiffusion":
        """Returns the model with other parameters of some networks; their number format must be the same.

        Raises UserError for the name of a network that is none.
        """
        for name in params:
            if name not in PARTS:
                raise UserError(f"params: '{name}' is none of {', '.join(PARTS)}{did_you_mean(name, PARTS)}")
        changed = {part: replace(getattr(self, part), params=tree, origin=None) for part, tree in params.items()}
        return replace(self, **changed)

    def as_saved(self) -> "StableDiffusion":
        """Returns the model that `load_stable_diffusion` opens after `save_stable_diffusion`; itself where it is that.

        It computes as PyTorch's diffusers does, with the same arrays as parameters. That differs for the UNet of a Flax
        release (see `UNetConfig.gate`), and for a schedule that Stable Diffusion is not run with.
        """
        unet, schedule = self.unet.as_saved(), self.schedule.in_stable_diffusion()
        if unet is self.unet and schedule == self.schedule:
            return self
        return replace(self, unet=unet, schedule=schedule)

    def tokenize(self, prompts: Sequence[str]) -> Int[np.ndarray, "b t"]:
        """Returns int32 ids [B, T], padded to the text encoder's whole context as the checkpoint was trained.

        A prompt that is too long is cut, and a warning shows what was lost.
        """
        ids, lost = self.tokenizer.padded(prompts, self.text_encoder.config.context)
        for prompt, rest in zip(prompts, lost, strict=True):
            if rest:
                warnings.warn(
                    f"prompt '{prompt}' is longer than the {self.text_encoder.config.context} tokens that "
                    f"{self.folder.name} reads; lost: '{rest}'",
                    stacklevel=2,
                )
        return ids

    @functools.cached_property
    def fingerprint(self) -> str:
        """12 hex digits that change with any parameter, the configuration, or the schedule.

        A checkpoint's is that of what it stores, whichever `dtype` it is loaded in.
        """
        return weight_fingerprint({}, *(getattr(self, part).fingerprint for part in PARTS), self.schedule)


class Checked(NamedTuple):
    """An opened checkpoint whose parts are all there and fit each other; no arrays are read yet."""

    folder: Path
    parts: Mapping[str, Checkpoint]
    schedule: ScheduleConfig
    tokenizer: Tokenizer

    @property
    def networks(self) -> DiffusionConfig:
        """The configurations of all networks."""
        return DiffusionConfig(**{part: opened.config for part, opened in self.parts.items()})


def check_stable_diffusion(source: str | os.PathLike[str], revision: str | None = None) -> Checked:
    """Returns an opened checkpoint, for `load_stable_diffusion`; no arrays are read.

    `source` and `revision` as there; a checkpoint on the hub is downloaded. Raises UserError for components, weight
    files or shards that are missing, for pickles and safetensors cut short, for what cannot be built or run here, and
    for networks, tokenizer or schedule that do not fit each other. Array shapes are checked on loading.
    """
    folder = resolve(source, revision, "diffusers")
    parts = open_parts(folder)
    check_fit(folder, parts)
    return Checked(folder, parts, read_schedule(folder), read_tokenizer(folder, parts["text_encoder"].config))


def load_stable_diffusion(
    source: str | os.PathLike[str] | Checked,
    revision: str | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: Remat = "none",
    *,
    on_host: bool = False,
) -> StableDiffusion:
    """Returns the diffusion model of a folder in diffusers' layout, a model of the package, or a hub id.

    `source` may also be what `check_stable_diffusion` returned. Networks are read as by `load_unet`; `dtype` is what
    they compute in and are kept in. Raises UserError that names every missing component, for weights that do not fit,
    and for networks, tokenizer or schedule that do not fit each other.
    """
    known = source if isinstance(source, Checked) else check_stable_diffusion(source, revision)
    unet = restore(known.parts["unet"], dtype, on_host=on_host, remat=remat)
    vae, text = (restore(known.parts[part], dtype, on_host=on_host) for part in ("vae", "text_encoder"))
    return StableDiffusion(unet, vae, text, known.tokenizer, known.schedule, known.folder)


def is_stable_diffusion(folder: Path) -> bool:
    """Returns whether a folder looks like a whole checkpoint in diffusers' layout, perhaps with parts missing."""
    return (folder / "model_index.json").is_file() or any((folder / part / "config.json").is_file() for part in PARTS)


def open_parts(folder: Path) -> dict[str, Checkpoint]:
    """Returns the opened networks by `PARTS`. Raises UserError that names every component which the folder lacks."""
    missing = [part for part in PARTS if not (folder / part / "config.json").is_file()]
    if not (folder / SCHEDULER_FILE).is_file():
        missing.append("scheduler")
    if not (folder / "tokenizer").is_dir():
        missing.append("tokenizer")
    if missing:
        raise UserError(
            f"{folder}: no {', '.join(missing)} in it; give a folder in diffusers' layout, with all of its parts"
        )
    return {part: open_checkpoint(part, folder / part) for part in PARTS}


def check_fit(folder: Path, parts: Mapping[str, Checkpoint]) -> None:
    """Raises UserError for networks of which one does not read what another gives."""
    unet, vae, text = (parts[part].config for part in ("unet", "vae", "text_encoder"))
    if unet.context_width != text.width or {unet.in_channels, unet.out_channels} != {vae.latent_channels}:
        raise UserError(
            f"{folder}: its UNet reads {unet.context_width}-wide texts and makes {unet.out_channels}-channel latents "
            f"of {unet.in_channels}-channel ones, the others give {text.width} and {vae.latent_channels}; "
            "take all parts from one checkpoint"
        )


def read_schedule(folder: Path) -> ScheduleConfig:
    """Returns the schedule that a checkpoint's folder is run with. Raises UserError for one that does not exist here.

    A warning is issued where the file differs from `ScheduleConfig.in_stable_diffusion`.
    """
    path = folder / SCHEDULER_FILE
    named = ScheduleConfig.from_json(files.read_json(path), path)
    schedule = named.in_stable_diffusion()
    if schedule != named:
        warnings.warn(
            f"{path}: steps_offset counts as 1 and clip_sample as false, as in diffusers' StableDiffusionPipeline, "
            "whatever the file says; set them so",
            stacklevel=2,
        )
    return schedule


def read_tokenizer(folder: Path, text: TextConfig) -> Tokenizer:
    """Returns the tokenizer of a checkpoint's folder. Raises UserError for one of another text encoder."""
    return Tokenizer(folder / "tokenizer", text.eos_token_id, text.vocab_size)


def save_stable_diffusion(
    folder: str | os.PathLike[str],
    model: StableDiffusion,
    *,
    dtype: DTypeLike | None = None,
) -> Path:
    """Writes a checkpoint that `load_stable_diffusion` and PyTorch's diffusers open. Returns the folder.

    Arrays are stored in `dtype`, by default in their own. What is written computes as `model.as_saved()`; a warning
    tells where `model` does not. The folder appears when all is written. Raises UserError where it is there already and
    not empty, or cannot be written, or where parameters do not fit.
    """
    folder = Path(folder)
    saved = model.as_saved()
    if saved is not model:
        warnings.warn(
            f"{folder}: will compute as PyTorch's diffusers does, which is not quite what this model computed; "
            "take model.as_saved() to compute the same here",
            stacklevel=2,
        )
    model = saved
    with files.new_folder(folder) as new:
        for part in PARTS:
            save(part, new / part, getattr(model, part).config, getattr(model, part).params, dtype=dtype)
        write_rest(new, model.tokenizer, model.text_encoder.config.context, model.schedule)
    return folder


def write_rest(folder: Path, tokenizer: Tokenizer, context: int, schedule: ScheduleConfig) -> None:
    """Writes tokenizer, schedule and index beside a checkpoint's networks; texts have `context` tokens.

    Raises OSError or UserError where the folder cannot be written.
    """
    words = folder / "tokenizer"
    words.mkdir()
    (folder / "scheduler").mkdir()
    for file in tokenizer.files():
        shutil.copyfile(file, words / file.name)
    # diffusers pads and cuts to the length that this file names
    path = words / "tokenizer_config.json"
    config = files.read_json(path) if path.is_file() else {"tokenizer_class": "CLIPTokenizer"}
    if config.get("model_max_length") != context:
        files.write_json(path, config | {"model_max_length": context})
    values = schedule.to_json()
    files.write_json(folder / SCHEDULER_FILE, values)
    files.write_json(folder / "model_index.json", _index(values["_class_name"]))


def _index(scheduler: str) -> dict[str, Any]:
    """Returns the `model_index.json` object that StableDiffusionPipeline opens, without a safety checker."""
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
