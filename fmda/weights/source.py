"""Where a checkpoint is: a folder, a model that comes with the package, or a repository on the Hugging Face hub."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import logging as hub_logging

from fmda.errors import UserError, did_you_mean
from fmda.places import assets_folder
from fmda.weights.files import PICKLES, is_index, is_pointer

_ENDINGS = ("safetensors", "msgpack", "index", "json")
_HALF = "fp16"

WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "flax_model.msgpack",
)
"""Names under which weights are looked for, best first. timm's repositories hold a bare trunk as model.safetensors."""

DIFFUSION_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_flax_model.msgpack",
)
"""Names of the weights of a UNet or an autoencoder in diffusers' layout, best first."""

TEXT_FILES = ("model.safetensors", "model.safetensors.index.json", "flax_model.msgpack")
"""Names of the weights of a text encoder in diffusers' layout, best first."""

PARTS = {"unet": DIFFUSION_FILES, "vae": DIFFUSION_FILES, "text_encoder": TEXT_FILES}
"""Folders of a Stable Diffusion checkpoint that hold weights."""

_NETWORK_FILES = (*DIFFUSION_FILES, *TEXT_FILES)

Layout = Literal["single", "diffusers", "any"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def asset_names() -> tuple[str, ...]:
    """Returns the names of the models that come with the package."""
    root = assets_folder()
    return tuple(sorted(p.name for p in root.iterdir() if p.is_dir())) if root.is_dir() else ()


def resolve(source: str | os.PathLike[str], revision: str | None = None, layout: Layout = "single") -> Path:
    """Returns the folder that holds the checkpoint, downloaded first if it has to be.

    `layout` selects the files of a repository: "single" one model, "diffusers" the parts of a Stable Diffusion or
    its one network, "any" what the repository holds.

    `source` is an existing folder, else the name of a model that comes with the package, else a hub id "owner/name" at
    `revision` (branch, tag or commit). With HF_HUB_OFFLINE=1 only the hub's local cache is used.
    Raises UserError where none of these leads to a folder.
    """
    name = os.fspath(source)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(f"{name}: is a file; give the folder that holds weights, configuration and tokenizer")
    if name in asset_names():
        return assets_folder() / name
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise UserError(
            f"{name}: no such folder, and no model of the package has that name"
            f"{did_you_mean(name, asset_names())}; give a folder or a hub id owner/name"
        )
    return _download(name, revision, layout)


def weight_file(folder: Path, names: Sequence[str] = WEIGHT_FILES) -> Path:
    """Returns the file that holds the weights. Raises UserError where there is none, or only a torch pickle.

    Files under the plain names go first, then float16 variants, then a single other variant. Git LFS pointers are
    passed over where a complete file lies beside them.
    """
    there = [folder / name for name in _ranked([path.name for path in folder.iterdir()], names, str(folder))]
    files = [path for path in there if path.is_file()]
    if files:
        return next((path for path in files if not is_pointer(path)), files[0])
    if there:
        raise UserError(f"{there[0]}: is a link to a file that is not there; copy or download the checkpoint again")
    if pair := named_pair(folder):
        return pair
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return pickles[0]  # reading it raises the error that explains how to convert it
    raise UserError(f"{folder}: holds no weights; one of {', '.join(names)} is needed")


def named_pair(folder: Path) -> Path | None:
    """Returns the one `NAME.safetensors` with its configuration beside it as `NAME.json`, or None without any.

    Raises UserError where a folder holds several.
    """
    pairs = sorted(path for path in folder.glob("[!.]*.safetensors") if path.with_suffix(".json").is_file())
    if len(pairs) > 1:
        raise UserError(f"{folder}: holds several networks, {', '.join(path.name for path in pairs)}; give one file")
    return pairs[0] if pairs else None


def _variant(name: str) -> tuple[str, str]:
    """Returns (name without variant, variant or ""): `model.fp16.safetensors` -> `model.safetensors`, `fp16`.

    The name of an index has its variant in any place: libraries and releases differ.
    """
    stem, *parts = name.split(".")
    plain = [part for part in parts if part in _ENDINGS]
    return ".".join([stem, *plain]), ".".join(part for part in parts if part not in _ENDINGS)


def _ranked(files: Sequence[str], names: Sequence[str], where: str) -> list[str]:
    """Returns those of the files that hold weights, best first: plain names, float16 variants, another single variant.

    Raises UserError where there are several other variants and nothing else.
    """
    ranks = {}
    for file in files:
        plain, variant = _variant(file)
        if plain in names and "-of-" not in variant:
            ranks[file] = (2 if variant not in ("", _HALF) else int(variant == _HALF), names.index(plain))
    ranked = sorted(ranks, key=lambda file: ranks[file])
    if len(ranked) > 1 and ranks[ranked[0]][0] == 2:
        raise UserError(
            f"{where}: holds several variants, {', '.join(sorted(ranked))}; keep one, or rename it to {names[0]}"
        )
    return ranked


def _download(name: str, revision: str | None, layout: Layout) -> Path:
    """Returns the local snapshot of a hub repository; of several weight files only the best one is fetched.

    Where the hub is out of reach, a snapshot downloaded before serves.
    """
    at = name if revision is None else f"{name} at {revision}"
    if not constants.HF_HUB_OFFLINE:
        try:
            with _quiet_hub():
                files = HfApi().list_repo_files(name, revision=revision)
            return Path(snapshot_download(name, revision=revision, allow_patterns=_wanted(files, at, layout)))
        except UserError:
            raise
        except GatedRepoError:
            raise UserError(f"{at}: the model is gated; request access on the hub, then run 'hf auth login'") from None
        except RepositoryNotFoundError:
            raise UserError(f"{at}: no such folder, and no such repository on the hub; check the name") from None
        except RevisionNotFoundError:
            raise UserError(f"{at}: the repository has no such revision; give a branch, tag or commit") from None
        except HFValidationError as error:
            raise UserError(f"{at}: not a hub id ({error}); give owner/name or a folder") from None
        except Exception as error:  # the HTTP library, and so its errors, changes between releases of the hub's client
            reason = f"the hub cannot be reached ({type(error).__name__})"
    else:
        reason = "the hub is switched off by HF_HUB_OFFLINE"
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, HFValidationError):
        raise UserError(
            f"{at}: no such folder, not in the hub's local cache, and {reason}; "
            "check the path, or download it once with the network on"
        ) from None


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keeps the hub's client from announcing each of its retries; their outcome is reported in one line."""
    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)


def _wanted(files: list[str], at: str, layout: Layout) -> list[str]:
    """Returns the patterns of a repository's small files and of its best weight file, or that of each part."""
    if layout == "single" or "model_index.json" not in files:
        names = {"single": WEIGHT_FILES, "diffusers": _NETWORK_FILES, "any": (*WEIGHT_FILES, *_NETWORK_FILES)}[layout]
        return ["*.json", "*.txt", "*.model", *_weights_wanted(files, at, names)]
    wanted = ["model_index.json", "tokenizer/*", "scheduler/*"]
    for part, names in PARTS.items():
        inside = [file.removeprefix(f"{part}/") for file in files if file.startswith(f"{part}/")]
        chosen = _weights_wanted(inside, f"{at}, {part}", names)
        wanted += [f"{part}/config.json", *(f"{part}/{name}" for name in chosen)]
    return wanted


def _weights_wanted(files: list[str], at: str, names: Sequence[str] = WEIGHT_FILES) -> list[str]:
    """Returns the patterns of the best weight file among a repository's files, with all its shards."""
    for name in _ranked(files, names, at)[:1]:
        return [name, *(file for file in files if is_index(name) and _shard_of(name, file))]
    if pickles := [file for file in files if Path(file).suffix in PICKLES]:
        raise UserError(
            f"{at}: holds its weights only as a torch pickle ({pickles[0]}), which is not read; "
            "download it and convert it to model.safetensors with safetensors.torch.save_file, then give the folder"
        )
    raise UserError(f"{at}: the repository holds none of {', '.join(names)}; give another one")


def _shard_of(index: str, file: str) -> bool:
    """Returns whether a file has the name of a shard that an index of that name lists."""
    plain, variant = _variant(index)
    stem, mark = re.escape(plain.split(".")[0]), rf"\.{re.escape(variant)}" if variant else ""
    # old releases name the variant after the number of the shard
    return re.fullmatch(rf"{stem}({mark}-\d+-of-\d+|-\d+-of-\d+{mark})\.safetensors", file) is not None
