"""What is not worth drawing and what is not worth keeping: filters of prompts and of generated images.

A filter is any object with a `name`, plain `settings` (they enter the folder's settings: images that were judged
otherwise are never mixed) and `judge`. There are three kinds:

* `PromptFilter` sees all prompts before anything is drawn; a refused prompt leaves the cycle,
* `ImageFilter` judges each image by itself,
* `ComparingFilter` judges an image by the kept images of lower index alone, so that the outcome depends neither on
  batches nor on processes, and the first images of a set are the same however many follow. It runs last.

Networks are injected: a filter gets a function, and `model` names what is behind it. Scores are rounded to four
decimals before they meet the threshold, so that what is logged explains the decision; a score that is no number is
refused.
"""

import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from fmda.diffusion.manifest import Prompt, Row
from fmda.errors import UserError

Images = UInt8[np.ndarray, "n H W 3"]


class Verdict(NamedTuple):
    """A score, the threshold it met, and why the image or prompt is refused; None where it is kept."""

    score: float | None = None
    threshold: float | None = None
    why: str | None = None


class Filter(Protocol):
    """What all filters have."""

    @property
    def name(self) -> str:
        """How logs and counts call it; no two filters of a run have the same."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What decides, as plain values."""


class PromptFilter(Filter, Protocol):
    """Judges prompts before anything is drawn."""

    def judge(self, prompts: Sequence[Prompt]) -> Sequence[Verdict]:
        """Returns a verdict for each of the prompts that earlier filters kept."""


@runtime_checkable
class ImageFilter(Filter, Protocol):
    """Judges images one by one."""

    def judge(self, images: Images, prompts: Sequence[Prompt]) -> Sequence[Verdict]:
        """Returns a verdict for each image. There are always as many images as a batch holds."""


@runtime_checkable
class ComparingFilter(Filter, Protocol):
    """Judges an image by those kept before it."""

    def features(self, images: Images) -> Float[np.ndarray, "n d"]:
        """Returns what of each image is compared. There are always as many images as a batch holds."""

    def compare(self, one: Float[np.ndarray, " d"], kept: Float[np.ndarray, "m d"]) -> Verdict:
        """Returns the verdict on an image, given the features of all kept images of lower index, in order."""


@dataclass(frozen=True)
class _Declared:
    """A filter whose settings are its fields, but for its name and the functions behind it (`repr=False`)."""

    @property
    def settings(self) -> dict[str, Any]:
        """Thresholds, and names of networks."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.repr and f.name != "name"}


@dataclass(frozen=True)
class ConstantImage(_Declared):
    """Refuses black and near-constant images: those whose levels spread too little in every channel.

    The score is the standard deviation over the pixels, in levels of 0..255, of the channel where it is largest.
    `generate` always applies this filter, with these values unless it is given one with others.
    """

    least: float = 2.0
    name: str = "constant"

    def judge(self, images: Images, prompts: Sequence[Prompt]) -> list[Verdict]:
        """Returns a verdict for each image."""
        spreads = [float(image.reshape(-1, image.shape[-1]).std(0).max()) for image in images]
        return [_at_least(spread, self.least, "spread of levels") for spread in spreads]


@dataclass(frozen=True)
class ClipScore(_Declared):
    """Refuses images that do not match their prompt.

    Attributes:
        score: (images uint8 [n, H, W, 3], texts) -> float [n], such as the cosine of image and text.
        least: below it an image is refused.
        model: names the network behind `score`.
    """

    score: Callable[[Images, Sequence[str]], Shaped[np.ndarray, " n"]] = field(repr=False)
    least: float
    model: str = ""
    name: str = "clip_score"

    def judge(self, images: Images, prompts: Sequence[Prompt]) -> list[Verdict]:
        """Returns a verdict for each image."""
        scores = _shaped(self.score(images, [prompt.text for prompt in prompts]), (len(images),), self.name)
        return [_at_least(score, self.least, "score of image and prompt") for score in scores]


@dataclass(frozen=True)
class ClassPresence(_Declared):
    """Refuses images in which the prompt's class is missing or too small. Prompts without a class are not judged.

    Attributes:
        present: images uint8 [n, H, W, 3] -> share of each class [n, classes] in 0..1, or whether it is there (bool).
            Columns are what `Prompt.class_index` counts.
        least: below it an image is refused.
        model: names the network behind `present`.
    """

    present: Callable[[Images], Shaped[np.ndarray, "n classes"]] = field(repr=False)
    least: float
    model: str = ""
    name: str = "class_presence"

    def judge(self, images: Images, prompts: Sequence[Prompt]) -> list[Verdict]:
        """Returns a verdict for each image. Raises UserError for a prompt of a class that `present` does not know."""
        if all(prompt.class_index is None for prompt in prompts):
            return [Verdict()] * len(images)
        shares = _shaped(self.present(images), (len(images), None), self.name)
        return [self._verdict(row, prompt) for row, prompt in zip(shares, prompts, strict=True)]

    def _verdict(self, shares: Float[np.ndarray, " classes"], prompt: Prompt) -> Verdict:
        which = prompt.class_index
        if which is None:
            return Verdict()
        if not 0 <= which < len(shares):
            raise UserError(
                f"{self.name}: prompt '{prompt.text}' asks for class {which} of {len(shares)}; give prompts the class "
                "indices of the network that judges them"
            )
        return _at_least(shares[which], self.least, f"share of class {prompt.class_name or which}")


@dataclass(frozen=True)
class NearDuplicate(_Declared):
    """Refuses images that look like a kept image of lower index.

    Attributes:
        embed: images uint8 [n, H, W, 3] -> embeddings [n, d], each a function of its image alone.
        most: cosine above which an image is refused.
        model: names the network behind `embed`.
    """

    embed: Callable[[Images], Shaped[np.ndarray, "n d"]] = field(repr=False)
    most: float
    model: str = ""
    name: str = "near_duplicate"

    def features(self, images: Images) -> Float[np.ndarray, "n d"]:
        """Returns embeddings of length 1."""
        rows = _shaped(self.embed(images), (len(images), None), self.name)
        return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)

    def compare(self, one: Float[np.ndarray, " d"], kept: Float[np.ndarray, "m d"]) -> Verdict:
        """Returns the verdict by the largest cosine; an embedding that holds no numbers is refused."""
        if not np.isfinite(one).all():
            return Verdict(None, self.most, "embedding is no number")
        if len(kept) == 0:
            return Verdict(None, self.most)
        cosines = kept @ one
        nearest = int(cosines.argmax())
        score = _rounded(cosines[nearest])
        if score is not None and score <= self.most:
            return Verdict(score, self.most)
        return Verdict(score, self.most, f"cosine {score} to image {nearest} is above {self.most}")


@dataclass(frozen=True)
class DuplicatePrompt(_Declared):
    """Refuses a prompt equal to an earlier one of its class up to case, punctuation and spaces."""

    name: str = "duplicate_prompt"

    def judge(self, prompts: Sequence[Prompt]) -> list[Verdict]:
        """Returns a verdict for each prompt."""
        first: dict[tuple[str, int | None], str] = {}
        verdicts = []
        for prompt in prompts:
            key = normalised(prompt.text), prompt.class_index
            verdicts.append(Verdict(why=f"says the same as '{first[key]}'") if key in first else Verdict())
            first.setdefault(key, prompt.text)
        return verdicts


@dataclass(frozen=True)
class BannedWords(_Declared):
    """Refuses prompts that hold one of the words or phrases, whatever case and punctuation."""

    words: tuple[str, ...]
    name: str = "banned_words"

    def __post_init__(self) -> None:
        """Raises UserError for a word without a letter or digit, which every prompt would hold."""
        for word in self.words:
            if not normalised(word):
                raise UserError(f"{self.name}: '{word}' is no word; leave it out")

    @property
    def settings(self) -> dict[str, Any]:
        """The words."""
        return {"words": sorted({normalised(word) for word in self.words})}

    def judge(self, prompts: Sequence[Prompt]) -> list[Verdict]:
        """Returns a verdict for each prompt."""
        verdicts = []
        for prompt in prompts:
            text = f" {normalised(prompt.text)} "
            banned = [word for word in self.words if f" {normalised(word)} " in text]
            verdicts.append(Verdict(why=f"holds '{banned[0]}'") if banned else Verdict())
        return verdicts


@dataclass(frozen=True)
class LongPrompt(_Declared):
    """Refuses prompts of which the text encoder would see the beginning alone.

    Attributes:
        count: text -> how many tokens it has, start and end included where `most` includes them.
        most: tokens that fit.
        tokenizer: names what is behind `count`.
    """

    count: Callable[[str], int] = field(repr=False)
    most: int = 77
    tokenizer: str = ""
    name: str = "long_prompt"

    def judge(self, prompts: Sequence[Prompt]) -> list[Verdict]:
        """Returns a verdict for each prompt."""
        counts = [int(self.count(prompt.text)) for prompt in prompts]
        return [Verdict(n, self.most, f"{n} tokens, more than {self.most}" if n > self.most else None) for n in counts]


def normalised(text: str) -> str:
    """Returns a text in lower case with one space between words, without punctuation and symbols."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(" " if unicodedata.category(c)[0] in "PZCS" else c for c in plain).split())


def choose_prompts(
    prompts: Sequence[Prompt], filters: Sequence[PromptFilter]
) -> tuple[list[tuple[int, Prompt]], list[Row]]:
    """Returns (index, prompt) of the prompts that all filters keep, and a refusal line for each other one.

    A filter sees what those before it kept. Raises UserError when there is no prompt or none is left.
    """
    if not prompts:
        raise UserError("prompts: none given; give at least one")
    left, refused = list(enumerate(prompts)), []
    for one in filters:
        verdicts = one.judge([prompt for _, prompt in left])
        for (index, prompt), verdict in zip(left, verdicts, strict=True):
            if verdict.why is not None:
                refused.append(refusal_row(index, prompt, one, verdict))
        left = [item for item, verdict in zip(left, verdicts, strict=True) if verdict.why is None]
    refused.sort(key=lambda row: row["prompt_index"])
    if not left:
        row = refused[0]
        raise UserError(
            f"prompts: the filters refuse all {len(prompts)}, such as '{row['prompt']}' ({row['filter']}: "
            f"{row['why']}); change the prompts or the filters"
        )
    return left, refused


def refusal_row(
    prompt_index: int,
    prompt: Prompt,
    by: Filter,
    verdict: Verdict,
    *,
    index: int | None = None,
    attempt: int | None = None,
    seed: int | None = None,
) -> Row:
    """Returns a line of `refused.jsonl`; `index`, `attempt` and `seed` are None where a prompt was refused."""
    return {
        "index": index,
        "attempt": attempt,
        "filter": by.name,
        "score": verdict.score,
        "threshold": verdict.threshold,
        "why": verdict.why,
        "prompt": prompt.text,
        "prompt_index": prompt_index,
        "class_index": prompt.class_index,
        "class_name": prompt.class_name,
        "seed": seed,
    }


def _rounded(score: float) -> float | None:
    return round(float(score), 4) if math.isfinite(score) else None


def _at_least(score: float, least: float, what: str) -> Verdict:
    value = _rounded(score)
    if value is not None and value >= least:
        return Verdict(value, least)
    return Verdict(value, least, f"{what} is {'no number' if value is None else value}, below {least}")


def _shaped(values: Any, shape: tuple[int | None, ...], name: str) -> Float[np.ndarray, "..."]:
    """Returns injected scores as float64; a wrong shape is a fault of the program, not of the user."""
    array = np.asarray(values, np.float64)
    if array.ndim != len(shape) or any(want not in (None, have) for want, have in zip(shape, array.shape, strict=True)):
        raise ValueError(f"{name}: the function returned shape {array.shape}, expected {shape}")
    return array
