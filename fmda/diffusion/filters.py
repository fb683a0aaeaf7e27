"""Filters of prompts, which judge before anything is generated, and of generated images.

A filter has a `name` and plain `settings`, which are part of a folder's identity: images under other filters are never
mixed. Networks are injected as functions, and `model` names what is behind them. Scores are rounded to four decimals
before they are compared, so that the logged score explains the decision. A score that is not finite is refused.
"""

import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, UInt8

from fmda.diffusion.manifest import Prompt, Refusal, Verdict
from fmda.errors import UserError

Images = UInt8[np.ndarray, "n H W 3"]


class Filter(Protocol):
    """Whatever refuses images one by one.

    Attributes:
        name: unique in a set.
        settings: what the verdicts depend on, as plain values.
        unless: name of an earlier filter; images that it gave a score are not judged by this one.
    """

    @property
    def name(self) -> str: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...
    @property
    def unless(self) -> str: ...

    def judge(self, images: Images, prompts: Sequence[Prompt], rows: Sequence[int]) -> list[Verdict]:
        """Returns a verdict for each of these rows of a batch uint8 [n, H, W, 3]."""


@dataclass(frozen=True)
class ImageFilter:
    """Refuses images whose score is below a threshold.

    Attributes:
        name: unique in a set.
        what: the score in words.
        score: (images uint8 [n, H, W, 3], prompts) -> a score for each image, None where it is not judged.
        least: threshold.
        model: fingerprint of the network behind `score`.
        unless: name of an earlier filter; images that it gave a score are not judged by this one.
    """

    name: str
    what: str
    score: Callable[[Images, Sequence[Prompt]], Sequence[float | None]]
    least: float
    model: str = ""
    unless: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """Threshold and network."""
        return {"least": self.least, "model": self.model}

    def judge(self, images: Images, prompts: Sequence[Prompt], rows: Sequence[int] | None = None) -> list[Verdict]:
        """Returns a verdict for each of these rows of a batch, or for all; networks see the batch whole."""
        scores = self.score(images, prompts)
        chosen = [scores[row] for row in (range(len(images)) if rows is None else rows)]
        return [Verdict() if score is None else self._verdict(_rounded(score)) for score in chosen]

    def _verdict(self, score: float | None) -> Verdict:
        if score is not None and score >= self.least:
            return Verdict(score, self.least)
        value = "not finite" if score is None else f"{score}, below {self.least}"
        return Verdict(score, self.least, f"{self.what} is {value}")


def _spread(images: Images, prompts: Sequence[Prompt]) -> list[float]:
    return [float(image.reshape(-1, 3).std(0).max()) for image in images]


CONSTANT = ImageFilter("constant", "spread of levels", _spread, 2.0)
"""Refuses black and near-constant images, by the standard deviation of the channel with the largest one (0..255)."""


def unclipped(least: float) -> ImageFilter:
    """Returns the filter of over- and underexposed images: share of pixels with a channel that is neither 0 nor 255."""

    def shares(images: Images, prompts: Sequence[Prompt]) -> list[float]:
        return [float(((image > 0) & (image < 255)).any(-1).mean()) for image in images]

    return ImageFilter("unclipped", "share of pixels that are not clipped", shares, least)


TILES = 8
"""Tiles of an image in each direction whose spread `textured` compares."""


def textured(least: float) -> ImageFilter:
    """Returns the filter of half-empty images: share of 8 x 8 tiles that `CONSTANT` would keep."""

    def shares(images: Images, prompts: Sequence[Prompt]) -> list[float]:
        tiles = [tile for rows in np.array_split(images, TILES, axis=1) for tile in np.array_split(rows, TILES, axis=2)]
        spreads = np.stack([tile.std((1, 2)).max(-1) for tile in tiles], -1)
        return [float(share) for share in (spreads >= CONSTANT.least).mean(-1)]

    return ImageFilter("textured", "share of tiles with content", shares, least)


@dataclass(frozen=True)
class NearDuplicate:
    """Refuses images that are similar to a kept image of lower index.

    Only images of lower index count, so that decisions depend neither on batches nor on processes, and the first images
    of a set are the same in a larger one.

    Attributes:
        embed: images uint8 [n, H, W, 3] -> embeddings [n, d], each a function of its image alone.
        most: cosine above which an image is refused.
        model: fingerprint of the network behind `embed`.
    """

    embed: Callable[[Images], Float[np.ndarray, "n d"]]
    most: float
    model: str = ""
    name: str = "near_duplicate"

    @property
    def settings(self) -> dict[str, Any]:
        """Threshold and network."""
        return {"most": self.most, "model": self.model}

    def embeddings(self, images: Images) -> Float[np.ndarray, "n d"]:
        """Returns embeddings of length 1, float64."""
        rows = np.asarray(self.embed(images), np.float64)
        return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)

    def compare(self, one: Float[np.ndarray, " d"], kept: Float[np.ndarray, "m d"]) -> Verdict:
        """Returns the verdict by the largest cosine to the embeddings of the kept images before it, in order."""
        if not np.isfinite(one).all():
            return Verdict(None, self.most, "embedding is not finite")
        if len(kept) == 0:
            return Verdict(None, self.most)
        cosines = kept @ one
        nearest = int(cosines.argmax())
        score = round(float(cosines[nearest]), 4)
        why = f"cosine {score} to image {nearest} is above {self.most}" if score > self.most else None
        return Verdict(score, self.most, why)


@dataclass(frozen=True)
class PromptFilter:
    """Refuses prompts.

    Attributes:
        name: unique in a set.
        judge: the prompts that earlier filters kept -> a verdict for each.
        settings: what the verdicts depend on, as plain values.
    """

    name: str
    judge: Callable[[Sequence[Prompt]], list[Verdict]]
    settings: Mapping[str, Any] = field(default_factory=dict)


def duplicate_prompt() -> PromptFilter:
    """Returns the filter that refuses prompts equal to an earlier one of their class, in any case and punctuation."""

    def judge(prompts: Sequence[Prompt]) -> list[Verdict]:
        first: dict[tuple[str, int | None], int] = {}
        earlier = [first.setdefault((normalised(one.text), one.class_index), k) for k, one in enumerate(prompts)]
        return [Verdict(why=f"duplicate of '{prompts[j].text}'" if j < k else None) for k, j in enumerate(earlier)]

    return PromptFilter("duplicate_prompt", judge)


def similar_prompt(most: float) -> PromptFilter:
    """Returns the filter that refuses prompts which share too many words with an earlier kept one of their class.

    The score is the number of words in both by that of words in either (Jaccard), 0..1; above `most` it is refused.
    """

    def judge(prompts: Sequence[Prompt]) -> list[Verdict]:
        kept: dict[int | None, list[tuple[frozenset[str], str]]] = {}
        verdicts = []
        for one in prompts:
            words, earlier = word_set(one.text), kept.setdefault(one.class_index, [])
            score, text = max(((round(overlap(words, other), 4), text) for other, text in earlier), default=(0.0, ""))
            verdicts.append(Verdict(score, most, f"similar to '{text}'" if score > most else None))
            if score <= most:
                earlier.append((words, one.text))
        return verdicts

    return PromptFilter("similar_prompt", judge, {"most": most})


def word_set(text: str) -> frozenset[str]:
    """Returns the words of a text as `normalised`."""
    return frozenset(normalised(text).split())


def overlap(one: frozenset[str], other: frozenset[str]) -> float:
    """Returns the share of words in both among those in either, 0 for two empty sets."""
    return len(one & other) / max(1, len(one | other))


def banned_words(words: Sequence[str]) -> PromptFilter:
    """Returns the filter that refuses prompts which contain one of the words or phrases, in any case and punctuation.

    Raises UserError for a word without a letter or digit, which every prompt would contain.
    """
    plain = {word: normalised(word) for word in words}
    for word, letters in plain.items():
        if not letters:
            raise UserError(f"banned_words: '{word}' is no word; leave it out")

    def verdict(prompt: Prompt) -> Verdict:
        text = f" {normalised(prompt.text)} "
        banned = [word for word, letters in plain.items() if f" {letters} " in text]
        return Verdict(why=f"contains '{banned[0]}'" if banned else None)

    settings = {"words": sorted(set(plain.values()))}
    return PromptFilter("banned_words", lambda prompts: [verdict(prompt) for prompt in prompts], settings)


def long_prompt(count: Callable[[str], int], most: int) -> PromptFilter:
    """Returns the filter that refuses prompts of more than `most` tokens, as `count` counts them in a text."""

    def verdict(prompt: Prompt) -> Verdict:
        n = count(prompt.text)
        return Verdict(n, most, f"{n} tokens, more than {most}" if n > most else None)

    return PromptFilter("long_prompt", lambda prompts: [verdict(prompt) for prompt in prompts], {"most": most})


def normalised(text: str) -> str:
    """Returns a text in lower case with one space between words, without punctuation and symbols."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(" " if unicodedata.category(c)[0] in "PZCS" else c for c in plain).split())


def choose_prompts(
    prompts: Sequence[Prompt], filters: Sequence[PromptFilter]
) -> tuple[list[tuple[int, Prompt]], list[Refusal]]:
    """Returns (index, prompt) of the prompts that all filters keep, and a refusal for each other one, by index.

    Raises UserError when no prompt is left.
    """
    left, refused = list(enumerate(prompts)), []
    for one in filters:
        verdicts = one.judge([prompt for _, prompt in left])
        for (index, prompt), (score, threshold, why, _) in zip(left, verdicts, strict=True):
            if why is not None:
                words = prompt.text, index, prompt.class_index, prompt.class_name
                refused.append(Refusal(None, None, one.name, score, threshold, why, *words, None))
        left = [item for item, verdict in zip(left, verdicts, strict=True) if verdict.why is None]
    refused.sort(key=lambda row: row.prompt_index)
    if not left:
        raise UserError(
            f"prompts: the filters refuse all {len(prompts)}, such as '{refused[0].prompt}' ({refused[0].filter}: "
            f"{refused[0].why}); change the prompts or the filters"
        )
    return left, refused


def _rounded(score: float) -> float | None:
    return round(float(score), 4) if math.isfinite(score) else None
