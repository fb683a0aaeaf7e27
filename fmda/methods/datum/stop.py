"""When to stop a personalisation: probe images of every snapshot, label-free curves, and the step chosen by them.

The published 200 steps were tuned with labels of the target. Here each snapshot draws the same prompts with the same
seeds. The step is chosen by the images' distance to crops of the target, their diversity, and the share of prompted
classes that a CLIP detects in them (`fmda.evaluate.stopping.choose_step`).
"""

import dataclasses
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import numpy as np

from fmda.atomic import write_atomic, write_json
from fmda.config import Bounds, FolderOrName, NonNegativeInt, PositiveInt, Share
from fmda.data.files import read_image
from fmda.diffusion.draw import SamplerConfig
from fmda.diffusion.load import StableDiffusion
from fmda.diffusion.manifest import Manifest
from fmda.evaluate.quality import alignment, pairwise_diversity, standard_error
from fmda.evaluate.sections import Section, Table, write_sections
from fmda.evaluate.stopping import Choice, choose_step
from fmda.methods.datum.target import random_crop
from fmda.methods.generate import Config as GenerateConfig
from fmda.methods.generate import PromptConfig, draw_images
from fmda.methods.judges import embed, grid_share
from fmda.png import read_png, write_png
from fmda.weights.load import load_clip
from fmda.weights.network import Loaded

Precision = Literal["float32", "bfloat16"]
SHOWN = 8
"""Images of each model in the report."""
MEASURES = ("alignment", "nearest", "diversity", "coverage", "alignment_error", "diversity_error", "coverage_error")


@dataclass(frozen=True)
class ProbeConfig:
    """How snapshots are compared.

    Attributes:
        count: images of each snapshot; standard errors come from halves of them.
        batch: images drawn at once.
        prompts: what is drawn; the token is that of the personalisation.
        sample: how it is sampled.
        clip: the CLIP that measures.
        crops: crops of the target that images are compared with.
        floor: share of the untouched model's class coverage that a snapshot must keep, to within a standard error.
        seed: of the images and the crops.
    """

    count: Annotated[int, Bounds(4)] = 40
    batch: PositiveInt = 8
    prompts: PromptConfig = PromptConfig()
    sample: SamplerConfig = SamplerConfig()
    clip: FolderOrName = "openai/clip-vit-base-patch16"
    crops: Annotated[int, Bounds(4)] = 64
    floor: Share = 0.8
    seed: NonNegativeInt = 0


def probe_config(probe: ProbeConfig, token: str, dtype: Precision, device_memory: float | None) -> GenerateConfig:
    """Returns what draws the images of one snapshot; the model's name is left to `draw_probes`."""
    return GenerateConfig(
        model="", prompts=dataclasses.replace(probe.prompts, token=token), count=probe.count, batch=probe.batch,
        seed=probe.seed, sample=probe.sample, dtype=dtype, device_memory=device_memory,
    )  # fmt: skip


def draw_probes(
    drawing: GenerateConfig, model_after: Callable[[int], StableDiffusion], steps: Sequence[int], folder: Path
) -> int:
    """Fills `folder/<step>` with images of the model after each step and returns their number.

    What is there already stays.
    """
    for step in steps:
        config = dataclasses.replace(drawing, model=f"step {step}")
        draw_images(config, model_after(step), folder / str(step), task=f"probes of step {step}")
    return len(steps) * drawing.count


def read_images(manifest: Manifest) -> np.ndarray:
    """Returns the images of a generated set, uint8 [n, H, W, 3], in order. Raises UserError for a damaged one."""
    return np.stack([read_png(path) for path in manifest.paths])


def target_crops(image: np.ndarray, size: int, count: int, seed: int) -> np.ndarray:
    """Returns `count` random crops uint8 [count, size, size, 3] of an image [H, W, 3], at its own scale.

    Raises ValueError for an image smaller than a crop.
    """
    rng = np.random.default_rng((seed, 6))
    return np.stack([random_crop(image, size, rng) for _ in range(count)])


@dataclass(frozen=True)
class Curves:
    """What is measured of each step: values, and standard errors where there are any.

    Attributes:
        steps: S of them, the first 0, the model untouched.
        alignment: mean cosine distance of a step's images to all crops of the target, 0..2.
        nearest: the same to the nearest crop of each image; near 0 where crops are repeated.
        diversity: mean cosine distance of pairs of a step's images, 0..2.
        coverage: share of images in which the prompted class is detected, mean over the classes, 0..1.
        alignment_error, diversity_error, coverage_error: standard errors.
        repeated: `diversity` of the target's crops: what is left of it when the one image is repeated.
    """

    steps: tuple[int, ...]
    alignment: tuple[float, ...]
    nearest: tuple[float, ...]
    diversity: tuple[float, ...]
    coverage: tuple[float, ...]
    alignment_error: tuple[float, ...]
    diversity_error: tuple[float, ...]
    coverage_error: tuple[float, ...]
    repeated: float


def measure(probe: ProbeConfig, steps: Sequence[int], folder: Path, crops: np.ndarray, clip: Loaded) -> Curves:
    """Returns the curves over the snapshots whose images lie in `folder/<step>`.

    `crops`, uint8 [n, S, S, 3], are those of the target.
    """
    target = embed(clip, crops)
    rows = []
    for step in steps:
        manifest = Manifest.read(folder / str(step))
        images = read_images(manifest)
        embedded = embed(clip, images)
        covered, covered_error = class_coverage(clip, images, [image.class_name for image in manifest])
        distance, diversity = alignment(embedded, target), pairwise_diversity(embedded)
        distance_error = standard_error(lambda x: alignment(x, target).mean, embedded, seed=probe.seed)
        diversity_error = standard_error(pairwise_diversity, embedded, seed=probe.seed)
        values = (distance.mean, distance.nearest, diversity, covered, distance_error, diversity_error, covered_error)
        rows.append(values)
    columns = np.array(rows, np.float64).T.tolist()
    measured = dict(zip(MEASURES, map(tuple, columns), strict=True))
    return Curves(steps=tuple(steps), repeated=float(pairwise_diversity(target)), **measured)


def class_coverage(clip: Loaded, images: np.ndarray, class_names: Sequence[str | None]) -> tuple[float, float]:
    """Returns the share of images in which the prompted class is detected, and its standard error.

    The share is the mean over the classes; 1 where none was prompted. The error of a class with no image, or all,
    among few is computed as if one more of each kind had been drawn (Laplace's rule).
    """
    names = sorted({name for name in class_names if name})
    if not names:
        return 1.0, 0.0
    there = grid_share(clip, names, images) > 0
    chosen = np.array([names.index(name) if name else -1 for name in class_names])
    drawn = np.array([np.sum(chosen == k) for k in range(len(names))])
    hits = np.array([there[chosen == k, k].sum() for k in range(len(names))])
    likely = (hits + 1) / (drawn + 2)
    return float(np.mean(hits / drawn)), float(np.sqrt(np.sum(likely * (1 - likely) / drawn)) / len(names))


def write_choice(
    probe: ProbeConfig, steps: Sequence[int], probes: Path, target: Path, crop: int, folder: Path
) -> dict[str, Any]:
    """Writes `choice.json`, `curves.png`, `before-after.png` and the report's sections; returns {"step", "reason"}.

    `target` is the file of the image, `crop` the side of its crops in pixels.
    """
    clip, image = load_clip(probe.clip), read_image(target)
    curves = measure(probe, steps, probes, target_crops(image, crop, probe.crops, probe.seed), clip)
    measured = {name: values for name, values in vars(curves).items() if name != "nearest"}
    choice = choose_step(**measured, coverage_floor=probe.floor)
    rows = {name: getattr(choice, name).tolist() for name in ("gain", "kept", "score", "admitted")}
    record = {"step": choice.step, "reason": choice.reason, "curves": vars(curves), **rows}
    write_atomic(folder / "curves.png", _chart(curves, choice))
    before, after = (read_images(Manifest.read(probes / str(step)).head(SHOWN)) for step in (0, choice.step))
    write_png(folder / "before-after.png", _before_after(image, before, after))
    write_sections(folder, _sections(curves, choice))
    write_json(folder / "choice.json", record)
    return {"step": choice.step, "reason": choice.reason}


def _sections(curves: Curves, choice: Choice) -> list[Section]:
    columns = ("step", "distance to the target's crops", "diversity", "classes found", "gain", "diversity kept")
    values = zip(
        curves.steps, curves.alignment, curves.diversity, curves.coverage, choice.gain, choice.kept, strict=True
    )  # fmt: skip
    rows = tuple((step, *(round(float(value), 4) for value in row)) for step, *row in values)
    return [
        Section(
            "Personalised on one image",
            "On top the target; below it images of the untouched model, and the same prompts and seeds after "
            f"{choice.step} steps.",
            image="before-after.png",
        ),
        Section("When to stop", choice.reason, Table(columns, rows), "curves.png"),
    ]


def _chart(curves: Curves, choice: Choice) -> bytes:
    """Returns a PNG: distance to the target, diversity and coverage over the steps, the chosen one marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6))
    panels = (
        ("distance to the target's crops", curves.alignment, curves.alignment_error),
        ("diversity", curves.diversity, curves.diversity_error),
        ("share of the prompted classes found", curves.coverage, curves.coverage_error),
    )
    for axes, (title, values, errors) in zip(figure.subplots(1, 3), panels, strict=True):
        # what is measured is never negative, and neither is any end of a bar
        bars = [np.minimum(errors, values), errors]
        axes.errorbar(curves.steps, values, bars, marker=".", linewidth=1.3, color="#2563a8", capsize=2)
        axes.axvline(choice.step, color="#c2541b", linewidth=1, linestyle="--")
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.tight_layout(pad=0.6)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    return file.getvalue()


def _before_after(target: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Returns the target on top, then images of the untouched and of the personalised model, seed by seed."""
    rows = [np.concatenate(list(images), axis=1) for images in (before, after)]
    width = rows[0].shape[1]
    height = min(round(target.shape[0] * width / target.shape[1]), 2 * before.shape[1])
    scaled = cv2.resize(
        target, (round(target.shape[1] * height / target.shape[0]), height), interpolation=cv2.INTER_AREA
    )
    top = np.full((height, width, 3), 255, np.uint8)
    top[:, : min(width, scaled.shape[1])] = scaled[:, :width]
    return np.concatenate([top, *rows])
