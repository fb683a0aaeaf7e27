"""A small set of generated images, which is quickly drawn: noise of the text and the seed.

The processes that the tests start import it too.
"""

import json
import zlib

import numpy as np

from fmda.diffusion.filters import ImageFilter, NearDuplicate
from fmda.diffusion.generate import generate
from fmda.diffusion.manifest import Prompt

FACTS = {"sampler": "plms", "steps": 50, "guidance": 7.5, "checkpoint": "0123456789ab", "size": [8, 12]}
PROMPTS = (Prompt("a photo of cars", 0, "car"), Prompt("a photo of buses", 1, "bus"), Prompt("a wet street"))
EMBED = NearDuplicate(lambda images: images.reshape(len(images), -1) - 127.5, most=0.8, model="pixels")
BRIGHT = ImageFilter("bright", "brightness", lambda images, prompts: images.mean((1, 2, 3)) / 255, least=0.48)


def one_image(text, seed):
    """Noise of text and seed; every fifth seed gives black, every third another noise that is always the same."""
    if seed % 5 == 0:
        return np.zeros((8, 12, 3), np.uint8)
    key = [7] if seed % 3 == 0 else [seed, zlib.crc32(text.encode())]
    return np.random.default_rng(key).integers(0, 256, (8, 12, 3), np.uint8)


def draw(texts, seeds):
    assert len(texts) == len(seeds)
    return np.stack([one_image(*item) for item in zip(texts, seeds, strict=True)])


def make(folder, **changes):
    """Generates with both kinds of filters, unless told otherwise."""
    options = dict(
        draw=draw, prompts=PROMPTS, count=20, batch=4, seed=3, facts=FACTS, filters=(BRIGHT,), duplicates=EMBED,
        tries=50,
    )  # fmt: skip
    return generate(folder=folder, **{**options, **changes})


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def images(folder):
    return {name: data for name, data in content(folder).items() if name.parent.name == "images"}


def put_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
