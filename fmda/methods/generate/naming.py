"""Which of Cityscapes' classes a text names."""

import re

from fmda.diffusion.filters import normalised
from fmda.world.captions import SYNONYMS

_MORE = {
    "sidewalk": ("kerb", "walkway"),
    "building": ("shop", "skyscraper"),
    "pole": ("lamppost", "street lamp", "utility pole"),
    "person": ("people", "men", "women", "child", "children", "passenger"),
    "rider": ("people riding", "bicyclist"),
    "car": ("taxi", "van"),
    "truck": ("lorries",),
    "motorcycle": ("scooter",),
}
"""Words besides the class names and the synonyms of the street world; irregular plurals too."""

_CLASS_OF = {word: name for name, synonyms in SYNONYMS.items() for word in (name, *synonyms, *_MORE.get(name, ()))}
# the longest first, so that "street sign" is no street and "traffic light" no light
_WORDS = re.compile(rf"\b({'|'.join(sorted(_CLASS_OF, key=len, reverse=True))})(?:s|es)?\b")


def named_classes(text: str) -> tuple[str, ...]:
    """Returns the classes that a text names by an English word of theirs, in the order of the words, each once."""
    return tuple(dict.fromkeys(_CLASS_OF[word] for word in _WORDS.findall(normalised(text))))
