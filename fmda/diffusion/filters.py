"""Filters of prompts, which judge before anything is generated, and of generated images.

A filter has a `name` and plain `settings`, which are part of a folder's identity: images under other filters are never
mixed. Networks are injected as functions, and `model` names what is behind them. Scores are rounded to four decimals
before they are compared, so that the logged score explains the decision. A score that is not finite is refused.
"""

import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from fmda.diffusion.manifest import Prompt, Refusal, Verdict
from fmda.errors import UserError

Images = UInt8[np.ndarray, "n H W 3"]


@dataclass(frozen=True)
class ImageFilter:
    """Refuses images whose score is below a threshold.

    Attributes:
        name: unique in a set.
        what: the score in words.
        score: (images uint8 [n, H, W, 3], prompts) -> a score for each image, None where it is not judged.
        least: threshold.
        model: fingerprint of the network behind `score`.
    """

    name: str
    what: str
    score: Callable[[Images, Sequence[Prompt]], Sequence[float | None]]
    least: float
    model: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """Threshold and network."""
        return {"least": self.least, "model": self.model}

    def judge(self, images: Images, prompts: Sequence[Prompt]) -> list[Verdict]:
        """Returns a verdict for each image."""
        return [Verdict() if score is None else self._verdict(_rounded(score)) for score in self.score(images, prompts)]

    def _verdict(self, score: float | None) -> Verdict:
        if score is not None and score >= self.least:
            return Verdict(score, self.least)
        value = "not finite" if score is None else f"{score}, below {self.least}"
        return Verdict(score, self.least, f"{self.what} is {value}")


def _spread(images: Images, prompts: Sequence[Prompt]) -> list[float]:
    return [float(image.reshape(-1, 3).std(0).max()) for image in images]


CONSTANT = ImageFilter("constant", "spread of levels", _spread, 2.0)
"""Refuses black and near-constant images, by the standard deviation of the channel with the largest one (0..255)."""


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
        for (index, prompt), (score, threshold, why) in zip(left, verdicts, strict=True):
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
