"""Prompts of street scenes from a seeded grammar: class, companion, place, weather, light, time of day, viewpoint.

It stands in for the language model of CLOUDS. Every class is the subject of as many prompts, to within one; the 100
prompts of the paper name no pole, fence, rider or terrain.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from fmda.config import PositiveFloat
from fmda.errors import UserError, did_you_mean
from fmda.world.names import CLASSES

NOUNS: dict[str, tuple[str, ...]] = {
    "road": ("a road",),
    "sidewalk": ("a sidewalk", "a pavement"),
    "building": ("a building", "houses"),
    "wall": ("a wall", "a stone wall"),
    "fence": ("a fence", "a railing"),
    "pole": ("a pole", "a lamp post"),
    "traffic light": ("a traffic light",),
    "traffic sign": ("a traffic sign", "a road sign"),
    "vegetation": ("trees", "bushes", "a hedge"),
    "terrain": ("grass", "a lawn"),
    "sky": ("open sky", "the sky"),
    "person": ("a person", "pedestrians", "a woman", "a man"),
    "rider": ("a cyclist", "a motorcyclist", "a rider"),
    "car": ("a car", "cars"),
    "truck": ("a truck", "a lorry"),
    "bus": ("a bus", "a coach"),
    "train": ("a tram", "a train"),
    "motorcycle": ("a motorcycle", "a motorbike"),
    "bicycle": ("a bicycle", "a bike"),
}
"""How a prompt names each class."""


@dataclass(frozen=True)
class Vocabulary:
    """The conditions of a grammar, as phrases.

    Attributes:
        places, times, weathers, viewpoints: each may hold "", which leaves the condition out.
        lights: phrase -> (times, weathers) with which it goes.
    """

    places: tuple[str, ...]
    times: tuple[str, ...]
    weathers: tuple[str, ...]
    lights: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]
    viewpoints: tuple[str, ...]


_MORNING, _NOON, _AFTERNOON, _DUSK, _NIGHT = "in the morning", "at noon", "in the afternoon", "at dusk", "at night"
_CLEAR, _CLOUDY = "in clear weather", "in cloudy weather"
_BAD = ("in fog", "in thick fog", "in the rain", "after the rain", "in snow", "in falling snow")

VOCABULARIES: dict[str, Vocabulary] = {
    "urban": Vocabulary(
        places=(
            "on a city street", "on a wide avenue", "in a narrow street", "in a residential street", "at a crossing",
            "at a roundabout", "on a square", "on a country road", "on a highway", "in an industrial area",
            "on a bridge", "in a village", "at a construction site", "at a market",
        ),
        times=(_MORNING, _NOON, _AFTERNOON, _DUSK, _NIGHT),
        weathers=(_CLEAR, _CLOUDY, *_BAD),
        lights={
            "in bright sunshine": ((_NOON, _AFTERNOON), (_CLEAR,)),
            "with hard shadows": ((_MORNING, _NOON, _AFTERNOON), (_CLEAR,)),
            "against a low sun": ((_MORNING, _AFTERNOON), (_CLEAR, _CLOUDY)),
            "in soft light": ((_MORNING, _NOON, _AFTERNOON), (_CLOUDY, *_BAD)),
            "in grey light": ((_MORNING, _NOON, _AFTERNOON), (_CLOUDY, *_BAD)),
            "in fading light": ((_DUSK,), (_CLEAR, _CLOUDY, *_BAD)),
            "with headlights on": ((_DUSK, _NIGHT), (_CLEAR, _CLOUDY, *_BAD)),
            "under yellow lamps": ((_NIGHT,), (_CLEAR, _CLOUDY, *_BAD)),
        },
        viewpoints=("seen from the driver's seat", "seen through a windscreen", "at eye level", "from the kerbside",
                    "from above", "from far away"),
    ),
    "street": Vocabulary(
        places=("on a city street", "on a residential street", "at a crossing", "on a square", "on a country road",
                "on a highway"),
        times=("by day", "at dusk", "at night"),
        weathers=("in clear weather", "in cloudy weather", "in dull weather", "in fog", "in the rain", "in snow"),
        lights={},
        viewpoints=("",),
    ),
}  # fmt: skip
"""By name: of photographs, for large models; of the street world's captions, for the built-in one."""


@dataclass(frozen=True)
class Scene:
    """What one prompt is to show.

    Attributes:
        subject, companion: classes.
        nouns: how the prompt names both.
        conditions: phrases in the order of the sentence.
        time, weather: those of the conditions that weights are of.
    """

    subject: str
    companion: str
    nouns: tuple[str, str]
    conditions: tuple[str, ...]
    time: str
    weather: str

    @property
    def text(self) -> str:
        """The prompt in the words of the grammar."""
        place, *rest = self.conditions
        return ", ".join([f"a photo of {' and '.join(self.nouns)} {place}", *rest])


@dataclass(frozen=True)
class Weights:
    """How often a grammar takes each class, time and weather, relative to others; what is missing has the weight 1."""

    classes: dict[str, PositiveFloat]
    times: dict[str, PositiveFloat]
    weathers: dict[str, PositiveFloat]


def scenes(
    count: int, classes: Sequence[str], vocabulary: Vocabulary, seed: int, weights: Weights | None = None
) -> list[Scene]:
    """Returns scenes, no two with the same text; without weights the first ones of a larger count are the same.

    Scene k shows class k modulo their number. In each round over Cityscapes' 19 classes, each of them is once the
    companion of another. With weights, scenes of a class are as many as its weight says, as far as there are, and
    those with large weights of time and weather come first. Raises UserError for an unknown class and for more scenes
    than the vocabulary gives.
    """
    for name in classes:
        if name not in NOUNS:
            raise UserError(f"classes: '{name}' is no class of Cityscapes{did_you_mean(name, NOUNS)}")
    if not classes or len(set(classes)) < len(classes):
        raise UserError("classes: names no class, or one twice; name each class once")
    conditions = _conditions(vocabulary)
    if count > len(classes) * len(conditions):
        raise UserError(
            f"count: {len(classes)} classes in {len(conditions)} conditions give {len(classes) * len(conditions)} "
            f"prompts, not {count}; ask for fewer, or for another vocabulary"
        )
    steps = np.random.default_rng(seed).permutation(np.arange(1, len(CLASSES)))
    likely = None if weights is None else [
        weights.times.get(one.time, 1.0) * weights.weathers.get(one.weather, 1.0) for one in conditions
    ]  # fmt: skip
    orders = {}
    for name in classes:
        rng = np.random.default_rng([seed, CLASSES.index(name)])
        orders[name] = rng, _order(len(conditions), likely, rng)
    made = []
    for subject, turn in _turns(count, classes, len(conditions), weights):
        rng, order = orders[subject]
        companion = CLASSES[(CLASSES.index(subject) + int(steps[turn % len(steps)])) % len(CLASSES)]
        nouns = (_choice(NOUNS[subject], rng), _choice(NOUNS[companion], rng))
        where = conditions[order[turn]]
        made.append(Scene(subject, companion, nouns, where.phrases, where.time, where.weather))
    return made


class _Conditions(NamedTuple):
    phrases: tuple[str, ...]
    time: str
    weather: str


def _conditions(vocabulary: Vocabulary) -> list[_Conditions]:
    """Returns every combination of conditions that go together, their phrases without the empty ones."""
    made = []
    for place, time, weather in itertools.product(vocabulary.places, vocabulary.times, vocabulary.weathers):
        lights = [phrase for phrase, (t, w) in vocabulary.lights.items() if time in t and weather in w]
        for light, viewpoint in itertools.product(lights or [""], vocabulary.viewpoints):
            # one phrase of time and weather, as captions have it
            phrases = (f"{place} {time} {weather}", *(phrase for phrase in (light, viewpoint) if phrase))
            made.append(_Conditions(phrases, time, weather))
    return made


def _order(count: int, likely: Sequence[float] | None, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """Returns numbers below `count` in random order, those of large weights likely first.

    Source: Efraimidis and Spirakis 2006, weighted sampling without replacement.
    """
    if likely is None:
        return rng.permutation(count)
    return np.argsort(-np.log(rng.random(count)) / np.asarray(likely), kind="stable")


def _turns(count: int, classes: Sequence[str], most: int, weights: Weights | None) -> list[tuple[str, int]]:
    """Returns (class, how many scenes of it came before) of each scene, the scenes of a class evenly spread."""
    if weights is None:
        return [(classes[k % len(classes)], k // len(classes)) for k in range(count)]
    shares = np.array([weights.classes.get(name, 1.0) for name in classes])
    numbers = np.zeros(len(classes), int)
    turns = []
    # the class that is furthest below its share comes next, as seats are given in Sainte-Lague's method
    for _ in range(count):
        k = int(np.argmax(np.where(numbers < most, shares / (numbers + 0.5), -1.0)))
        turns.append((classes[k], int(numbers[k])))
        numbers[k] += 1
    return turns


def _choice(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
