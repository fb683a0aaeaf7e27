"""Distances of drawn from held-out street scenes, and how well drawn ones show what their captions state, by a CLIP."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from fmda.evaluate.quality import cmmd, frechet_distance, pairwise_diversity
from fmda.methods.judges import embed
from fmda.methods.pretrain.crops import TAGS, Crops, Drawn, Scenes
from fmda.methods.pretrain.latents import WindowConfig
from fmda.png import captioned, grid
from fmda.progress import track
from fmda.weights.network import Loaded

Images = UInt8[np.ndarray, "n H W 3"]


@dataclass(frozen=True)
class Windows:
    """Windows of rendered images, their captions, and the tags of both."""

    images: Images
    captions: tuple[str, ...]
    present: Bool[np.ndarray, "n tags"]
    stated: Bool[np.ndarray, "n tags"]


def cut_windows(config: WindowConfig, captions: Crops, roots: Sequence[Path | Drawn], count: int, seed: int) -> Windows:
    """Returns `count` windows, taken from all images in turn, with captions that are true of them."""
    scenes, rng = Scenes(roots), np.random.default_rng((seed, 5))
    order = rng.permutation(len(scenes))
    rows: list[tuple] = []
    for k in track(range(count), "windows"):
        scene = scenes[int(order[k % len(order)])]
        top, left = (int(rng.integers(side - config.size + 1)) for side in scene["labels"].shape)
        box = top, left, top + config.size, left + config.size
        rows.append((scene["image"][top : box[2], left : box[3]], *captions.of_window(scene, box, rng)))
    images, texts, present, stated = zip(*rows, strict=True)
    return Windows(np.stack(images), texts, np.stack(present), np.stack(stated))


def described(clip: Loaded, images: Images) -> Float[np.ndarray, "n d"]:
    """Returns features for the probe: embeddings of the image and of its four quarters, side by side."""
    half = images.shape[1] // 2
    quarters = [images[:, y : y + half, x : x + half] for y in (0, half) for x in (0, half)]
    return np.concatenate([embed(clip, part) for part in (images, *quarters)], axis=1)


@dataclass(frozen=True)
class Probe:
    """A linear reader of tags, by ridge regression on real windows; `threshold` balances both errors of each tag."""

    weights: Float[np.ndarray, "d1 tags"]
    threshold: Float[np.ndarray, " tags"]

    @classmethod
    def fit(
        cls, features: Float[np.ndarray, "n d"], present: Bool[np.ndarray, "n tags"], ridge: float = 1.0
    ) -> "Probe":
        """Returns the probe that fits best; the threshold of a tag is midway between the means of with and without."""
        x = np.concatenate([features, np.ones((len(features), 1))], axis=1).astype(np.float64)
        target = present.astype(np.float64)
        weights = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ target)
        scores, threshold = x @ weights, np.full(target.shape[1], np.inf)
        for tag in range(target.shape[1]):
            if present[:, tag].any() and not present[:, tag].all():
                with_tag, without = scores[present[:, tag], tag].mean(), scores[~present[:, tag], tag].mean()
                threshold[tag] = (with_tag + without) / 2
        return cls(weights, threshold)

    def __call__(self, features: Float[np.ndarray, "n d"]) -> Bool[np.ndarray, "n tags"]:
        """Returns the predicted tags."""
        x = np.concatenate([features, np.ones((len(features), 1))], axis=1)
        return x @ self.weights > self.threshold


def caption_accuracy(
    shown: Bool[np.ndarray, "n tags"], stated: Bool[np.ndarray, "n tags"], seed: int = 0
) -> dict[str, float]:
    """Returns {"stated": share of stated tags that are predicted, "shuffled": the same for other images' captions}."""
    known = np.array([tag != "untagged" for tag in TAGS])
    stated = stated & known[None]
    other = stated[np.random.default_rng(seed).permutation(len(stated))]
    return {
        "stated": round(float((shown & stated).sum() / max(stated.sum(), 1)), 4),
        "shuffled": round(float((shown & other).sum() / max(other.sum(), 1)), 4),
    }


def compare(clip: Loaded, train: Windows, held_out: Windows, drawn: Images) -> dict[str, Any]:
    """Returns distances and caption accuracy of images drawn from the captions of `held_out`, and of real ones.

    "cmmd" and "frechet" are between held-out windows and drawn images; the floors between held-out and training
    windows. The probe is fitted to `train`.
    """
    reals, fakes, trained = (embed(clip, images) for images in (held_out.images, drawn, train.images))
    probe = Probe.fit(described(clip, train.images), train.present)
    drawn_tags, real_tags = probe(described(clip, drawn)), probe(described(clip, held_out.images))
    return {
        "images": len(drawn),
        "cmmd": round(cmmd(reals, fakes), 4),
        "cmmd_floor": round(cmmd(reals, trained), 4),
        "frechet": round(frechet_distance(reals, fakes), 4),
        "frechet_floor": round(frechet_distance(reals, trained), 4),
        "diversity": round(pairwise_diversity(fakes), 4),
        "diversity_real": round(pairwise_diversity(reals), 4),
        "caption_accuracy": caption_accuracy(drawn_tags, held_out.stated),
        "caption_accuracy_real": caption_accuracy(real_tags, held_out.stated),
        "probe_accuracy_real": round(float((real_tags == held_out.present).mean()), 4),
    }


def sheet(drawn: Images, captions: Sequence[str], count: int = 16) -> Images:
    """Returns the first images, enlarged, over their captions."""
    side = 2 * drawn.shape[1]
    large = [cv2.resize(image, (side, side), interpolation=cv2.INTER_NEAREST) for image in drawn[:count]]
    return grid([captioned(np.asarray(image), text, 2) for image, text in zip(large, captions, strict=False)], 4)
