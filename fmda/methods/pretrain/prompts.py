"""Which prompt templates are true of an image, so that each template means something to the model.

"a dark photo of a {}." is used for night scenes and darkened crops, "a painting of a {}." of painted ones, "a photo of
many {}." where several stand in the crop. Captions from the web are as loosely true; a few templates at random are
therefore mixed in by the caller.
"""

from collections.abc import Iterable, Mapping

Looks = frozenset[str]

# the first keyword found in a template decides; any one of its looks makes the template true
_NEEDS: tuple[tuple[str, Looks], ...] = tuple(
    (word, frozenset(looks))
    for word, looks in (
        ("black and white", {"grey"}),
        ("low resolution", {"low resolution"}),
        ("pixelated", {"pixelated"}),
        ("jpeg corrupted", {"jpeg"}),
        ("blurry", {"blurry"}),
        ("dark photo", {"dark"}),
        ("bright photo", {"bright"}),
        ("bad photo", {"low resolution", "pixelated", "jpeg", "blurry", "noisy"}),
        ("good photo", {"plain"}),
        ("hard to see", {"fog", "night", "tiny", "blurry"}),
        ("close-up", {"close"}),
        ("cropped", {"cut"}),
        ("of many", {"many"}),
        ("of one", {"single"}),
        ("of a large", {"large"}),
        ("of the large", {"large"}),
        ("of a small", {"small"}),
        ("of the small", {"small"}),
        ("clean", {"plain"}),
        ("dirty", {"rain", "snow"}),
        ("weird", {"negative", "sepia"}),
        ("nice", {"plain"}),
        ("cool", {"plain"}),
        ("video game", {"game"}),
        ("rendering", {"game"}),
        ("rendition", {"game", "art"}),
        ("painting", {"painting"}),
        ("graffiti", {"painting"}),
        ("art of", {"art"}),
        ("drawing", {"drawing"}),
        ("sketch", {"sketch"}),
        ("doodle", {"sketch"}),
        ("tattoo", {"sketch"}),
        ("cartoon", {"cartoon"}),
        ("sculpture", {"clay"}),
        ("origami", {"clay"}),
        ("plushie", {"embroidery", "clay"}),
        ("embroidered", {"embroidery"}),
        ("plastic", {"toy"}),
        ("toy", {"toy"}),
        ("photo", {"photo"}),
        ("itap", {"photo"}),
    )
)

_OF_STYLE: Mapping[str, tuple[str, ...]] = {
    "photo": ("photo",),
    "video game": ("game",),
    "painting": ("painting", "art"),
    "watercolor": ("painting", "art"),
    "drawing": ("drawing", "art"),
    "sketch": ("sketch", "drawing", "art"),
    "cartoon": ("cartoon", "art"),
    "black and white photo": ("grey", "photo"),
    "sepia photo": ("sepia", "photo"),
    "low resolution photo": ("low resolution", "photo"),
    "pixelated photo": ("pixelated", "photo"),
    "blurry photo": ("blurry", "photo"),
    "jpeg corrupted photo": ("jpeg", "photo"),
    "bad photo": ("noisy", "photo"),
    "dark photo": ("dark", "photo"),
    "bright photo": ("bright", "photo"),
    "clay": ("clay",),
    "plastic toy": ("toy",),
    "embroidery": ("embroidery",),
    "negative": ("negative", "photo"),
}

LOOKS: tuple[str, ...] = tuple(
    sorted(
        set().union(*(looks for _, looks in _NEEDS), *map(set, _OF_STYLE.values()))
        | {"day", "dusk", "clear", "cloudy", "overcast"}
    )
)
"""Every look an image can have."""


def looks_of(style: str, weather: str, time: str, extra: Iterable[str] = ()) -> Looks:
    """Returns the looks of an image from its facts and from what was done to it afterwards (`extra`)."""
    looks = {*_OF_STYLE[style], weather, time, *extra}
    if time == "night":
        looks.add("dark")
    spoiled = looks & {"low resolution", "pixelated", "jpeg", "blurry", "noisy", "dark", "fog", "rain", "snow"}
    if style == "photo" and not spoiled:
        looks.add("plain")
    return frozenset(looks)


def needs(template: str) -> Looks:
    """Returns the looks of which any one makes a template true; empty for a template that says nothing of a look."""
    return next((looks for word, looks in _NEEDS if word in template), frozenset())


def fitting(templates: Iterable[str], looks: Looks) -> list[int]:
    """Returns the positions of the templates that are true of an image with these looks."""
    return [index for index, text in enumerate(templates) if not (need := needs(text)) or need & looks]
