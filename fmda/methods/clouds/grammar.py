"""Prompts of street scenes from a seeded grammar: class, companion, place, weather, light, time of day, viewpoint.

It stands in for the language model of CLOUDS. Every class is the subject of as many prompts, to within one; the 100
prompts of the paper name no pole, fence, rider or terrain.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

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
    """

    subject: str
    companion: str
    nouns: tuple[str, str]
    conditions: tuple[str, ...]

    @property
    def text(self) -> str:
        """The prompt in the words of the grammar."""
        place, *rest = self.conditions
        return ", ".join([f"a photo of {' and '.join(self.nouns)} {place}", *rest])


def scenes(count: int, classes: Sequence[str], vocabulary: Vocabulary, seed: int) -> list[Scene]:
    """Returns scenes, no two with the same text; the first ones of a larger count are the same.

    Scene k shows class k modulo their number. In each round over Cityscapes' 19 classes, each of them is once the
    companion of another. Raises UserError for an unknown class and for more scenes than the vocabulary gives.
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
    made = []
    orders = {}
    for name in classes:
        rng = np.random.default_rng([seed, CLASSES.index(name)])
        orders[name] = rng, rng.permutation(len(conditions))
    for k in range(count):
        turn, place = divmod(k, len(classes))
        subject = classes[place]
        rng, order = orders[subject]
        companion = CLASSES[(CLASSES.index(subject) + int(steps[turn % len(steps)])) % len(CLASSES)]
        nouns = (_choice(NOUNS[subject], rng), _choice(NOUNS[companion], rng))
        made.append(Scene(subject, companion, nouns, conditions[order[turn]]))
    return made


def _conditions(vocabulary: Vocabulary) -> list[tuple[str, ...]]:
    """Returns every combination of conditions that go together, without the empty ones."""
    made = []
    for place, time, weather in itertools.product(vocabulary.places, vocabulary.times, vocabulary.weathers):
        lights = [phrase for phrase, (t, w) in vocabulary.lights.items() if time in t and weather in w]
        for light, viewpoint in itertools.product(lights or [""], vocabulary.viewpoints):
            # one phrase of time and weather, as captions have it
            made.append((f"{place} {time} {weather}", *(phrase for phrase in (light, viewpoint) if phrase)))
    return made


def _choice(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
