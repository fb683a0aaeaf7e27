"""Reads the contents of a run folder for the report; any part may be missing."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fmda.errors import UserError
from fmda.evaluate.confusion import Scores
from fmda.evaluate.sections import Section, read_sections
from fmda.runs.journal import read_rows
from fmda.runs.stages import STAGE

SKIPPED = {"checkpoints", "images", "labels", "instances", "cache"}
DEPTH = 4


@dataclass(frozen=True)
class Evaluation:
    """One scored prediction of one dataset.

    Attributes:
        run: name of its run. where: folder below the run.
        model, dataset, split: what was scored. images: how many.
        palette: RGB of each class.
        examples: figures with {"kind", "name", "miou", "figure"}; paths are absolute.
    """

    run: str
    where: str
    model: str
    dataset: str
    split: str
    images: int | None
    scores: Scores
    palette: list[list[int]]
    examples: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Stage:
    """A finished stage: folder below the run, seconds, fingerprint, and what it recorded."""

    where: str
    seconds: float | None
    fingerprint: str
    record: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """All that a report shows of one run folder."""

    name: str
    folder: Path
    config: str
    fingerprint: str
    stages: list[Stage]
    evaluations: list[Evaluation]
    metrics: dict[str, list[dict[str, float]]]
    sections: list[tuple[Path, Section]]
    figures: list[Path]
    timings: list[tuple[str, dict[str, Any]]]

    @property
    def versions(self) -> dict[str, str]:
        """Package versions of the last stage that recorded any."""
        versions = [s.record["versions"] for s in self.stages if s.record.get("versions")]
        return versions[-1] if versions else {}

    def recorded(self, key: str) -> list[str]:
        """Returns the different values that stages recorded under a key such as `device` or `command`."""
        return list(dict.fromkeys(str(s.record[key]) for s in self.stages if s.record.get(key)))


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """Returns what a run folder and the folders below it hold.

    Raises:
        UserError: no such folder, nothing in it to show, or a damaged file.
    """
    folder = Path(folder)
    name = name or folder.resolve().name
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder; give the work_dir of a run")
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    run = Run(
        name=name,
        folder=folder,
        config=text,
        fingerprint=hashlib.sha256(text.encode()).hexdigest()[:12] if text else "",
        stages=[],
        evaluations=[],
        metrics={},
        sections=[],
        figures=[],
        timings=[],
    )
    for place in _folders(folder):
        _read_folder(run, place, "" if place == folder else place.relative_to(folder).as_posix())
    shown = {Path(e["figure"]) for v in run.evaluations for e in v.examples}
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
        # a stage may be called `images`; its own images lie below it
        for entry in sorted((e for e in entries if e.name not in SKIPPED or (e / STAGE).is_file()), key=_age):
            yield entry
            if depth < DEPTH:
                yield from below(entry, depth + 1)

    yield from below(folder, 1)


def _age(folder: Path) -> tuple[int, str]:
    mark = folder / STAGE
    return (mark.stat().st_mtime_ns if mark.is_file() else 2**63, folder.name)


def _read_folder(run: Run, place: Path, where: str) -> None:
    stage = _json(place / STAGE)
    if isinstance(stage, dict):
        run.stages.append(Stage(where, stage.get("seconds"), str(stage.get("fingerprint", "")), stage))
    scores = _json(place / "scores.json")
    if isinstance(scores, dict):
        run.evaluations.append(_evaluation(scores, run.name, where, place))
    metrics = _metrics(place / "metrics.jsonl")
    if metrics:
        run.metrics[where] = metrics
    timing = _json(place / "timing.json")
    if isinstance(timing, dict):
        run.timings.append((where, timing))
    run.sections.extend((place, section) for section in read_sections(place))
    if place.name == "figures":
        run.figures.extend(sorted(p for p in place.glob("*.png") if not p.name.startswith(".")))


def _evaluation(data: dict[str, Any], run: str, where: str, place: Path) -> Evaluation:
    scores = Scores.from_json(data.get("scores", {}), str(place / "scores.json"))
    examples = [{**e, "figure": place / e["figure"]} for e in data.get("examples", [])]
    return Evaluation(
        run=run,
        where=where,
        model=str(data.get("model") or where or run),
        dataset=str(data.get("dataset", "")),
        split=str(data.get("split", "")),
        images=data.get("images"),
        scores=scores,
        palette=data.get("palette") or spread_colours(len(scores.names)),
        examples=[e for e in examples if e["figure"].is_file()],
    )


def spread_colours(count: int) -> list[list[int]]:
    """Returns `count` distinct RGB colours, for class lists without a palette (golden-angle hues)."""
    hue = (np.arange(count) * 0.618034) % 1
    value = 0.55 + 0.35 * (np.arange(count) % 3) / 2
    channel = np.abs(((hue[:, None] * 6 + np.array([0, 4, 2])) % 6) - 3) - 1
    return np.rint(255 * value[:, None] * (0.25 + 0.75 * np.clip(channel, 0, 1))).astype(int).tolist()


def _metrics(path: Path) -> list[dict[str, float]]:
    """Reads numbers by step; a last line cut off by a kill is left out, and a repeated step keeps its last line."""
    rows: dict[float, dict[str, float]] = {}
    for record in read_rows(path):
        if isinstance(record, dict) and isinstance(record.get("step"), int | float):
            time = record.pop("time", None)
            if isinstance(time, dict):
                record |= {f"time/{name}": value for name, value in time.items()}
            numbers = {k: float(v) for k, v in record.items() if type(v) in (int, float)}
            rows.setdefault(record["step"], {}).update(numbers)
    return [rows[step] for step in sorted(rows)]


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); run that stage again") from None
