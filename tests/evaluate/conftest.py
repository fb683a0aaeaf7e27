"""A tiny labelled data set in memory and a segmenter whose answers are known."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from fmda.data import ClassList, Example
from fmda.data.digest import digest
from fmda.evaluate import Segmenter

CLASSES = ClassList(("road", "sky", "car"), np.array([[128, 64, 128], [70, 130, 180], [0, 0, 142]], np.uint8))


@dataclass
class Memory:
    """Examples in memory with the face of a data set."""

    examples: list[Example]
    classes: ClassList = field(default_factory=lambda: CLASSES)
    name: str = "memory"
    split: str = "val"

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return replace(self, examples=self.examples[index])
        return self.examples[index]

    def digest(self) -> str:
        return digest(part for e in self.examples for part in (e.name, e.image.tobytes(), e.labels.tobytes()))


def threshold(image):
    """Returns class = red channel // 100 and its certainty."""
    labels = image[..., 0] // 100
    return labels, np.ones(labels.shape, np.float32)


@pytest.fixture
def classes():
    return CLASSES


@pytest.fixture
def segmenter():
    return Segmenter(threshold, CLASSES, "threshold", "threshold-100")


@pytest.fixture
def memory():
    """Six images of 8x12; image k has 10 * k wrong labels and a row that is ignored."""
    rng = np.random.default_rng(3)
    examples = []
    for k in range(6):
        image = rng.integers(0, 256, (8, 12, 3), np.uint8)
        labels = image[..., 0] // 100
        labels.ravel()[: 10 * k] = (labels.ravel()[: 10 * k] + 1) % 3
        labels[-1] = 255
        examples.append(Example(image, labels, f"image-{k}"))
    return Memory(examples)
