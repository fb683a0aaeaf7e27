"""What a CLIP sees in images: embeddings, agreement with a text, the share of an image that shows a class."""

from collections.abc import Sequence

import numpy as np

from fmda.nn.norm import unit
from fmda.weights.network import Loaded
from fmda.weights.preprocess import preprocess_of
from fmda.world.names import CLASSES

EMBEDDED = 32
"""Images that the CLIP reads at once."""


def embed(clip: Loaded, images: np.ndarray) -> np.ndarray:
    """Returns unit-length CLIP embeddings [n, d] of uint8 images [n, H, W, 3], preprocessed as the checkpoint says."""
    preprocess = preprocess_of(clip)
    rows = []
    for first in range(0, len(images), EMBEDDED):
        rows.append(np.asarray(unit(clip.encode_image(preprocess(images[first : first + EMBEDDED])))))
    return np.concatenate(rows)


def clip_score(clip: Loaded, images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Returns the cosine of each image and its text."""
    # the whole context, so that no other length of a text compiles anew
    ids = clip.tokenize(texts, clip.config.text.context)
    words = np.asarray(unit(clip.encode_text(ids)))
    return (embed(clip, images) * words).sum(-1)


def grid_share(clip: Loaded, names: Sequence[str], images: np.ndarray, cells: int = 4) -> np.ndarray:
    """Returns [n, names]: the share of cells x cells crops that look most like "a photo of a {name}.".

    Each name competes with all others and with Cityscapes' 19 classes, so that a crop of road is no thing.
    """
    n, height, width, _ = images.shape
    rows, columns = height // cells, width // cells
    crops = images[:, : rows * cells, : columns * cells].reshape(n, cells, rows, cells, columns, 3)
    crops = crops.transpose(0, 1, 3, 2, 4, 5).reshape(n * cells**2, rows, columns, 3)
    rivals = list(dict.fromkeys([*names, *CLASSES]))
    words = np.asarray(unit(clip.encode_text(clip.tokenize([f"a photo of a {name}." for name in rivals]))))
    best = (embed(clip, crops) @ words.T).argmax(-1).reshape(n, cells**2)
    return np.stack([(best == rivals.index(name)).mean(-1) for name in names], -1)
