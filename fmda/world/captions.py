"""Captions of street pictures: facts as plain data, and sentences from a seeded grammar. No jax.

Facts are a dict of JSON values:
  domain, style, weather, time, street: names (of `names.py`), crop: bool
  size: [height, width] of the picture or crop
  classes: {class name: pixels}, largest first, classes of a handful of pixels left out
  counts: {thing class: objects that are large enough to count}
  objects: [{"class", "id", "pixels", "place": "left" | "centre" | "right", "near": bool}], largest first
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fmda.world.names import CLASSES, DOMAINS, STREETS, STYLES, THINGS, TIMES, WEATHERS

Facts = dict[str, Any]

SYNONYMS: dict[str, tuple[str, ...]] = {
    "road": ("street", "asphalt"),
    "sidewalk": ("pavement", "footpath"),
    "building": ("house", "facade"),
    "wall": ("stone wall", "garden wall"),
    "fence": ("railing", "iron fence"),
    "pole": ("post", "lamp post"),
    "traffic light": ("signal", "stoplight"),
    "traffic sign": ("road sign", "street sign"),
    "vegetation": ("tree", "bush", "hedge", "foliage", "plant"),
    "terrain": ("grass", "lawn", "meadow"),
    "sky": ("cloudy sky", "open sky"),
    "person": ("pedestrian", "man", "woman", "walker"),
    "rider": ("cyclist", "motorcyclist", "person riding"),
    "car": ("automobile", "vehicle"),
    "truck": ("lorry", "goods vehicle"),
    "bus": ("coach", "city bus"),
    "train": ("tram", "streetcar"),
    "motorcycle": ("motorbike", "moped"),
    "bicycle": ("bike", "cycle"),
}
"""Other words for each class; the plain name is used more often than all of these together."""

_PLAIN_SHARE = 0.68
_MASS = frozenset({"vegetation", "terrain", "sky", "foliage", "grass", "asphalt", "cloudy sky", "open sky", "facade"})
_PLURALS = {"person": "people", "man": "men", "woman": "women", "bus": "buses", "city bus": "city buses",
            "lorry": "lorries",
            "bush": "bushes", "coach": "coaches", "person riding": "people riding"}  # fmt: skip
_NUMBERS = ("no", "a", "two", "three", "four", "five")
_LEAST_SHARE = 0.0008
_LEAST_PIXELS = 12


def facts_of(labels: np.ndarray, instances: np.ndarray, facts: Mapping[str, Any]) -> Facts:
    """Returns the facts of a whole picture.

    labels: uint8 [H, W] train ids. instances: int [H, W]. facts: the index arrays of `Rendering.facts`
    (domain, style, weather, time, street).
    """
    named = {
        "domain": DOMAINS[int(facts["domain"])],
        "style": STYLES[int(facts["style"])],
        "weather": WEATHERS[int(facts["weather"])],
        "time": TIMES[int(facts["time"])],
        "street": STREETS[int(facts["street"])],
        "crop": False,
    }
    return named | _content(labels, instances)


def crop_facts(labels: np.ndarray, instances: np.ndarray, facts: Facts, box: tuple[int, int, int, int]) -> Facts:
    """Returns the facts of a crop of a picture.

    labels, instances: [H, W] of the whole picture. facts: those of the whole picture. box: (top, left, bottom,
    right) in pixels, the last two excluded.
    """
    top, left, bottom, right = box
    window = slice(top, bottom), slice(left, right)
    whole = labels.size
    cut = facts | _content(labels[window], instances[window])
    cut["crop"] = (bottom - top) * (right - left) < 0.85 * whole
    return cut


def _content(labels: np.ndarray, instances: np.ndarray) -> Facts:
    height, width = labels.shape
    least = max(_LEAST_PIXELS, _LEAST_SHARE * labels.size)
    counts = np.bincount(labels.reshape(-1), minlength=256)[: len(CLASSES)]
    order = np.argsort(-counts, kind="stable")
    classes = {CLASSES[k]: int(counts[k]) for k in order if counts[k] >= least}
    objects = []
    rows, columns = np.nonzero(instances)
    if rows.size:
        ids = instances[rows, columns]
        sizes = np.bincount(ids)
        centres = np.bincount(ids, weights=columns) / np.maximum(sizes, 1)
        # every pixel of an instance has one class
        kind = np.zeros(sizes.size, np.int64)
        kind[ids] = labels[rows, columns]
        for i in np.argsort(-sizes, kind="stable"):
            if sizes[i] < least:
                break
            place = ("left", "centre", "right")[min(int(3.0 * centres[i] / width), 2)]
            near = bool(sizes[i] >= 0.006 * labels.size)
            name = CLASSES[kind[i]]
            objects.append({"class": name, "id": int(i), "pixels": int(sizes[i]), "place": place, "near": near})
    number: dict[str, int] = {}
    for item in objects:
        number[str(item["class"])] = number.get(str(item["class"]), 0) + 1
    return {"size": [height, width], "classes": classes, "counts": number, "objects": objects}


def word(name: str, rng: np.random.Generator, plain: float = _PLAIN_SHARE) -> str:
    """Returns the class name, or now and then another word for it."""
    if rng.random() < plain:
        return name
    others = SYNONYMS[name]
    return others[int(rng.random() * len(others))]


def _with_article(noun: str) -> str:
    if noun in _MASS:
        return noun
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _plural(noun: str) -> str:
    return _PLURALS.get(noun, noun if noun in _MASS else noun + "s")


def _counted(name: str, count: int, rng: np.random.Generator) -> str:
    noun = word(name, rng)
    if count <= 1:
        return _with_article(noun)
    if count < len(_NUMBERS):
        return f"{_NUMBERS[count]} {_plural(noun)}"
    return f"{('several', 'many', 'a row of')[int(rng.random() * 3)]} {_plural(noun)}"


def _joined(phrases: list[str]) -> str:
    if len(phrases) < 3:
        return " and ".join(phrases)
    return ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _choice(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.random() * len(options))]


def noun_phrase(names: Sequence[str], rng: np.random.Generator) -> str:
    """Returns class names as they stand in the slot of "a photo of a {}.": "car", "tram and a road"; with synonyms."""
    return _stripped(_joined([_with_article(word(name, rng)) for name in names]))


def content_phrase(facts: Facts, rng: np.random.Generator, most: int = 3) -> str:
    """Returns what is to be seen, such as "a car", "two persons and a road", the striking first.

    Large areas and objects are named with higher probability; at most `most` classes are named.
    """
    names = list(facts["classes"])
    if not names:
        return "a street"
    area = float(facts["size"][0] * facts["size"][1])
    counts = facts["counts"]
    # the square root keeps small things in the sentence; things interest more than stuff
    weights = [(facts["classes"][n] / area) ** 0.5 * (2.2 if n in THINGS else 1.0) for n in names]
    chosen: list[str] = []
    for _ in range(min(1 + int(rng.random() * most), len(names))):
        at = rng.random() * sum(weights)
        k = 0
        while k < len(weights) - 1 and at >= weights[k]:
            at -= weights[k]
            k += 1
        chosen.append(names.pop(k))
        weights.pop(k)
    return _joined([_counted(n, counts.get(n, 1), rng) if n in THINGS else _with_article(word(n, rng)) for n in chosen])


_STYLE_PHRASES: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of {}", "a photograph of {}", "a picture of {}", "an image of {}", "{}", "a street photo of {}"),
    "video game": (
        "a video game picture of {}",
        "a rendering of {}",
        "a screenshot of {}",
        "{} in a video game",
        "a rendition of {}",
    ),
    "painting": ("a painting of {}", "an oil painting of {}", "a painted {}", "art of {}"),
    "watercolor": ("a watercolor painting of {}", "a painting of {}", "a watercolor of {}"),
    "drawing": ("a drawing of {}", "a crayon drawing of {}", "a doodle of {}"),
    "sketch": ("a sketch of {}", "a pencil sketch of {}", "a drawing of {}"),
    "cartoon": ("a cartoon of {}", "a comic of {}", "a cartoon {}"),
    "black and white photo": ("a black and white photo of {}", "a grey photo of {}", "a monochrome photo of {}"),
    "sepia photo": ("an old photo of {}", "a sepia photo of {}", "a faded photo of {}"),
    "low resolution photo": ("a low resolution photo of {}", "a low quality photo of {}", "a bad photo of {}"),
    "pixelated photo": ("a pixelated photo of {}", "a pixelated picture of {}", "a mosaic of {}"),
    "blurry photo": ("a blurry photo of {}", "an out of focus photo of {}", "a photo of the hard to see {}"),
    "jpeg corrupted photo": ("a jpeg corrupted photo of {}", "a corrupted picture of {}", "a damaged photo of {}"),
    "bad photo": ("a bad photo of {}", "a noisy photo of {}", "a dirty photo of {}"),
    "dark photo": ("a dark photo of {}", "an underexposed photo of {}", "a photo of {} in the dark"),
    "bright photo": ("a bright photo of {}", "an overexposed photo of {}", "a clean photo of {}"),
    "clay": ("a sculpture of {}", "a clay model of {}", "an origami {}"),
    "plastic toy": ("a toy {}", "a plastic {}", "a plastic toy of {}"),
    "embroidery": ("an embroidered {}", "an embroidery of {}", "a tapestry of {}"),
    "negative": ("a negative of {}", "an inverted photo of {}", "a weird photo of {}"),
}
_BARE = ("painted {}", "toy {}", "plastic {}", "embroidered {}", "origami {}", "cartoon {}", "hard to see {}")
"""Frames whose slot already has an article."""
_WEATHER_PHRASES: dict[str, tuple[str, ...]] = {
    "clear": ("in sunshine", "on a sunny day", "in clear weather", "under a clear sky"),
    "cloudy": ("under some clouds", "on a cloudy day", "in cloudy weather"),
    "overcast": ("on an overcast day", "under a grey sky", "in dull weather"),
    "fog": ("in fog", "in thick fog", "on a foggy day", "in the mist"),
    "rain": ("in the rain", "on a rainy day", "on a wet day", "in rainy weather"),
    "snow": ("in snow", "on a snowy day", "in winter", "covered with snow"),
}
_TIME_PHRASES: dict[str, tuple[str, ...]] = {
    "day": ("by day", "during the day", "in daylight"),
    "dusk": ("at dusk", "in the evening", "at twilight"),
    "night": ("at night", "by night", "in the dark"),
}
_PLACES = {
    "left": ("on the left", "to the left"),
    "right": ("on the right", "to the right"),
    "centre": ("in the middle", "ahead"),
}


def _scene_phrase(facts: Facts, rng: np.random.Generator) -> str:
    """Weather or time, whichever strikes; by day in fair weather often nothing."""
    if facts["time"] != "day" and rng.random() < 0.8:
        return " " + _choice(rng, _TIME_PHRASES[facts["time"]])
    if facts["weather"] in ("fog", "rain", "snow") or rng.random() < 0.5:
        return " " + _choice(rng, _WEATHER_PHRASES[facts["weather"]])
    return " " + _choice(rng, _TIME_PHRASES[facts["time"]]) if rng.random() < 0.3 else ""


def _placed(facts: Facts, rng: np.random.Generator) -> str:
    """One near object and where it is, or nothing."""
    near = [item for item in facts["objects"] if item["near"]]
    if not near:
        return ""
    item = near[int(rng.random() * len(near))]
    phrase = _with_article(word(item["class"], rng))
    return f"{phrase} {_choice(rng, _PLACES[item['place']])}"


def caption(facts: Facts, rng: np.random.Generator, template: str | None = None) -> str:
    """Returns a caption that names only what the facts hold.

    template: a prompt with "{}", such as "a photo of a {}."; the slot gets a bare noun phrase ("car and a road").
    Without one the caption follows the style, weather, time and street of the picture, whole pictures with more
    of them than crops.
    """
    if template is not None:
        phrase = content_phrase(facts, rng, most=2)
        before = template[: template.find("{}")].split()
        if before and before[-1] in ("a", "an", "the"):
            phrase = _stripped(phrase)
        return template.replace("{}", phrase, 1)
    phrases = _STYLE_PHRASES[facts["style"]]
    frame = phrases[0] if rng.random() < 0.45 else _choice(rng, phrases)
    shape = rng.random()
    tail = ""
    if not facts["crop"] and shape < 0.25:
        phrase = _with_article(facts["street"])
        tail = f"{_scene_phrase(facts, rng)} with {content_phrase(facts, rng, most=3)}"
    elif shape < 0.42 and (placed := _placed(facts, rng)):
        phrase = placed
    else:
        phrase = content_phrase(facts, rng, most=2 if facts["crop"] else 4)
        if rng.random() < (0.45 if facts["crop"] else 0.7):
            tail = _scene_phrase(facts, rng)
    if frame.endswith(_BARE):
        phrase = _stripped(phrase)
    return frame.format(phrase) + tail + ("." if rng.random() < 0.5 else "")


def _stripped(phrase: str) -> str:
    """Returns the phrase without its leading article."""
    for article in ("a ", "an ", "the "):
        if phrase.startswith(article):
            return phrase[len(article) :]
    return phrase
