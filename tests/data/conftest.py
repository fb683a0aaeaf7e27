"""Tiny data sets on disk, in the layouts of the real ones."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Writer = Callable[..., Path]


@pytest.fixture
def put(tmp_path: Path) -> Writer:
    """Returns put(path, array): writes an array as a PNG or JPEG below tmp_path, making the folders."""

    def write(path: str, array: object = None, *, palette: bool = False) -> Path:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        values = np.full((4, 6, 3), 90, np.uint8) if array is None else np.asarray(array)
        picture = Image.fromarray(values)
        if palette:
            picture.putpalette([(7 * i + c) % 256 for i in range(256) for c in (3, 1, 2)])
        picture.save(file)
        return file

    return write


@pytest.fixture
def street(tmp_path: Path, put: Writer) -> Path:
    """A generic folder: three pictures with labels of the classes road, car, sky."""
    for i in range(3):
        put(f"street/images/{i}.png", np.full((4, 6, 3), 10 * i, np.uint8))
        labels = np.full((4, 6), i, np.uint8)
        labels[0, 0] = 255
        put(f"street/labels/{i}.png", labels)
    (tmp_path / "street/classes.yaml").write_text("classes: [road, car, sky]\n")
    return tmp_path / "street"
