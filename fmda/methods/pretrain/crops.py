"""Crops of rendered street scenes with captions that are true of the crop. NumPy alone, for worker processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
from jaxtyping import Bool, UInt8

from fmda.config import Bounds, NonNegativeInt, PositiveInt, Share, Side
from fmda.errors import UserError
from fmda.methods.pretrain.prompts import LOOKS, fitting, looks_of, needs
from fmda.methods.render import RenderConfig, rendered
from fmda.png import read_png
from fmda.progress import track
from fmda.runs.journal import read_rows
from fmda.world.captions import caption, crop_facts, word
from fmda.world.names import CLASSES, VOID

Tokenize = Callable[[Sequence[str]], np.ndarray]

TAGS = (*CLASSES, *LOOKS, "untagged")
"""What a caption can state of a crop. "untagged" is true of none: it marks captions that state more than tags do."""


@dataclass(frozen=True)
class CropConfig:
    """How crops are cut and described.

    Attributes:
        size: side of a crop after resizing, pixels.
        side: smallest and largest side in the image, as a share of its height; drawn log-uniformly.
        centred: probability that a crop is centred on a pixel of a random class of the image, so that rare classes
            occur.
        spoiled: probability that the crop is blurred, pixelated, darkened, ..., and described so.
        prompted: probability of a caption made from a prompt template; else a free sentence.
        noise: probability that the template is drawn from all of them, true or not.
        least: share of the crop below which a class is not part of it.
    """

    size: PositiveInt = 64
    side: tuple[Side, Side] = (0.2, 1.0)
    centred: Share = 0.6
    spoiled: Share = 0.25
    prompted: Share = 0.6
    noise: Share = 0.03
    least: Share = 0.02


@dataclass(frozen=True)
class Drawn:
    """Images of one domain of the street world, rendered into memory when a run opens them; no folder is needed.

    Attributes:
        domain: of the street world.
        count: images.
        height, width: of an image, pixels.
        seed: image i follows from (seed, domain, i) alone.
        batch: images per call of the renderer.
    """

    domain: str
    count: PositiveInt
    height: Annotated[int, Bounds(32)] = 128
    width: Annotated[int, Bounds(32)] = 256
    seed: NonNegativeInt = 0
    batch: PositiveInt = 32

    def __post_init__(self) -> None:
        """Raises UserError for an unknown domain."""
        self.renderer()

    def __str__(self) -> str:
        return f"{self.domain} ({self.count} drawn from seed {self.seed})"

    def renderer(self) -> RenderConfig:
        """Returns the renderer's configuration."""
        return RenderConfig({self.domain: self.count}, self.height, self.width, self.seed, self.batch)


class Scenes(Sequence[dict[str, Any]]):
    """Street scenes of rendered folders, or drawn into memory, as a random-access source of plain dicts."""

    def __init__(self, sources: Sequence[str | Path | Drawn]) -> None:
        self.rows: list[dict[str, Any] | tuple[Path, dict[str, Any]]] = []
        for drawn in sources:
            if isinstance(drawn, Drawn):
                images = rendered(drawn.renderer(), drawn.domain, range(drawn.count))
                self.rows += [scene for _, scene in track(images, f"render {drawn.domain}", drawn.count)]
        for root in (Path(source) for source in sources if not isinstance(source, Drawn)):
            index = root / "captions.jsonl"
            if not index.is_file():
                raise UserError(f"{index}: not found; draw the folder with `fmda data render` or fix the path")
            try:
                self.rows += [
                    (root, {"name": str(row["name"]), "facts": row["facts"]}) for row in read_rows(index, finished=True)
                ]
            except (KeyError, TypeError):
                raise UserError(f"{index}: damaged; delete the folder and draw it again") from None
        if not self.rows:
            raise UserError(f"{', '.join(map(str, sources))}: no images; draw some with `fmda data render`")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        scene = self.rows[index]
        if isinstance(scene, dict):
            return scene
        root, row = scene
        name = f"{row['name']}.png"
        return {
            "image": read_png(root / "images" / name),
            "labels": _labels(root / "labels" / name),
            "instances": read_png(root / "instances" / name),
            "facts": row["facts"],
        }


def _labels(path: Path) -> np.ndarray:
    labels = read_png(path)
    if labels.ndim != 2 or labels.dtype != np.uint8:
        what = "a colour image" if labels.ndim != 2 else f"a {8 * labels.itemsize}-bit label map"
        raise UserError(f"{path}: {what}, not 8-bit class ids; delete it and draw the folder again")
    stray = labels[(labels >= len(CLASSES)) & (labels != VOID)]
    if stray.size:
        raise UserError(
            f"{path}: label value {stray[0]} is outside the class list (0-{len(CLASSES) - 1}, {VOID} for none); "
            "delete it and draw the folder again"
        )
    return labels


@dataclass(frozen=True)
class Crops:
    """The transform (scene, generator) -> `count` captioned crops.

    The result holds "pixels" uint8 [count, size, size, 3], "ids" int32 [count, T], the tags "present" (true of the
    crop) and "stated" (by the caption), bool [count, len(TAGS)], and "patches" uint8 [count, grid * grid], the
    class that fills most of a patch, 255 where none does.
    """

    config: CropConfig
    templates: tuple[str, ...]
    tokenize: Tokenize
    count: int
    grid: int

    def __call__(self, scene: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        rows = [self._crop(scene, rng) for _ in range(self.count)]
        pixels, texts, present, stated, patches = zip(*rows, strict=True)
        return {
            "pixels": np.stack(pixels),
            "ids": self.tokenize(texts),
            "present": np.stack(present),
            "stated": np.stack(stated),
            "patches": np.stack(patches),
        }

    def _crop(self, scene: dict[str, Any], rng: np.random.Generator) -> tuple:
        config = self.config
        labels, instances = scene["labels"], scene["instances"]
        box = _box(labels, rng, config)
        top, left, side = box
        window = slice(top, top + side), slice(left, left + side)
        inside, numbers, pixels = labels[window], instances[window], scene["image"][window]
        if rng.random() < 0.5:
            inside, numbers, pixels = inside[:, ::-1], numbers[:, ::-1], pixels[:, ::-1]
        facts = crop_facts(inside, numbers, scene["facts"], (0, 0, side, side))
        facts["crop"] = side < 0.9 * len(labels)
        kind = cv2.INTER_AREA if side > config.size else cv2.INTER_LINEAR
        pixels = cv2.resize(np.ascontiguousarray(pixels), (config.size, config.size), interpolation=kind)
        extra: set[str] = set()
        if rng.random() < config.spoiled:
            pixels, extra = spoiled(pixels, rng)
        text, present, stated = self.described(inside, facts, rng, extra)
        return np.ascontiguousarray(pixels), text, present, stated, patch_classes(inside, self.grid)

    def described(
        self, labels: UInt8[np.ndarray, "h w"], facts: dict[str, Any], rng: np.random.Generator, extra: set[str]
    ) -> tuple[str, Bool[np.ndarray, " t"], Bool[np.ndarray, " t"]]:
        """Returns a caption of a crop, the tags that are true of it, and those that the caption states.

        labels: of the crop. facts: of the crop, from `crop_facts`. extra: looks that follow from neither.
        """
        shares = np.bincount(labels.ravel(), minlength=VOID + 1)[: len(CLASSES)] / labels.size
        classes = np.flatnonzero(shares >= self.config.least)
        named = _named(shares, classes, rng)
        looks = looks_of(
            facts["style"], facts["weather"], facts["time"], extra | _object_looks(shares, labels, facts, named)
        )
        text, stated = self._caption(facts, named, looks, rng)
        return text, _tags([CLASSES[c] for c in classes], looks), stated

    def of_window(
        self, scene: dict[str, Any], box: tuple[int, int, int, int], rng: np.random.Generator
    ) -> tuple[str, Bool[np.ndarray, " t"], Bool[np.ndarray, " t"]]:
        """Returns what `described` does, of the window (top, left, bottom, right) of a scene."""
        facts = crop_facts(scene["labels"], scene["instances"], scene["facts"], box)
        return self.described(scene["labels"][box[0] : box[2], box[1] : box[3]], facts, rng, set())

    def _caption(
        self, facts: dict[str, Any], named: list[int], looks: frozenset[str], rng: np.random.Generator
    ) -> tuple[str, Bool[np.ndarray, " t"]]:
        if not named or rng.random() >= self.config.prompted:
            return caption(facts, rng), _tags([], {"untagged"})
        if rng.random() < self.config.noise:
            template = self.templates[rng.integers(len(self.templates))]
        else:
            choices = fitting(self.templates, looks)
            # a template that states a look is drawn more often than one that states none
            weights = np.array([3.0 if needs(self.templates[i]) else 1.0 for i in choices])
            template = self.templates[rng.choice(choices, p=weights / weights.sum())]
        names = [CLASSES[c] for c in named]
        text = " and a ".join(word(name, rng) for name in names)
        return template.format(text), _tags(names, needs(template) & looks)


def _box(labels: UInt8[np.ndarray, "h w"], rng: np.random.Generator, config: CropConfig) -> tuple[int, int, int]:
    """Returns top, left and side of a square inside the image."""
    height, width = labels.shape
    low, high = np.log(config.side)
    side = min(int(round(height * np.exp(rng.uniform(low, high)))), height, width)
    if rng.random() < config.centred:
        counts = np.bincount(labels.ravel(), minlength=VOID + 1)[: len(CLASSES)]
        present = np.flatnonzero(counts)
        if len(present):
            places = np.flatnonzero(labels.ravel() == rng.choice(present))
            row, column = divmod(int(rng.choice(places)), width)
            jitter = rng.uniform(-0.3, 0.3, 2) * side
            top, left = row + jitter[0] - side / 2, column + jitter[1] - side / 2
            return int(np.clip(top, 0, height - side)), int(np.clip(left, 0, width - side)), side
    return int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1)), side


def _named(shares: np.ndarray, classes: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Returns one or two classes of the crop to name, large ones more often."""
    if not len(classes):
        return []
    weights = np.sqrt(shares[classes])
    count = min(len(classes), 1 if rng.random() < 0.7 else 2)
    chosen = rng.choice(classes, size=count, replace=False, p=weights / weights.sum())
    return [int(c) for c in chosen]


def _object_looks(shares: np.ndarray, inside: np.ndarray, facts: dict[str, Any], named: list[int]) -> set[str]:
    """Returns looks that follow from the size and number of the first named class."""
    if not named:
        return set()
    first = named[0]
    looks = set()
    share = shares[first]
    mask = inside == first
    if share > 0.45:
        looks |= {"close", "large"}
    elif share > 0.2:
        looks.add("large")
    elif share < 0.06:
        looks.add("small")
    if share < 0.03:
        looks.add("tiny")
    if share > 0.05 and mask[[0, -1]].any() + mask[:, [0, -1]].any() == 2:
        looks.add("cut")
    count = facts["counts"].get(CLASSES[first], 0)
    if count >= 3:
        looks.add("many")
    elif count == 1:
        looks.add("single")
    return looks


def patch_classes(labels: UInt8[np.ndarray, "s s"], grid: int, cells: int = 4) -> UInt8[np.ndarray, " p"]:
    """Returns the class that fills more than half of each of grid x grid patches, row by row; else 255."""
    side = grid * cells
    small = cv2.resize(np.ascontiguousarray(labels), (side, side), interpolation=cv2.INTER_NEAREST)
    one_hot = small[..., None] == np.arange(len(CLASSES), dtype=np.uint8)
    counts = one_hot.reshape(grid, cells, grid, cells, -1).sum((1, 3)).reshape(grid * grid, -1)
    best = counts.argmax(1)
    filled = counts[np.arange(len(best)), best] > cells * cells // 2
    return np.where(filled, best, VOID).astype(np.uint8)


def _tags(names: Sequence[str], looks: frozenset[str] | set[str]) -> Bool[np.ndarray, " t"]:
    present = {*names, *looks}
    return np.array([tag in present for tag in TAGS])


def spoiled(
    pixels: UInt8[np.ndarray, "s s 3"], rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "s s 3"], set[str]]:
    """Returns the crop after one random degradation, and the looks that name it."""
    side = len(pixels)
    pixels = np.ascontiguousarray(pixels)
    match int(rng.integers(7)):
        case 0:
            return cv2.GaussianBlur(pixels, (0, 0), rng.uniform(1.2, 2.5)), {"blurry"}
        case 1:
            small = cv2.resize(pixels, (side // 4, side // 4), interpolation=cv2.INTER_AREA)
            return cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC), {"low resolution", "blurry"}
        case 2:
            part = int(rng.choice([4, 5, 6]))
            small = cv2.resize(pixels, (side // part, side // part), interpolation=cv2.INTER_AREA)
            return cv2.resize(small, (side, side), interpolation=cv2.INTER_NEAREST), {"pixelated", "low resolution"}
        case 3:
            _, code = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(3, 12))])
            return np.asarray(cv2.imdecode(code, cv2.IMREAD_COLOR)), {"jpeg"}
        case 4:
            grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
            return np.repeat(grey[..., None], 3, axis=-1), {"grey"}
        case 5:
            return (pixels * rng.uniform(0.25, 0.5)).astype(np.uint8), {"dark"}
        case _:
            return np.clip(pixels * rng.uniform(1.5, 2.2) + 20, 0, 255).astype(np.uint8), {"bright"}
