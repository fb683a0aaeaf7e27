"""Verification and conversion of a checkpoint of any kind: a whole Stable Diffusion, one of its networks, or CLIP."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from fmda.diffusion.load import (
    check_fit,
    check_stable_diffusion,
    is_stable_diffusion,
    open_parts,
    read_schedule,
    read_tokenizer,
    write_rest,
)
from fmda.errors import UserError
from fmda.weights import check, files, network
from fmda.weights.check import CheckReport
from fmda.weights.checkpoint import family_of, open_checkpoint, weight_fingerprint
from fmda.weights.source import resolve


@dataclass
class StableDiffusionReport:
    """What `verify` found in a whole checkpoint. `ok` where it can be used as it is."""

    folder: str
    parts: dict[str, CheckReport]
    faults: dict[str, str] = field(default_factory=dict)
    """Of "tokenizer" and "scheduler", and what keeps the "networks" from working together."""
    schedule: str = "not usable"
    tokenizer: str = "not usable"
    fingerprint: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults and all(part.ok for part in self.parts.values())

    @property
    def file(self) -> str:
        """The first thing that is not good: a weight file, or a key of `faults`; "" where all is."""
        bad = [f"{name}/{part.file}" for name, part in self.parts.items() if not part.ok]
        return next(iter([*bad, *self.faults]), "")

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain values, `ok` included."""
        return asdict(self) | {"parts": {name: part.to_json() for name, part in self.parts.items()}, "ok": self.ok}

    def text(self) -> str:
        """Returns the report as aligned lines for a terminal, one network after the other."""
        blocks = [f"{name}\n" + _indented(part.text()) for name, part in self.parts.items()]
        lines = [
            ("parameters", f"{sum(part.parameters for part in self.parts.values()):,}"),
            ("tokenizer", self.tokenizer),
            ("schedule", self.schedule),
            ("faults", "; ".join(self.faults.values()) or "none"),
            ("fingerprint", self.fingerprint or "none, the arrays do not fit"),
            ("verdict", "good" if self.ok else "NOT GOOD"),
        ]
        return "\n".join([*blocks, *(f"{name:11}  {value}" for name, value in lines)])


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


def verify(source: str | os.PathLike[str], revision: str | None = None) -> CheckReport | StableDiffusionReport:
    """Returns the report on a checkpoint (folder, name of a packaged model, or hub id).

    What does not fit is listed, not raised. Raises UserError where there is nothing to report on: no folder, a
    component or its weights missing, a pickle, a damaged file, a network that cannot be built.
    """
    folder = resolve(source, revision, "any")
    if not is_stable_diffusion(folder):
        return check.verify(folder)
    parts = open_parts(folder)
    report = StableDiffusionReport(str(folder), {part: check.verify_network(each) for part, each in parts.items()})
    try:
        check_fit(folder, parts)
    except UserError as error:
        report.faults["networks"] = str(error)
    try:
        report.tokenizer = f"{read_tokenizer(folder, parts['text_encoder'].config).vocab_size} tokens"
    except UserError as error:
        report.faults["tokenizer"] = str(error)
    try:
        schedule = read_schedule(folder)
        sampler = schedule.sampler or "no known"
        report.schedule = f"{schedule.train_steps} steps, {schedule.prediction} prediction, {sampler} sampler"
        prints = [part.fingerprint for part in report.parts.values()]
        if None not in prints:
            report.fingerprint = weight_fingerprint({}, *prints, schedule)
    except UserError as error:
        report.faults["scheduler"] = str(error)
    return report


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: DTypeLike = jnp.float32,
    revision: str | None = None,
) -> Path:
    """Rewrites a checkpoint of any known layout as safetensors under PyTorch's names. Returns the new folder.

    A whole Stable Diffusion and each of its networks become what diffusers opens, a CLIP what transformers opens. The
    weights of a Flax UNet are kept as they are, but diffusers' PyTorch classes compute another GELU than its Flax
    classes did (see `UNetConfig.gate`). Raises UserError for what does not fit, and where `out` is there already and
    not empty; nothing is written then.
    """
    folder, out = resolve(source, revision, "any"), Path(out)
    if not is_stable_diffusion(folder):
        checkpoint = open_checkpoint(family_of(folder), folder)
        with files.new_folder(out) as new:
            network.convert(checkpoint, new, dtype)
        return out
    known = check_stable_diffusion(folder)
    with files.new_folder(out) as new:
        for part, opened in known.parts.items():
            network.convert(opened, new / part, dtype)
        write_rest(new, known.tokenizer, known.networks.text_encoder.context, known.schedule)
    return out
