"""Verification of a checkpoint before it is used: what is in it, what is missing, and whether it computes the same."""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fmda import trees
from fmda.errors import UserError
from fmda.models.dino import dino
from fmda.models.module import abstract
from fmda.weights import clip as clip_weights
from fmda.weights import clip_tables, diffusers, diffusers_tables, dino_tables, files
from fmda.weights import dino as dino_weights
from fmda.weights.clip import LoadedClip, clip_graph, store
from fmda.weights.source import resolve, weight_file
from fmda.weights.table import Faults, Table
from fmda.weights.tokenizer import Tokenizer, has_tokenizer

RECORD = "io.npz"
"""File of recorded inputs and outputs beside the weights, images and latents [B, C, H, W].

CLIP: `pixel_values`, `input_ids` [B, T] -> L2-normalised `image_embeds`, `text_embeds`. UNet: `sample`, `timesteps`,
`encoder_hidden_states` -> `out`. Autoencoder: `image` -> `mean`, `logvar` [B, h, w, c]; `latents` -> `decoded`. Text
encoder: `input_ids` -> `last_hidden_state`."""

TOLERANCE = 1e-4
"""Largest deviation that counts as equal (float32, highest matmul precision): of unit-length embeddings as it is, of
other outputs relative to the largest recorded value."""

_LAYOUTS: dict[int, str] = {
    id(clip_tables.HF_CLIP): "Hugging Face CLIP",
    id(clip_tables.HF_FLAX_CLIP): "Hugging Face CLIP, Flax",
    id(clip_tables.OPEN_CLIP_VIT): "OpenCLIP, vision transformer",
    id(clip_tables.OPEN_CLIP_RESNET): "OpenCLIP, ModifiedResNet",
    id(clip_tables.OPEN_CLIP_CONVNEXT): "OpenCLIP, ConvNeXt",
    id(dino_tables.DINO): "DINO",
    id(dino_tables.HF_VIT): "Hugging Face ViT",
    **{id(table): "diffusers UNet" for table in diffusers_tables.UNET.values()},
    **{id(table): "diffusers UNet, Flax" for table in diffusers_tables.FLAX_UNET.values()},
    id(diffusers_tables.VAE): "diffusers autoencoder",
    id(diffusers_tables.OLD_VAE): "diffusers autoencoder, names before 0.18",
    id(diffusers_tables.FLAX_VAE): "diffusers autoencoder, Flax",
    id(diffusers_tables.TEXT_ENCODER): "Hugging Face text encoder",
    id(diffusers_tables.BARE_TEXT_ENCODER): "Hugging Face text encoder, bare names",
    id(diffusers_tables.FLAX_TEXT_ENCODER): "Hugging Face text encoder, Flax",
}


@dataclass
class CheckReport:
    """What `verify` found. `ok` where the checkpoint can be used as it is."""

    folder: str
    file: str
    layout: str
    parameters: int
    """Scalars in the file that the model takes, running statistics included."""
    dtypes: dict[str, int]
    """Number of stored arrays by dtype."""
    missing: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)
    fingerprint: str | None = None
    tokenizer: str = "none needed"
    tokenizer_ok: bool = True
    deviations: dict[str, float] = field(default_factory=dict)
    """Largest absolute difference from each recorded output; empty where nothing is recorded."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        faults = self.missing or self.surplus or self.misshapen or self.not_finite
        return not faults and self.tokenizer_ok and all(d <= TOLERANCE for d in self.deviations.values())

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain values, `ok` included."""
        return asdict(self) | {"ok": self.ok}

    def text(self) -> str:
        """Returns the report as aligned lines for a terminal."""
        dtypes = ", ".join(f"{count} arrays {dtype}" for dtype, count in sorted(self.dtypes.items()))
        lines = [
            ("weights", self.file),
            ("layout", self.layout),
            ("parameters", f"{self.parameters:,} ({dtypes})"),
            ("missing", ", ".join(self.missing) or "none"),
            ("surplus", ", ".join(self.surplus) or "none"),
            ("wrong shape", ", ".join(self.misshapen) or "none"),
            ("not finite", ", ".join(self.not_finite) or "none"),
            ("tokenizer", self.tokenizer),
            ("fingerprint", self.fingerprint or "none, the arrays do not fit"),
            *((f"recorded {name}", f"differs by {value:.1e}") for name, value in self.deviations.items()),
            ("verdict", "good" if self.ok else "NOT GOOD"),
        ]
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:{width}}  {value}" for name, value in lines)


def verify(source: str | os.PathLike[str], revision: str | None = None) -> CheckReport:
    """Returns the report on a checkpoint of CLIP, DINO, or one network of a Stable Diffusion.

    `source` is a folder, the name of a packaged model, or a hub id. Names that are missing, surplus or misshapen are
    listed, not raised. Raises UserError where there is nothing to report on: no folder, no weights, a pickle, a damaged
    file, no configuration.
    """
    folder = resolve(source, revision, "any")
    if part := diffusers.part_of(folder):
        return verify_part(part, folder)[0]
    path = weight_file(folder)
    if _is_dino(folder, path):
        vit, table, arrays, _ = dino_weights.read_checkpoint(folder)
        _, shapes = abstract(lambda rngs: dino(vit, rngs=rngs))
        return _report(folder, path, table, arrays, shapes)[0]
    config, table, arrays, _ = clip_weights.read_checkpoint(folder)
    graphdef, shapes = clip_graph(config)
    report, params = _report(folder, path, table, arrays, shapes)
    try:
        report.tokenizer = "none, prompts cannot be encoded"
        if has_tokenizer(folder):
            tokenizer = Tokenizer(folder, config.text.eos_token_id, config.text.vocab_size)
            report.tokenizer = f"{tokenizer.vocab_size} tokens"
    except UserError as error:
        report.tokenizer, report.tokenizer_ok = str(error), False
    if params is not None:
        loaded = LoadedClip(config, graphdef, params)
        report.fingerprint = loaded.fingerprint
        if (folder / RECORD).is_file():
            report.deviations = _deviations(folder / RECORD, lambda given: _outputs(loaded, given))
    return report


def verify_part(part: str, folder: Path) -> tuple[CheckReport, trees.Tree | None]:
    """Returns the report on the folder of one network of a Stable Diffusion, and its parameters where they fit."""
    config, table, arrays, path = diffusers.read_part(part, folder)
    graphdef, shapes = diffusers.part_graph(part, config)
    report, params = _report(folder, path, table, arrays, shapes)
    if params is not None:
        report.fingerprint = diffusers.params_fingerprint(params, config)
        if (folder / RECORD).is_file():
            loaded = diffusers.LOADED[part](config, graphdef, params)
            report.deviations = _deviations(folder / RECORD, lambda given: _part_outputs(loaded, given), relative=True)
    return report, params


def record(clip: LoadedClip, folder: str | os.PathLike[str], *, seed: int = 0) -> Path:
    """Writes the outputs for drawn inputs beside the weights, for `verify` to compare on other machines."""
    side, text = clip.config.vision.image_size, clip.config.text
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, text.vocab_size, (3, text.context), dtype=np.int32)
    ids[:, -1] = ids.max() if text.eos_token_id == 2 else text.eos_token_id
    pixels = rng.normal(size=(2, 3, side, side)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        outputs = _outputs(clip, {"pixel_values": pixels, "input_ids": ids})
    path = Path(folder) / RECORD
    np.savez_compressed(
        path,
        pixel_values=pixels,
        input_ids=ids,
        image_embeds=outputs["image_embeds"],
        text_embeds=outputs["text_embeds"],
    )
    return path


def _is_dino(folder: Path, path: Path) -> bool:
    """Returns whether a folder's configuration or file names speak of a plain vision transformer."""
    if (folder / "open_clip_config.json").is_file():
        return False
    config = folder / "config.json"
    if config.is_file():
        return files.read_json(config).get("model_type") != "clip"
    return "cls_token" in files.read_arrays(path)


def _report(
    folder: Path, path: Path, table: Table, arrays: dict[str, np.ndarray], shapes: trees.Tree
) -> tuple[CheckReport, trees.Tree | None]:
    """Returns the part of the report that is about arrays, and the float32 parameters where they fit."""
    flat, faults = table.match(arrays, shapes)
    params = None if faults else store(trees.unflatten({key: flat[key] for key in trees.flatten(shapes)}), np.float32)
    report = CheckReport(
        folder=str(folder),
        file=path.name,
        layout=_LAYOUTS[id(table)],
        parameters=sum(array.size for array in flat.values()),
        dtypes=dict(Counter(str(array.dtype) for array in arrays.values())),
        missing=faults.missing,
        surplus=_surplus(faults),
        misshapen=faults.shapes,
        not_finite=[name for name, array in arrays.items() if not np.isfinite(array.astype(np.float32)).all()],
    )
    return report, params


def _surplus(faults: Faults) -> list[str]:
    """Returns the names that have no place, or more than one."""
    return faults.surplus + faults.ambiguous


def _outputs(clip: LoadedClip, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns L2-normalised embeddings."""
    image = np.asarray(clip.encode_image(given["pixel_values"].transpose(0, 2, 3, 1)))
    text = np.asarray(clip.encode_text(given["input_ids"]))
    return {
        "image_embeds": image / np.linalg.norm(image, axis=-1, keepdims=True),
        "text_embeds": text / np.linalg.norm(text, axis=-1, keepdims=True),
    }


def _part_outputs(loaded: diffusers.Loaded, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns what one network of a Stable Diffusion makes of recorded inputs."""
    last, first = (0, 2, 3, 1), (0, 3, 1, 2)
    if isinstance(loaded, diffusers.LoadedUNet):
        out = loaded(given["sample"].transpose(last), given["timesteps"], given["encoder_hidden_states"])
        return {"out": np.asarray(out).transpose(first)}
    if isinstance(loaded, diffusers.LoadedVae):
        mean, logvar = map(np.asarray, loaded.encode(given["image"].transpose(last)))
        decoded = np.asarray(loaded.decode(given["latents"].transpose(last)))
        return {"mean": mean, "logvar": logvar, "decoded": decoded.transpose(first)}
    return {"last_hidden_state": np.asarray(loaded(given["input_ids"]))}


def _deviations(
    path: Path, outputs: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]], *, relative: bool = False
) -> dict[str, float]:
    """Returns {output: largest difference} against a recorded file, at full matmul precision."""
    try:
        with np.load(path) as file:
            recorded = {name: file[name] for name in file.files}
        with jax.default_matmul_precision("highest"):
            found = outputs(recorded)
        sizes = {name: np.abs(recorded[name]).max() if relative else 1.0 for name in found}
        return {name: float(np.abs(value - recorded[name]).max() / sizes[name]) for name, value in found.items()}
    except (OSError, KeyError, ValueError, TypeError, UserError) as error:
        raise UserError(f"{path}: not a usable record ({error}); delete it or record it again") from None
