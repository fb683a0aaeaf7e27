"""Recorded label maps refined by a SAM in ONNX (kind `refine-labels`), scored before and after.

The maps are those of any model whose answers are known and whose weights are not.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from fmda.atomic import replacing, write_json
from fmda.config import FREE, DataPath, FileOrName, FolderOrName, NonNegativeInt, PositiveInt
from fmda.data import IGNORE, ClassList, Dataset, class_list, read_image
from fmda.data.config import ImagesConfig
from fmda.data.files import image_size
from fmda.errors import UserError, disk_errors
from fmda.evaluate.confusion import Scores, confusion_matrix
from fmda.evaluate.maps import Common, common_list
from fmda.evaluate.overlay import in_row, overlay
from fmda.evaluate.sections import Cell, Section, Table, write_sections
from fmda.places import below_data
from fmda.png import is_whole, read_png, write_png
from fmda.progress import track
from fmda.runs.identity import claim
from fmda.runs.plan import Plan
from fmda.runs.stages import Stage, pending
from fmda.sam import Evidence, Improved, Masks, Refined, Roles, SamStage
from fmda.sam.refine import paper, regions_of, voted

Mode = Literal["improved", "paper"]
THINGS = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
KEPT = ("pole", "traffic light", "traffic sign", "sidewalk")
OF_REGIONS = ("points", "least_iou", "least_stability", "most_overlap")
"""Settings of `Improved` that the regions depend on."""

REFUSED, POSITIVE, NEGATIVE = (90, 90, 90), (40, 220, 60), (230, 40, 40)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which maps are refined, by which SAM, and how.

    Attributes:
        sam: folder of the ONNX graphs of a SAM, image encoder and mask decoder; or "street-sam".
        data: the images; their labels are read for scores alone.
        labels: folder of the recorded maps, or its name below FMDA_DATA: at any depth `<name of the image>.png`.
        classes: class list of the maps.
        class_map: leads from it to the classes of the labels, where they differ.
        every: take each so-manieth image.
        modes: "improved", regions vote; "paper", CLOUDS.
        improved: how regions vote.
        things, kept: classes in these roles (`fmda.sam.Roles`), where the list has them.
        seed: of the points of "paper".
        figures: images of the report.
        score: compare with the labels of the images.
        cache: folder of embeddings, at most `cache_bytes`; default: in the folder of the run.
        threads: images at work at once.
    """

    sam: FolderOrName
    data: ImagesConfig
    labels: DataPath
    classes: FileOrName = "cityscapes"
    class_map: FileOrName | None = None
    every: PositiveInt = 1
    modes: tuple[Mode, ...] = ("improved", "paper")
    improved: Improved = field(default_factory=Improved)
    things: tuple[str, ...] = THINGS
    kept: tuple[str, ...] = KEPT
    seed: NonNegativeInt = 0
    figures: NonNegativeInt = field(default=3, metadata=FREE)
    score: bool = True
    cache: Path | None = field(default=None, metadata=FREE)
    cache_bytes: PositiveInt = field(default=4 << 30, metadata=FREE)
    threads: PositiveInt = field(default=2, metadata=FREE)

    def roles(self) -> Roles:
        """Returns the roles of the classes."""
        return roles_of(class_list(self.classes), self.things, self.kept)

    def open(self) -> Dataset:
        """Returns the images."""
        return self.data.open(labels=self.score)[:: self.every]


def roles_of(classes: ClassList, things: Collection[str] = THINGS, kept: Collection[str] = KEPT) -> Roles:
    """Returns the roles of a list's classes; names that it lacks are left out."""
    names = classes.names
    things_at, kept_at = (frozenset(names.index(n) for n in part if n in names) for part in (things, kept))
    return Roles(len(names), things_at, kept_at)


def check(config: Config) -> None:
    """Raises UserError for missing images, maps or graphs, and class lists that do not fit."""
    SamStage(config.sam)
    if pending(config.data.root) or pending(config.labels):
        return
    images = config.open()
    _recorded(config, images)
    if config.score:
        common_list(class_list(config.classes), images.classes, config.class_map)


def stages(config: Config) -> list[Stage]:
    """Returns masks (regions of each image), one stage for each mode, and scores."""
    facts = {"sam": config.sam, "data": config.data, "every": config.every}
    grid = {name: getattr(config.improved, name) for name in OF_REGIONS}
    maps = {"labels": config.labels, "classes": config.classes}
    voting = {"improved": config.improved, "things": config.things, "kept": config.kept}
    made: list[Stage] = []
    if "improved" in config.modes:
        made.append(Stage("masks", partial(_masks, config), facts | grid, alone=True))
        made.append(Stage("improved", partial(_improved, config), facts | maps | voting, ("masks",), alone=True))
    if "paper" in config.modes:
        made.append(Stage("paper", partial(_paper, config), facts | maps | {"seed": config.seed}, alone=True))
    if config.score:
        compared = {"class_map": config.class_map}
        made.append(Stage("scores", partial(_scores, config), compared, config.modes, alone=True))
    return made


def plan(config: Config) -> Plan:
    """Returns the stages and the number of images."""
    what = {"masks": "regions of each image", "improved": "regions vote", "paper": "CLOUDS' prompts",
            "scores": "before and after, by class"}  # fmt: skip
    named = tuple((stage.name, what[stage.name]) for stage in stages(config))
    return Plan(stages=named, notes=() if pending(config.data.root) else (f"{len(config.open())} images",))


def _sam(config: Config, folder: Path) -> SamStage:
    cache = config.cache or folder.parent / "cache"
    return SamStage(config.sam, cache, config.cache_bytes, config.threads)


def _masks(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    """Writes the regions of each image as `regions/<name>.npz`; those that are there are kept."""
    stage, images = _sam(config, folder), config.open()
    claim(folder, {"sam": stage.fingerprint, "data": images.digest(labels=False)})
    missing = [item for item in images.items if not _regions_file(folder, item.name).is_file()]

    def one(item: Any) -> None:
        masks = regions_of(stage, stage.embed(read_image(item.image)), config.improved)
        path = _regions_file(folder, item.name)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                np.savez_compressed(
                    part, packed=np.packbits(masks.masks, axis=2), size=masks.masks.shape[1:], iou=masks.iou,
                    stability=masks.stability,
                )  # fmt: skip

    for _ in track(stage.over(one, missing), "masks", len(missing)):
        pass
    return {"images": len(images), "calls": stage.calls}


def _regions_file(folder: Path, name: str) -> Path:
    return folder / "regions" / f"{name}.npz"


def _regions(folder: Path, name: str) -> Masks:
    with np.load(_regions_file(folder, name)) as file:
        masks = np.unpackbits(file["packed"], axis=2, count=int(file["size"][1])).astype(bool)
        return Masks(masks, file["iou"], file["stability"])


def _improved(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    images, roles = config.open(), config.roles()
    maps = _recorded(config, images)
    stage = _sam(config, folder) if config.improved.boxes else None
    evidence = [
        Evidence.of(_map(maps, item.name, roles), _regions(done["masks"], item.name), roles.count)
        for item in track(images.items, "votes")
    ]
    weights = sum(evidence[1:], evidence[0]).weights(config.improved.trust, config.improved.rarity)

    def one(item: Any) -> Refined:
        embedding = stage.embed(read_image(item.image)) if stage else None
        label_map, regions = _map(maps, item.name, roles), _regions(done["masks"], item.name)
        return voted(label_map, regions, weights, roles, config.improved, stage, embedding)

    names = class_list(config.classes).names
    facts = {"weights": {name: round(float(w), 4) for name, w in zip(names, weights, strict=True)}}
    return facts | _write(config, folder, images, maps, map(one, images.items), "improved")


def _paper(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    images, roles, stage = config.open(), config.roles(), _sam(config, folder)
    maps = _recorded(config, images)

    def one(item: Any) -> Refined:
        return paper(stage, stage.embed(read_image(item.image)), _map(maps, item.name, roles), config.seed)

    return _write(config, folder, images, maps, stage.over(one, images.items), "paper")


def _write(
    config: Config, folder: Path, images: Dataset, maps: dict[str, Path], refined: Iterator[Refined], mode: str
) -> dict[str, Any]:
    """Writes `labels/<name>.png` and the figures; returns shares of pixels with a class, and of accepted masks."""
    classes, roles = class_list(config.classes), config.roles()
    covered, answered, accepted, sections = [], [], [], []
    shown = np.linspace(0, len(images) - 1, min(config.figures, len(images))).round().astype(int)
    for place, (item, result) in enumerate(zip(images.items, track(refined, mode, len(images)), strict=True)):
        path = folder / "labels" / f"{item.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, result.labels)
        covered.append(float(result.covered.mean()))
        answered.append(float((result.labels != IGNORE).mean()))
        accepted.append(float((result.classes != IGNORE).mean()) if len(result.classes) else 0.0)
        if place in shown:
            image = read_image(item.image)
            write_png(folder / f"{place:06}.png", figure(image, _map(maps, item.name, roles), result, classes))
            text = "image, recorded map, prompts, masks (grey: refused), refined map"
            sections.append(Section(f"{mode}: {item.name}", text, image=f"{place:06}.png"))
    write_sections(folder, sections)
    return {"covered": np.mean(covered), "answered": np.mean(answered), "accepted_masks": np.mean(accepted)}


def figure(
    image: UInt8[np.ndarray, "H W 3"], label_map: UInt8[np.ndarray, "H W"], result: Refined, classes: ClassList
) -> UInt8[np.ndarray, "h w 3"]:
    """Returns image, map, prompts, masks and refined map side by side."""
    masks = (image * 0.35).astype(np.uint8)
    for place in np.argsort(-result.masks.masks.sum((1, 2)), kind="stable"):
        label = result.classes[place]
        masks[result.masks.masks[place]] = REFUSED if label == IGNORE else classes.palette[label]
    prompts = image.copy()
    radius = max(round(min(image.shape[:2]) / 120), 1)
    for prompt in result.prompts:
        for (x, y), positive in zip(np.asarray(prompt.points, int), prompt.labels, strict=True):
            patch = slice(max(y - radius, 0), y + radius + 1), slice(max(x - radius, 0), x + radius + 1)
            prompts[patch] = POSITIVE if positive else NEGATIVE
        if prompt.box is not None:
            left, top, right, bottom = map(int, prompt.box)
            prompts[[top, bottom], left : right + 1] = POSITIVE
            prompts[top : bottom + 1, [left, right]] = POSITIVE
    tiles = {
        "image": image,
        "map": overlay(image, label_map, classes, 0.8),
        "prompts": prompts,
        "masks": masks,
        "refined": overlay(image, result.labels, classes, 0.8),
    }
    return in_row(tiles)


def _scores(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    """Writes a folder with `scores.json` for the recorded maps and for each mode."""
    images, roles, classes = config.open(), config.roles(), class_list(config.classes)
    maps, common = _recorded(config, images), common_list(classes, images.classes, config.class_map)
    reads: dict[str, Callable[[str], np.ndarray]] = {"recorded": lambda name: _map(maps, name, roles)}
    for mode in config.modes:
        reads[mode] = lambda name, mode=mode: read_png(done[mode] / "labels" / f"{name}.png")  # type: ignore[misc]
    rows: list[tuple[Cell, ...]] = []
    outputs: dict[str, dict[str, float]] = {}
    for which, read in reads.items():
        scores, answered = _score(images, common, read)
        outputs[which] = {"miou": scores.miou, "accuracy": scores.accuracy, "answered": answered}
        rows.append((which, *(round(100 * value, 2) for value in outputs[which].values())))
        (folder / which).mkdir(exist_ok=True)
        write_json(folder / which / "scores.json", {
            "model": which, "fingerprint": "", "dataset": images.name, "split": images.split, "images": len(images),
            "classes": list(common.classes.names), "palette": np.asarray(common.classes.palette).tolist(),
            "scores": scores.to_json(), "examples": [],
        })  # fmt: skip
    text = "All labelled pixels count; a pixel without an answer, or whose class has no counterpart, is wrong."
    table = Table(("maps", "mIoU, %", "pixel accuracy, %", "pixels with an answer, %"), tuple(rows))
    write_sections(folder, [Section("Before and after", text, table)])
    return outputs


def _score(images: Dataset, common: Common, read: Callable[[str], np.ndarray]) -> tuple[Scores, float]:
    names = common.classes.names
    total, answered = np.zeros((len(names), len(names) + 1), np.int64), []
    for place, item in enumerate(images.items):
        labels, label_map = images.labels(place), read(item.name)
        assert labels is not None  # opened with labels
        answered.append(float((label_map != IGNORE).mean()))
        total += confusion_matrix(common.labels[labels], common.predictions[label_map], len(names), void=True)
    return Scores.from_confusion(total, names), float(np.mean(answered))


def _recorded(config: Config, images: Dataset) -> dict[str, Path]:
    """Returns the file of each image's map, by its name.

    Raises UserError for a map that is missing, there twice, damaged, or of another size.
    """
    folder = below_data(config.labels)
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.png")):
        files.setdefault(path.stem, []).append(path)
    maps = {}
    for item in images.items:
        here = files.get(Path(item.image).stem, [])
        if len(here) != 1 or not is_whole(here[0]):
            fault = "no label map" if not here else "a damaged label map" if len(here) == 1 else "two label maps"
            where = f"; {', '.join(map(str, here[:2]))}" if here else ""
            raise UserError(f"{folder}: {fault} for {Path(item.image).stem}{where}; labels= names the recorded maps")
        sizes = [image_size(file) for file in (item.image, here[0])]
        if sizes[0] != sizes[1]:
            shown = [f"{width}x{height}" for width, height in sizes]
            raise UserError(f"{here[0]}: is {shown[1]} and its image {shown[0]}; give maps of the images' size")
        maps[item.name] = here[0]
    return maps


def _map(maps: dict[str, Path], name: str, roles: Roles) -> UInt8[np.ndarray, "H W"]:
    label_map = read_png(maps[name])
    beyond = label_map[(label_map >= roles.count) & (label_map != IGNORE)]
    if label_map.ndim != 2 or beyond.size:
        raise UserError(f"{maps[name]}: not a label map of the class list; classes= names its list")
    return label_map
