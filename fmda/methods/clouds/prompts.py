"""Prompts of street scenes as a file that kind `generate` reads (kind `prompts`).

The stage `prompts` writes `prompts.jsonl`, a line for each prompt: text, class, who wrote it and with which seed. In a
pipeline, `prompts: {file: '@<run>/prompts/prompts.jsonl'}` of a later `generate` takes them in turn, so that its images
show every class equally often.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fmda.config import NonNegativeInt, PositiveInt
from fmda.evaluate.sections import Section, Table, write_sections
from fmda.methods.clouds.grammar import VOCABULARIES, Scene, scenes
from fmda.methods.generate.naming import named_classes
from fmda.runs.journal import write_rows
from fmda.runs.plan import Plan
from fmda.runs.stages import Stage
from fmda.world.names import CLASSES

FILE = "prompts.jsonl"


@dataclass(frozen=True)
class Config:
    """How many prompts, of what.

    Attributes:
        count: prompts; CLOUDS has 100.
        classes: of Cityscapes; each is the subject of as many prompts, to within one.
        vocabulary: places, weathers, lights and times: of photographs ("urban"), or of the street world ("street"),
            whose built-in models know few words.
        seed: of the scenes.
    """

    count: PositiveInt = 100
    classes: tuple[str, ...] = CLASSES
    vocabulary: Literal["urban", "street"] = "urban"
    seed: NonNegativeInt = 0

    def scenes(self) -> list[Scene]:
        """Returns what the prompts are to show. Raises UserError as `grammar.scenes`."""
        return scenes(self.count, self.classes, VOCABULARIES[self.vocabulary], self.seed)


def check(config: Config) -> None:
    """Raises UserError for classes and counts that cannot work."""
    config.scenes()


def stages(config: Config) -> list[Stage]:
    """Returns the one stage, prompts."""
    return [Stage("prompts", functools.partial(_write, config), config, alone=True)]


def plan(config: Config) -> Plan:
    """Returns the stage and the first prompts of the grammar."""
    made = config.scenes()
    text = f"{config.count} prompts of {len(config.classes)} classes by the grammar '{config.vocabulary}'"
    return Plan(stages=(("prompts", text),), notes=tuple(f"scene {k}: {one.text}" for k, one in enumerate(made[:12])))


def _write(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [
        {"text": one.text, "class": one.subject, "writer": f"grammar {config.vocabulary}", "seed": config.seed}
        for one in config.scenes()
    ]
    write_rows(folder / FILE, rows)
    named = coverage([row["text"] for row in rows])
    asked = Counter(row["class"] for row in rows)
    writers = Counter(row["writer"] for row in rows)
    table = Table(("class", "prompts of it", "prompts that name it"), tuple((n, asked[n], named[n]) for n in CLASSES))
    text = "; ".join(f"{number} by {writer}" for writer, number in writers.items())
    examples = "\n\n".join(row["text"] for row in rows[:10])
    write_sections(folder, [Section("Prompts", f"{len(rows)} prompts: {text}. The first ones:\n\n{examples}", table)])
    return {"prompts": len(rows), "writers": dict(writers), "named": named}


def coverage(texts: Sequence[str]) -> dict[str, int]:
    """Returns how many of the texts name each of Cityscapes' classes."""
    counts = Counter(name for text in texts for name in named_classes(text))
    return {name: counts[name] for name in CLASSES}
