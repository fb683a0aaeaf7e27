"""Whether patches that look alike to a network show the same class. Labels are read here and nowhere before."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8

from fmda.data import IGNORE
from fmda.errors import UserError
from fmda.methods.dense import normalised
from fmda.methods.pretrain.crops import Scenes, patch_classes
from fmda.methods.pretrain.dino_views import random_square, resized_window
from fmda.progress import track
from fmda.world.names import CLASSES

THINGS = (*CLASSES[5:8], *CLASSES[11:])
PatchEncoder = Callable[[UInt8[np.ndarray, "n s s 3"]], np.ndarray]


def raw_patches(pixels: UInt8[np.ndarray, "n s s 3"], patch: int) -> Float[np.ndarray, "n h w d"]:
    """Returns the normalised pixels of each patch as one vector: the baseline that has learned nothing."""
    n, size = pixels.shape[:2]
    side = size // patch
    cut = normalised(pixels).reshape(n, side, patch, side, patch, 3)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(n, side, side, -1)


def labelled_squares(
    root: Path, size: int, patch: int, seed: int, most: int
) -> tuple[UInt8[np.ndarray, "n s s 3"], UInt8[np.ndarray, "n p"]]:
    """Returns squares of a rendered folder's images, and the class that fills most of each patch (255 = none)."""
    scenes = Scenes([root])
    chosen = np.random.default_rng((seed, 3)).permutation(len(scenes))[:most]
    pixels, classes = [], []
    for number in track([int(i) for i in chosen], f"patches of {root}"):
        scene = scenes[number]
        # the same generator twice: image and labels are cut at the same place
        cut = [random_square(scene[k], (1.0, 1.0), np.random.default_rng((seed, number))) for k in ("image", "labels")]
        pixels.append(resized_window(cut[0], size))
        classes.append(patch_classes(cut[1], size // patch))
    return np.stack(pixels), np.stack(classes)


def agreement_on(
    root: Path,
    encoders: Mapping[str, PatchEncoder],
    size: int,
    patch: int,
    thresholds: Sequence[float],
    seed: int,
    most: int = 64,
) -> dict[str, dict[str, float]]:
    """Returns `agreement` of each network in `encoders`, and of "raw pixels", on squares of a rendered folder."""
    pixels, classes = labelled_squares(root, size, patch, seed, most)
    if len(pixels) < 2:
        raise UserError(f"{root}: the check compares images and needs at least two; draw more")
    outputs = {"raw pixels": raw_patches(pixels, patch), **_patch_features(pixels, encoders)}
    flat = {name: features.reshape(*classes.shape, -1) for name, features in outputs.items()}
    return {name: agreement(features, classes, thresholds) for name, features in flat.items()}


def agreement(
    features: Float[np.ndarray, "n p d"],
    classes: UInt8[np.ndarray, "n p"],
    thresholds: Sequence[float],
    share: float = 0.1,
) -> dict[str, float]:
    """Returns how far likeness of patches tells sameness of class; all values are shares between 0 and 1.

    Pairs of different patches of one image, both of a known class:
        "same": pairs of one class, which is what chance would reach.
        "alike>t": pairs with a cosine above the threshold t, "agree>t": pairs of one class among those.
        "agree_top": the same among the most similar `share` of all pairs: no threshold, so that networks whose
            cosines spread differently can be compared.
    Across images:
        "nearest": patches of the second half of the images whose most similar patch of the first half has their
            class.
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
    known = classes != IGNORE
    upper = np.triu(np.ones((classes.shape[1],) * 2, bool), 1)
    cosines, same = [], []
    for vectors, labels, use in zip(unit, classes, known, strict=True):
        pairs = upper & use[:, None] & use[None]
        cosines.append((vectors @ vectors.T)[pairs])
        same.append((labels[:, None] == labels[None])[pairs])
    cosine, equal = np.concatenate(cosines), np.concatenate(same)
    result = {"same": _share(equal, np.ones_like(equal))}
    for threshold in thresholds:
        alike = cosine > threshold
        result |= {f"alike>{threshold:g}": float(alike.mean()), f"agree>{threshold:g}": _share(equal, alike)}
    half = len(classes) // 2
    bank, bank_classes = unit[:half][known[:half]], classes[:half][known[:half]]
    queries, query_classes = unit[half:][known[half:]], classes[half:][known[half:]]
    nearest = [
        int(i) for part in np.array_split(queries, max(1, len(queries) // 512)) for i in (part @ bank.T).argmax(1)
    ]
    return result | {
        "agree_top": _share(equal, cosine >= np.quantile(cosine, 1 - share)),
        "nearest": float((bank_classes[nearest] == query_classes).mean()),
    }


def object_overlap(
    root: Path, encoders: Mapping[str, PatchEncoder], size: int, patch: int, seed: int, most: int = 64
) -> dict[str, float]:
    """Returns {"share": patches that show things, name: their IoU with the patches that a network takes for objects}.

    Things are what can be counted (poles, signs, people, vehicles); everything else is background.
    """
    pixels, classes = labelled_squares(root, size, patch, seed, most)
    known = classes != IGNORE
    truth = np.isin(classes, [CLASSES.index(name) for name in THINGS])[known]
    masks = {name: mask.reshape(classes.shape)[known] for name, mask in _patch_features(pixels, encoders).items()}
    overlap = {name: float((mask & truth).sum() / max(1, (mask | truth).sum())) for name, mask in masks.items()}
    return {"share": float(truth.mean()), **overlap}


def _patch_features(
    pixels: UInt8[np.ndarray, "n s s 3"], encoders: Mapping[str, PatchEncoder]
) -> dict[str, np.ndarray]:
    """Returns the outputs of each network for the images, a few at a time."""
    parts = np.array_split(pixels, max(1, len(pixels) // 16))
    return {name: np.concatenate([encode(part) for part in parts]) for name, encode in encoders.items()}


def _share(of: Bool[np.ndarray, " n"], among: Bool[np.ndarray, " n"]) -> float:
    """Returns the share of `of` among the chosen ones; 0 where none is chosen."""
    return float(of[among].mean()) if among.any() else 0.0
