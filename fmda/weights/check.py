"""Verification of a checkpoint before it is used: what is in it, what is missing, and whether it computes the same."""

import functools
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
from fmda.weights.checkpoint import Checkpoint, family_of, network_graph, open_checkpoint, weight_fingerprint
from fmda.weights.network import Loaded
from fmda.weights.registry import FAMILIES
from fmda.weights.source import resolve
from fmda.weights.tokenizer import Tokenizer, has_tokenizer

RECORD = "io.npz"
"""File of recorded inputs and outputs beside the weights, images and latents [B, C, H, W].

CLIP: `pixel_values`, `input_ids` [B, T] -> L2-normalised `image_embeds`, `text_embeds`. UNet: `sample`, `timesteps`,
`encoder_hidden_states` -> `out`. Autoencoder: `image` -> `mean`, `logvar` [B, h, w, c]; `latents` -> `decoded`. Text
encoder: `input_ids` -> `last_hidden_state`."""

TOLERANCE = 1e-4
"""Largest deviation that counts as equal (float32, highest matmul precision): of unit-length embeddings as it is, of
other outputs relative to the largest recorded value."""


@dataclass
class CheckReport:
    """Contents and faults of a checkpoint; `ok` where it can be used as it is."""

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
        faults = self.missing or self.surplus or self.misshapen or self.not_finite
        return not faults and self.tokenizer_ok and all(d <= TOLERANCE for d in self.deviations.values())

    def to_json(self) -> dict[str, Any]:
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
    """Returns the report on a checkpoint of one network.

    `source` is a folder, the name of a packaged model, or a hub id. Names that are missing, surplus or misshapen are
    listed, not raised. Raises UserError where there is nothing to report on: no folder, no weights, a pickle, a damaged
    file, no configuration.
    """
    folder = resolve(source, revision, "any")
    return verify_network(open_checkpoint(family_of(folder), folder))


def verify_network(checkpoint: Checkpoint) -> CheckReport:
    """Returns what was checked of a network's file, with the arrays that do not fit."""
    row, folder, config = FAMILIES[checkpoint.family], checkpoint.folder, checkpoint.config
    arrays, shapes = checkpoint.arrays(), network_graph(checkpoint.family, config)[1]
    flat, faults = checkpoint.table.match(arrays, shapes)
    report = CheckReport(
        folder=str(folder),
        file=checkpoint.file.name,
        layout=checkpoint.table.layout,
        parameters=sum(array.size for array in flat.values()),
        dtypes=dict(Counter(str(array.dtype) for array in arrays.values())),
        missing=faults.missing,
        surplus=faults.surplus + faults.ambiguous,
        misshapen=faults.shapes,
        not_finite=[name for name, array in arrays.items() if not np.isfinite(array.astype(np.float32)).all()],
    )
    if row.tokenizer:
        report.tokenizer, report.tokenizer_ok = _tokenizer(folder, config.text)
    if not str(faults):
        params = trees.unflatten({path: np.asarray(flat[path], np.float32) for path in trees.flatten(shapes)})
        report.fingerprint = weight_fingerprint(params, config)
        if row.replay is not None and (folder / RECORD).is_file():
            replay = functools.partial(row.replay, Loaded(checkpoint.family, config, params))
            report.deviations = _deviations(folder / RECORD, replay, row.relative)
    return report


def _tokenizer(folder: Path, text: Any) -> tuple[str, bool]:
    """Returns (state of the tokenizer in a folder, whether it can be used)."""
    if not has_tokenizer(folder):
        return "none, prompts cannot be encoded", True
    try:
        return f"{Tokenizer(folder, text.eos_token_id, text.vocab_size).vocab_size} tokens", True
    except UserError as error:
        return str(error), False


def _deviations(
    path: Path, outputs: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]], relative: bool
) -> dict[str, float]:
    """Returns {output: largest difference} against a recorded file, at full matmul precision."""
    try:
        with np.load(path) as file:
            recorded = {name: file[name] for name in file.files}
        with jax.default_matmul_precision("highest"):
            computed = outputs(recorded)
        sizes = {name: np.abs(recorded[name]).max() if relative else 1.0 for name in computed}
        return {name: float(np.abs(value - recorded[name]).max() / sizes[name]) for name, value in computed.items()}
    except (OSError, KeyError, ValueError, TypeError, UserError) as error:
        raise UserError(f"{path}: not a usable record ({error}); delete it or record it again") from None
