"""Stable Diffusion as one object: all networks, tokenizer and schedule of a checkpoint in diffusers' layout."""

import functools
import hashlib
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Int

from fmda import trees
from fmda.diffusion.schedule import ScheduleConfig
from fmda.errors import UserError
from fmda.models.sd_unet import Remat
from fmda.weights import files
from fmda.weights.diffusers import (
    Config,
    LoadedTextEncoder,
    LoadedUNet,
    LoadedVae,
    load_text_encoder,
    load_unet,
    load_vae,
    save_part,
)
from fmda.weights.source import resolve
from fmda.weights.tokenizer import Tokenizer

SCHEDULER_FILE = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class StableDiffusion:
    """A latent diffusion model ready for use."""

    unet: LoadedUNet
    vae: LoadedVae
    text_encoder: LoadedTextEncoder
    tokenizer: Tokenizer
    schedule: ScheduleConfig
    folder: Path

    @property
    def params(self) -> dict[str, trees.Tree]:
        """{"unet", "vae", "text_encoder"}: the parameters of all networks as one tree."""
        return {"unet": self.unet.params, "vae": self.vae.params, "text_encoder": self.text_encoder.params}

    @property
    def size(self) -> int:
        """Side of the images it was trained on, pixels."""
        return self.unet.config.sample_size * self.vae.config.factor

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
        """12 hex digits that change with any parameter, the configuration, or the schedule."""
        return params_fingerprint(
            self.params, self.unet.config, self.vae.config, self.text_encoder.config, self.schedule
        )


def params_fingerprint(params: Mapping[Any, Any], *configs: Any) -> str:
    """Returns 12 hex digits that change with any parameter, any dtype, or a configuration."""
    digest = hashlib.blake2b(repr(configs).encode(), digest_size=6)
    for path, leaf in sorted(trees.flatten(params).items()):
        array = np.asarray(leaf)
        digest.update(f"{path}{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def load_stable_diffusion(
    source: str | os.PathLike[str],
    revision: str | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: Remat = "none",
) -> StableDiffusion:
    """Returns the diffusion model of a folder in diffusers' layout, a model of the package, or a hub id.

    Networks are read as by `load_unet`; `dtype` is what they compute in and are kept in. Raises UserError that names
    every missing component, for weights that do not fit, and for networks, tokenizer or schedule that do not fit
    each other.
    """
    folder = resolve(source, revision, "diffusers")
    wanted = ("unet/config.json", "vae/config.json", "text_encoder/config.json", SCHEDULER_FILE)
    missing = [name.split("/")[0] for name in wanted if not (folder / name).is_file()]
    if not (folder / "tokenizer").is_dir():
        missing.append("tokenizer")
    if missing:
        raise UserError(
            f"{folder}: no {', '.join(missing)} in it; give a folder in diffusers' layout, with all of its parts"
        )
    unet = load_unet(folder, dtype=dtype, remat=remat)
    vae, text = load_vae(folder, dtype=dtype), load_text_encoder(folder, dtype=dtype)
    if unet.config.context_width != text.config.width or unet.config.in_channels != vae.config.latent_channels:
        raise UserError(
            f"{folder}: its UNet reads {unet.config.context_width}-wide texts and {unet.config.in_channels}-channel "
            f"latents, the others give {text.config.width} and {vae.config.latent_channels}; "
            "take all parts from one checkpoint"
        )
    path = folder / SCHEDULER_FILE
    schedule = ScheduleConfig.from_json(files.read_json(path), str(path))
    tokenizer = Tokenizer(folder / "tokenizer", text.config.eos_token_id, text.config.vocab_size)
    return StableDiffusion(unet, vae, text, tokenizer, schedule, folder)


def save_stable_diffusion(
    folder: str | os.PathLike[str],
    model: StableDiffusion,
    params: Mapping[str, Any] | None = None,
    *,
    dtype: DTypeLike | None = None,
) -> Path:
    """Writes a checkpoint that `load_stable_diffusion` and PyTorch's diffusers open. Returns the folder.

    `params` replaces the model's own, whole or by network; arrays are stored in `dtype`, by default in their own.
    Raises UserError where the folder is there already and not empty, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already; name a new folder")
    params = {**model.params, **(params or {})}
    configs: dict[str, Config] = {
        "unet": model.unet.config,
        "vae": model.vae.config,
        "text_encoder": model.text_encoder.config,
    }
    for part, config in configs.items():
        save_part(folder / part, part, config, params[part], dtype)
    try:
        (folder / "tokenizer").mkdir(exist_ok=True)
        (folder / "scheduler").mkdir(exist_ok=True)
        for file in model.tokenizer.files():
            shutil.copyfile(file, folder / "tokenizer" / file.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); free the disk or choose another folder") from None
    schedule = model.schedule.to_json()
    files.write_json(folder / SCHEDULER_FILE, schedule)
    # last: what a reader looks for first
    files.write_json(folder / "model_index.json", _index(schedule["_class_name"]))
    return folder


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
