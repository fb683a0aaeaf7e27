"""Reads the contents of a run folder for the report; any part may be missing."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fmda.errors import UserError
from fmda.evaluate.choice import choice_sections
from fmda.evaluate.confusion import Scores
from fmda.evaluate.dead_classes import dead_class_sections
from fmda.evaluate.sections import Section, read_sections
from fmda.runs.journal import read_rows
from fmda.runs.stages import STAGE

SKIPPED = {"checkpoints", "images", "labels", "instances", "cache", "cells"}
"""Folders that are not read; the cells of a table are runs of their own."""
DEPTH = 4


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model on one dataset.

    Attributes:
        run: name of its run.
        where: folder below the run.
        model, dataset, split: what was scored.
        images: number of images.
        scores: over all images.
        palette: RGB of each class.
        examples: figures with {"kind", "name", "miou", "figure"}; paths are absolute.
    """

    run: str
    where: str
    model: str
    dataset: str
    split: str
    images: int
    scores: Scores
    palette: list[list[int]]
    examples: list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """The contents of a run folder that a report shows.

    Attributes:
        name, folder, config: its name, its folder, and the text of `config.yaml`.
        stages: (folder below the run, record) of each finished stage.
        evaluations: in the order of their folders.
        metrics: rows of each training log by folder below the run.
        sections: (folder, section) of what methods add, and of what training logs show.
        figures: PNG files that no example or section shows.
        timings: (folder below the run, `timing.json`) of each evaluation.
    """

    name: str
    folder: Path
    config: str
    stages: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    metrics: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    sections: list[tuple[Path, Section]] = field(default_factory=list)
    figures: list[Path] = field(default_factory=list)
    timings: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """Twelve digits that change with the configuration; "" without one."""
        return hashlib.sha256(self.config.encode()).hexdigest()[:12] if self.config else ""

    def recorded(self, key: str) -> list[Any]:
        """Returns the different values that stages recorded under a key such as "device" or "command"."""
        values = [record[key] for _, record in self.stages if record.get(key)]
        return [value for k, value in enumerate(values) if value not in values[:k]]


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """Returns the contents of a run folder and the folders below it.

    Raises:
        UserError: no such folder, nothing in it to show, or a damaged file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder; give the work_dir of a run")
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    run = Run(name or folder.resolve().name, folder, text)
    for place in _folders(folder):
        _read_folder(run, place, "" if place == folder else place.relative_to(folder).as_posix())
    shown = {e["figure"] for v in run.evaluations for e in v.examples}
    shown |= {place / s.image for place, s in run.sections if s.image}
    run.figures[:] = [path for path in run.figures if path not in shown]
    if not (run.stages or run.evaluations or run.metrics or run.sections or run.figures or text):
        raise UserError(f"{folder}: holds no run (no config.yaml, scores or metrics); give the work_dir of a run")
    return run


def _folders(folder: Path) -> Iterator[Path]:
    """Yields the folder and those below it in a fixed order: stages in the order in which they finished."""
    yield folder

    def below(place: Path, depth: int) -> Iterator[Path]:
        entries = [Path(e.path) for e in os.scandir(place) if e.is_dir() and not e.name.startswith(".")]
        # a stage may be called `images`
        for entry in sorted((e for e in entries if e.name not in SKIPPED or (e / STAGE).is_file()), key=_age):
            yield entry
            if depth < DEPTH:
                yield from below(entry, depth + 1)

    yield from below(folder, 1)


def _age(folder: Path) -> tuple[int, str]:
    mark = folder / STAGE
    return (mark.stat().st_mtime_ns if mark.is_file() else 2**63, folder.name)


def _read_folder(run: Run, place: Path, where: str) -> None:
    if (place / STAGE).is_file():
        run.stages.append((where, _json(place / STAGE)))
    if (place / "scores.json").is_file():
        run.evaluations.append(_evaluation(run.name, where, place))
    if metrics := _metrics(place / "metrics.jsonl"):
        run.metrics[where] = metrics
        derived = [*dead_class_sections(metrics), *choice_sections(metrics, where)]
        run.sections.extend((place, section) for section in derived)
    if (place / "timing.json").is_file():
        run.timings.append((where, _json(place / "timing.json")))
    run.sections.extend((place, section) for section in read_sections(place))
    if place.name == "figures":
        run.figures.extend(sorted(p for p in place.glob("*.png") if not p.name.startswith(".")))


def _evaluation(run: str, where: str, place: Path) -> Evaluation:
    data = _json(place / "scores.json")
    scores = Scores.from_json(data.get("scores", {}), str(place / "scores.json"))
    examples = [{**e, "figure": place / e["figure"]} for e in data["examples"] if (place / e["figure"]).is_file()]
    facts = {key: data[key] for key in ("model", "dataset", "split", "images", "palette")}
    return Evaluation(run, where, scores=scores, examples=examples, **facts)


def _metrics(path: Path) -> list[dict[str, float]]:
    """Returns the numbers of a training log, one row per step."""
    rows: dict[int, dict[str, float]] = {}
    for record in read_rows(path):
        values = record | {f"time/{name}": value for name, value in record.pop("time", {}).items()}
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        rows.setdefault(record["step"], {}).update(numbers)
    return [rows[step] for step in sorted(rows)]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); run that stage again") from None
