"""Refinement of label maps by SAM: the algorithm of CLOUDS, and regions that vote.

Prompted by a map's own components, SAM returns other parts and larger wholes, and the map gets worse (Benigmim et al.
2024 refine so; measured against votes by Zhao et al. 2024, SeCo). Regions that do not depend on the map keep their
boundaries where it is wrong.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from fmda.config import NonNegativeFloat, PositiveInt, Share
from fmda.data import IGNORE
from fmda.errors import UserError
from fmda.sam.automatic import automatic_masks, grid
from fmda.sam.prompts import box_and_points, components, random_points
from fmda.sam.stage import OBJECT, Embedding, Masks, Prompt, SamStage

PAPER_POINTS = 5
PAPER_SHARE = 5000 / 768**2
"""Least component: 5,000 pixels of the paper's 768 x 768, and the same share of other sizes."""

UNSEEN = 1e-3
"""Added to the share of each class, so that the rarest do not outvote all others."""

LEAST_PIXELS = 0.15
"""Share of a region's pixels that its class has at least, whatever the weights."""


@dataclass(frozen=True, kw_only=True)
class Improved:
    """How regions vote.

    Attributes:
        points: of the grid, about.
        least_iou, least_stability: of a region, 0..1.
        most_overlap: IoU beyond which the region of the lower score (predicted IoU times stability) is dropped.
        least_share: weighted share of the votes that a region's class needs; else the region is refused.
        trust: exponent of a class's agreement with regions in the weight of its votes; 0 counts all alike.
        rarity: exponent of a class's share of all pixels in that weight, inverse; 0 counts all alike.
        contested: a class that is no thing keeps its pixels in a region of another where it has this share or more.
        boxes: also prompt with box, innermost point and negative points of each component of a thing class.
        least_thing: share of the image that such a component has at least.
        uncovered: pixels outside all accepted regions: "map" keeps their label, "ignore" makes them 255.
    """

    points: PositiveInt = 48
    least_iou: Share = 0.5
    least_stability: Share = 0.6
    most_overlap: Share = 0.8
    least_share: Share = 0.4
    trust: NonNegativeFloat = 0.5
    rarity: NonNegativeFloat = 0.5
    contested: Share = 0.2
    boxes: bool = False
    least_thing: Share = 0.0005
    uncovered: Literal["map", "ignore"] = "ignore"


@dataclass(frozen=True)
class Roles:
    """Classes by their number.

    Attributes:
        count: of all classes.
        things: countable objects.
        kept: classes whose parts are small or thin; their pixels keep their label inside regions of other classes.
    """

    count: int
    things: frozenset[int] = frozenset()
    kept: frozenset[int] = frozenset()


class Refined(NamedTuple):
    """A refined label map and what it was made of.

    Attributes:
        labels: classes, 255 for none.
        covered: pixels of an accepted mask.
        prompts, masks: what SAM was given, and its answers; grid points have no mask of their own.
        classes: of each mask; 255 where it was refused.
    """

    labels: UInt8[np.ndarray, "H W"]
    covered: Bool[np.ndarray, "H W"]
    prompts: Sequence[Prompt]
    masks: Masks
    classes: UInt8[np.ndarray, " p"]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the regions of images tell about the classes of their maps; sums, so that images can be added.

    Attributes:
        agreement: votes of each class, each counted by the share of its class in its region.
        votes: pixels of each class in regions, counted once for each region.
        pixels: of each class.
    """

    agreement: Float[np.ndarray, " k"]
    votes: Float[np.ndarray, " k"]
    pixels: Float[np.ndarray, " k"]

    @classmethod
    def of(cls, label_map: UInt8[np.ndarray, "H W"], regions: Masks, classes: int) -> "Evidence":
        """Returns the evidence of one image."""
        counts = _counts(label_map, regions, classes)[:, :classes]
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        pixels = np.bincount(label_map.ravel(), minlength=256)[:classes]
        return cls((counts * shares).sum(0), counts.sum(0).astype(float), pixels / label_map.size)

    def __add__(self, other: "Evidence") -> "Evidence":
        return Evidence(self.agreement + other.agreement, self.votes + other.votes, self.pixels + other.pixels)

    def weights(self, trust: float, rarity: float) -> Float[np.ndarray, " k"]:
        """Returns the weight of a vote of each class, at most 1.

        A class that mostly lies in regions of other classes is seldom right, and counts less; so does a class that is
        predicted everywhere.
        """
        agreement = self.agreement / np.maximum(self.votes, 1)
        share = self.pixels / max(self.pixels.sum(), 1e-9) + UNSEEN
        weights = agreement**trust * share**-rarity
        weights[self.votes == 0] = 0
        return weights / max(weights.max(), 1e-9)


def refine(
    stage: SamStage,
    image: UInt8[np.ndarray, "H W 3"],
    label_map: UInt8[np.ndarray, "H W"],
    roles: Roles,
    settings: Improved | None = None,
    weights: Float[np.ndarray, " k"] | None = None,
) -> Refined:
    """Returns a label map whose regions are SAM's: `settings` of votes, or None for the algorithm of the paper.

    `weights` are those of `Evidence` over many images; default: over this one.

    Raises UserError where image and map differ in size, or the map has values beyond the classes.
    """
    check_map(image, label_map, roles.count)
    embedding = stage.embed(image)
    if settings is None:
        return paper(stage, embedding, label_map)
    regions = regions_of(stage, embedding, settings)
    if weights is None:
        weights = Evidence.of(label_map, regions, roles.count).weights(settings.trust, settings.rarity)
    return voted(label_map, regions, weights, roles, settings, stage, embedding)


def paper(stage: SamStage, embedding: Embedding, label_map: UInt8[np.ndarray, "H W"], seed: int = 0) -> Refined:
    """Returns the map as CLOUDS refines it (Benigmim et al. 2024, released code).

    Five random points in each 4-connected component above 5,000 pixels of 768 x 768; of three masks the one with the
    highest predicted IoU; pixels of two masks or more belong to none; the others take the class of the component.
    What no mask covers is 255. A map without such a component stays as it is.
    """
    rng = np.random.default_rng([seed, zlib.crc32(label_map.tobytes())])
    parts = components(label_map, PAPER_SHARE * label_map.size)
    pairs = [(part, random_points(part, PAPER_POINTS, rng)) for part in parts]
    prompts = [prompt for _, prompt in pairs if prompt is not None]
    classes = np.array([part.label for part, prompt in pairs if prompt is not None], np.uint8)
    masks = stage.decode(embedding, prompts)
    if not prompts:
        return Refined(label_map.copy(), label_map != IGNORE, prompts, masks, classes)
    single = masks.masks.sum(0) == 1
    labels = np.full(label_map.shape, IGNORE, np.uint8)
    for mask, label in zip(masks.masks, classes, strict=True):
        labels[mask & single] = label
    return Refined(labels, single, prompts, masks, classes)


def regions_of(stage: SamStage, embedding: Embedding, settings: Improved) -> Masks:
    """Returns the regions that vote."""
    return automatic_masks(
        stage, embedding, settings.points, least_iou=settings.least_iou, least_stability=settings.least_stability,
        most_overlap=settings.most_overlap,
    )  # fmt: skip


def voted(
    label_map: UInt8[np.ndarray, "H W"],
    regions: Masks,
    weights: Float[np.ndarray, " k"],
    roles: Roles,
    settings: Improved,
    stage: SamStage | None = None,
    embedding: Embedding | None = None,
) -> Refined:
    """Returns the map after each region took the class that most of its weighted pixels have.

    Smaller regions lie above larger ones. A region without a class of `least_share` contradicts the map and is refused.
    `stage` and `embedding` are needed with `settings.boxes`.
    """
    height, width = label_map.shape
    prompts = [Prompt(point[None], np.array([OBJECT])) for point in grid(height, width, settings.points)]
    if settings.boxes:
        assert stage is not None and embedding is not None
        parts = components(label_map, settings.least_thing * label_map.size, roles.things)
        boxes = [box_and_points(part, label_map) for part in parts]
        added = stage.decode(embedding, boxes)
        regions = Masks(*(np.concatenate(pair) for pair in zip(regions, added, strict=True)))
        prompts += boxes
    counts = _counts(label_map, regions, roles.count)
    classes = _elected(counts, weights, settings.least_share)
    shares = counts[:, : roles.count] / np.maximum(counts.sum(1, keepdims=True), 1)
    labels, covered = label_map.copy(), np.zeros(label_map.shape, bool)
    for place in np.argsort(-counts.sum(1), kind="stable"):
        if classes[place] == IGNORE:
            continue
        contested = set(np.flatnonzero(shares[place] >= settings.contested).tolist()) - roles.things
        stay = (roles.kept | contested) - {int(classes[place])}
        mask = regions.masks[place]
        labels[mask & ~np.isin(label_map, list(stay))] = classes[place]
        covered |= mask
    if settings.uncovered == "ignore":
        labels[~covered] = IGNORE
    return Refined(labels, covered, prompts, regions, classes)


def check_map(image: UInt8[np.ndarray, "H W 3"], label_map: UInt8[np.ndarray, "H W"], classes: int) -> None:
    """Raises UserError where image and map differ in size, or the map has values beyond the classes and 255."""
    if image.shape[:2] != label_map.shape:
        sizes = ["x".join(map(str, array.shape[1::-1])) for array in (image, label_map)]
        raise UserError(f"label map: is {sizes[1]} and its image {sizes[0]}; give both one size")
    beyond = label_map[(label_map >= classes) & (label_map != IGNORE)]
    if beyond.size:
        raise UserError(f"label map: value {beyond[0]} is beyond the {classes} classes and not {IGNORE}; name its list")


def _counts(label_map: UInt8[np.ndarray, "H W"], regions: Masks, classes: int) -> Int[np.ndarray, "p k1"]:
    """Returns the pixels of each class in each region, those of no class last."""
    values = np.where(label_map == IGNORE, classes, label_map)
    rows = [np.bincount(values[mask], minlength=classes + 1) for mask in regions.masks]
    return np.array(rows, np.int64).reshape(len(rows), classes + 1)


def _elected(
    counts: Int[np.ndarray, "p k1"], weights: Float[np.ndarray, " k"], least_share: float
) -> UInt8[np.ndarray, " p"]:
    """Returns the class of each region, 255 where none has enough votes. Pixels of no class vote for none."""
    votes = counts[:, :-1] * weights
    best = votes.argmax(1) if len(votes) else np.zeros(0, int)
    rows = np.arange(len(votes))
    total = votes.sum(1) + counts[:, -1] * weights.mean()
    enough = votes[rows, best] >= least_share * np.maximum(total, 1e-9)
    present = counts[rows, best] > LEAST_PIXELS * np.maximum(counts.sum(1), 1)
    return np.where(enough & present, best, IGNORE).astype(np.uint8)
