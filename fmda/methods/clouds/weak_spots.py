"""What to generate next (kind `weak-spots`): classes and conditions that a network is unsure of on generated images.

No label is read. A class is uncertain where student and teacher of a finished run of kind `clouds` disagree about it,
or where the student's entropy is high at its pixels; a time or a weather is, where that holds of the images whose
prompts ask for it. The stage `weights` writes `weights.json`, which kind `prompts` reads. In a pipeline, rounds of
`prompts`, `generate`, `clouds` and `weak-spots` alternate generation and training (`configs/clouds/world-rounds.yaml`).
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from fmda.atomic import write_json
from fmda.config import NonNegativeFloat, to_dict
from fmda.data import read_image
from fmda.diffusion.manifest import Manifest
from fmda.errors import UserError
from fmda.evaluate.sections import Section, Table, write_sections
from fmda.methods.clouds.grammar import Weights
from fmda.methods.clouds.run import TEACHER
from fmda.methods.supervised import make_network, open_model
from fmda.progress import track
from fmda.runs.journal import read_rows
from fmda.runs.plan import Plan
from fmda.runs.stages import Stage, pending

FILE = "weights.json"

MOST = 10.0
"""Largest weight; the smallest is 1 / MOST, so that later rounds still see everything."""


@dataclass(frozen=True, kw_only=True)
class SetConfig:
    """Generated images and what they are to show.

    Attributes:
        images: folder with the manifest of kind `generate`.
        prompts: the `prompts.jsonl` of kind `prompts` that they were generated from.
    """

    images: Path
    prompts: Path


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which network, on which images.

    Attributes:
        run: folder of a finished run of kind `clouds`.
        sets: the images, of all rounds so far.
        focus: power of the uncertainty that the weights are proportional to; 0 gives everything the weight 1, which is
            static generation.
    """

    run: Path
    sets: tuple[SetConfig, ...]
    focus: NonNegativeFloat = 2.0


class Seen(NamedTuple):
    """What student and teacher make of an image.

    Attributes:
        student, teacher: their label maps.
        entropy: of the student's prediction over log K, 0..1.
    """

    student: UInt8[np.ndarray, "H W"]
    teacher: UInt8[np.ndarray, "H W"]
    entropy: Float[np.ndarray, "H W"]


def check(config: Config) -> None:
    """Raises UserError for a run, a manifest or prompts that cannot be read."""
    if not config.sets:
        raise UserError("sets: names no generated images; name those of the rounds so far")
    for one in config.sets:
        if not pending(one.images) and not pending(one.prompts):
            _shown(one)
    if not pending(config.run):
        open_model(config.run / "export" / TEACHER)


def stages(config: Config) -> list[Stage]:
    """Returns the one stage, weights."""
    return [Stage("weights", partial(_write, config), config, alone=True)]


def plan(config: Config) -> Plan:
    """Returns the stage."""
    return Plan(stages=(("weights", f"of classes, times and weathers, from {len(config.sets)} sets of images"),))


def viewer(export: Path) -> tuple[Callable[[UInt8[np.ndarray, "H W 3"]], Seen], tuple[str, ...]]:
    """Returns (image -> what student and teacher of an export make of it, names of the classes)."""
    student, teacher = open_model(export), open_model(export / TEACHER)
    scores = make_network(student.encoder, student.classes, student.masks).scores

    @jax.jit
    def look(student: Any, teacher: Any, image: Any) -> tuple[Any, Any, Any]:
        logits = scores(student, image[None])[0]
        log_probs = jax.nn.log_softmax(logits)
        entropy = -(jnp.exp(log_probs) * log_probs).sum(-1) / jnp.log(logits.shape[-1])
        theirs = scores(teacher, image[None])[0].argmax(-1)
        return logits.argmax(-1).astype(jnp.uint8), theirs.astype(jnp.uint8), entropy

    params = [{"encoder": one.encoder.params, "head": one.head} for one in (student, teacher)]
    return lambda image: Seen(*jax.device_get(look(*params, image))), student.classes.names


def class_counts(seen: Seen, classes: int) -> Float[np.ndarray, "4 k"]:
    """Returns by class the pixels that both, either and the student predict, and the entropy of the student's pixels.

    The counts of several images are added.
    """
    student, teacher = (np.bincount(one.ravel(), minlength=classes) for one in (seen.student, seen.teacher))
    both = np.bincount(seen.student[seen.student == seen.teacher], minlength=classes)
    entropy = np.bincount(seen.student.ravel(), seen.entropy.ravel(), classes)
    return np.stack([both, student + teacher - both, student, entropy]).astype(np.float64)


def class_uncertainty(counts: Float[np.ndarray, "4 k"]) -> Float[np.ndarray, " k"]:
    """Returns the uncertainty of each class from `class_counts`, 0..1; NaN for a class that is nowhere predicted.

    It is the mean of two parts: 1 less the intersection over union of the maps of student and teacher, and the mean
    entropy where the student predicts the class (1 where the teacher alone does).
    """
    both, either, student, entropy = counts
    disputed = 1 - np.divide(both, either, out=np.ones_like(both), where=either > 0)
    unsure = np.divide(entropy, student, out=np.ones_like(both), where=student > 0)
    return np.where(either > 0, (disputed + unsure) / 2, np.nan)


def image_uncertainty(seen: Seen) -> float:
    """Returns the uncertainty of an image, 0..1: mean of the share of disputed pixels and of the mean entropy."""
    return float(((seen.student != seen.teacher).mean() + seen.entropy.mean()) / 2)


def weights_of(uncertainty: Mapping[str, float], focus: float) -> dict[str, float]:
    """Returns a weight for each name, 1 where the uncertainty is the mean, or not known (NaN)."""
    known = [value for value in uncertainty.values() if not np.isnan(value)]
    mean = float(np.mean(known)) if known else 0.0
    relative = {name: value / mean if mean > 0 and not np.isnan(value) else 1.0 for name, value in uncertainty.items()}
    return {name: float(np.clip(value**focus, 1 / MOST, MOST)) for name, value in relative.items()}


def _shown(one: SetConfig) -> list[tuple[Path, str, str]]:
    """Returns (file, time, weather) of each image. Raises UserError where the prompts are not those of the manifest."""
    rows, images = read_rows(one.prompts, finished=True), Manifest.read(one.images).images
    shown = []
    for image in images:
        row = rows[image.prompt_index] if image.prompt_index < len(rows) else {}
        if row.get("class") != image.class_name or not {"time", "weather"} <= set(row):
            raise UserError(
                f"sets: {one.images} is not generated from {one.prompts}, or by an earlier version; name the file of "
                "kind prompts that it was"
            )
        shown.append((one.images / image.file, row["time"], row["weather"]))
    return shown


def _write(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    look, classes = viewer(config.run / "export")
    shown = [row for one in config.sets for row in _shown(one)]
    counts = np.zeros((4, len(classes)))
    by_time: dict[str, list[float]] = defaultdict(list)
    by_weather: dict[str, list[float]] = defaultdict(list)
    for file, time, weather in track(shown, "look"):
        seen = look(read_image(file))
        counts += class_counts(seen, len(classes))
        value = image_uncertainty(seen)
        by_time[time].append(value)
        by_weather[weather].append(value)
    of_classes = dict(zip(classes, class_uncertainty(counts).tolist(), strict=True))
    uncertainty = [of_classes, *({name: float(np.mean(v)) for name, v in by.items()} for by in (by_time, by_weather))]
    weights = Weights(*(weights_of(one, config.focus) for one in uncertainty))
    write_json(folder / FILE, to_dict(weights))
    rows = [
        (name, None if np.isnan(value) else round(value, 3), round(weight[name], 2))
        for values, weight in zip(uncertainty, (weights.classes, weights.times, weights.weathers), strict=True)
        for name, value in values.items()
    ]
    table = Table(("class or condition", "uncertainty", "weight"), tuple(rows))
    write_sections(folder, [Section("What the next images are to show", f"of {len(shown)} generated images", table)])
    return {"images": len(shown), "mean": float(np.mean([v for by in by_time.values() for v in by]))}
