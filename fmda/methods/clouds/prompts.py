"""Prompts of street scenes as a file that kind `generate` reads (kind `prompts`).

A language model behind an endpoint writes them, or a seeded grammar where there is none or it fails. The stage
`prompts` writes `prompts.jsonl`, a line for each prompt (text, class, time, weather, and who wrote it, where, with
which seed), and `refused.jsonl`, a line with a reason for each answer that was not taken. In a pipeline,
`prompts: {file: '@<run>/prompts/prompts.jsonl'}` of a later `generate` takes them in turn, so that its images show
every class equally often, or as `weights` say.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fmda.config import NonNegativeInt, PositiveInt, from_dict
from fmda.evaluate.sections import Section, Table, write_sections
from fmda.methods.clouds.grammar import VOCABULARIES, Scene, Weights, scenes
from fmda.methods.clouds.writer import Written, write
from fmda.methods.endpoint import Endpoint, check_endpoint
from fmda.methods.generate.naming import named_classes
from fmda.progress import note
from fmda.runs.journal import write_rows
from fmda.runs.plan import Plan
from fmda.runs.stages import Stage, pending
from fmda.weights.files import read_json
from fmda.world.names import CLASSES

FILE, REFUSED = "prompts.jsonl", "refused.jsonl"


@dataclass(frozen=True)
class Config:
    """How many prompts, of what.

    Attributes:
        count: prompts; CLOUDS has 100.
        classes: of Cityscapes; without weights each is the subject of as many prompts, to within one.
        vocabulary: places, weathers, lights and times: of photographs ("urban"), or of the street world ("street"),
            whose built-in models know few words.
        weights: file of kind `weak-spots`, by which classes, times and weathers are more frequent or less; None has all
            as frequent.
        seed: of the scenes and of the language model's answers.
        endpoint: the language model; None leaves the writing to the grammar.
    """

    count: PositiveInt = 100
    classes: tuple[str, ...] = CLASSES
    vocabulary: Literal["urban", "street"] = "urban"
    weights: Path | None = None
    seed: NonNegativeInt = 0
    endpoint: Endpoint | None = None

    def scenes(self) -> list[Scene]:
        """Returns what the prompts are to show, without weights that an earlier run is to write.

        Raises UserError as `grammar.scenes`, and for a damaged file of weights.
        """
        weights = None
        if self.weights is not None and not pending(self.weights):
            weights = from_dict(Weights, read_json(self.weights), str(self.weights))
        return scenes(self.count, self.classes, VOCABULARIES[self.vocabulary], self.seed, weights)


def check(config: Config) -> None:
    """Raises UserError for classes, counts and endpoints that cannot work; sends nothing to the endpoint."""
    config.scenes()
    if config.endpoint is not None:
        check_endpoint(config.endpoint, "endpoint")


def stages(config: Config) -> list[Stage]:
    """Returns the one stage, prompts."""
    return [Stage("prompts", functools.partial(_write, config), config, alone=True)]


def plan(config: Config) -> Plan:
    """Returns the stage and the first prompts of the grammar."""
    check(config)
    made = config.scenes()
    by = f"the grammar '{config.vocabulary}'"
    if config.endpoint is not None:
        by = f"{config.endpoint.model} at {config.endpoint.host}, or {by} where that fails"
    text = f"{config.count} prompts of {len(config.classes)} classes by {by}"
    return Plan(stages=(("prompts", text),), notes=tuple(f"scene {k}: {one.text}" for k, one in enumerate(made[:12])))


def _write(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    made = config.scenes()
    written = Written() if config.endpoint is None else write(made, config.endpoint, config.seed)
    rows: list[dict[str, Any]] = []
    for k, one in enumerate(made):
        writer = {"writer": f"grammar {config.vocabulary}"}
        if config.endpoint is not None and k in written.texts:
            writer = {"writer": config.endpoint.model, "endpoint": config.endpoint.host}
        shown = {"class": one.subject, "time": one.time, "weather": one.weather}
        rows.append({"text": written.texts.get(k, one.text), **shown, **writer, "seed": config.seed})
    missing = len(made) - len(written.texts)
    if config.endpoint is not None and missing:
        why = written.failure or f"{config.endpoint.host}: the answers cannot be used, see {folder / REFUSED}"
        note(f"warning: the grammar writes {missing} of {len(made)} prompts ({why})")
    write_rows(folder / REFUSED, written.refused)
    write_rows(folder / FILE, rows)
    named = coverage([row["text"] for row in rows])
    asked = Counter(row["class"] for row in rows)
    writers = Counter(row["writer"] for row in rows)
    table = Table(("class", "prompts of it", "prompts that name it"), tuple((n, asked[n], named[n]) for n in CLASSES))
    text = f"{len(rows)} prompts: " + "; ".join(f"{number} by {writer}" for writer, number in writers.items())
    if reasons := Counter(row["why"] for row in written.refused):
        counts = "; ".join(f"{number}: {why}" for why, number in reasons.most_common(5))
        text += f". Refused answers: {len(written.refused)} ({counts})"
    examples = "\n\n".join(row["text"] for row in rows[:10])
    write_sections(folder, [Section("Prompts", f"{text}. The first prompts:\n\n{examples}", table)])
    refused = len(written.refused)
    return {"prompts": len(rows), "writers": dict(writers), "refused": refused, "named": named}


def coverage(texts: Sequence[str]) -> dict[str, int]:
    """Returns how many of the texts name each of Cityscapes' classes."""
    counts = Counter(name for text in texts for name in named_classes(text))
    return {name: counts[name] for name in CLASSES}
