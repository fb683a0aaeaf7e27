"""Label maps of host and FLOSS out of one pass of the tower over each image."""

import zlib
from functools import partial

import numpy as np
from jaxtyping import UInt8

from fmda.evaluate import Segmenter
from fmda.evaluate.segmenter import Forward
from fmda.methods.floss.features import Patches
from fmda.methods.floss.model import Chosen, Floss, Image
from fmda.methods.floss.tower import image_digest

Labels = UInt8[np.ndarray, "H W"]


def segmenter(model: Floss, chosen: Chosen | None) -> Segmenter:
    """Returns FLOSS with these experts as a segmenter, or its host alone for None."""
    if chosen is None:
        return _segmenter(model, None, model.predict_host)
    return _segmenter(model, chosen, partial(model.predict, classifiers=model.classifiers(chosen)))


class LabelMaps:
    """Host and FLOSS as two segmenters that share the tower: the first to predict an image labels it for both.

    Label maps are kept compressed in memory, some 20 KiB for each megapixel.
    """

    def __init__(self, model: Floss, chosen: Chosen) -> None:
        self.model, self.classifiers = model, model.classifiers(chosen)
        self.host = _segmenter(model, None, lambda image: (self._labels(image, 0), None))
        self.fused = _segmenter(model, chosen, lambda image: (self._labels(image, 1), None))
        self._kept: dict[bytes, tuple[bytes, bytes]] = {}

    def add(self, image: Image, patches: Patches) -> None:
        """Labels an image whose patches are known."""
        maps = (self.model.predict_host(image, patches)[0], self.model.predict(image, self.classifiers, patches)[0])
        first, second = (zlib.compress(labels.astype(np.uint8).tobytes(), 1) for labels in maps)
        self._kept[image_digest(image)] = first, second

    def _labels(self, image: Image, which: int) -> Labels:
        if image_digest(image) not in self._kept:
            self.add(image, self.model.patches(image))
        data = zlib.decompress(self._kept[image_digest(image)][which])
        return np.frombuffer(data, np.uint8).reshape(image.shape[:2])


def _segmenter(model: Floss, chosen: Chosen | None, forward: Forward) -> Segmenter:
    name = model.host.name if chosen is None else f"{model.host.name} + FLOSS"
    return Segmenter(forward, model.classes, name, model.identity(chosen), model.host.protocol)
