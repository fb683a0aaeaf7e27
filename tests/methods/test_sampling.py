"""The order of a labelled source: what it draws, and what it notes of classes that it cannot draw."""

import numpy as np
import pytest
from PIL import Image

from fmda.data import open_dataset
from fmda.data.streams import Shuffled
from fmda.errors import UserError
from fmda.methods.sampling import source_order


@pytest.fixture
def source(tmp_path):
    """Two images: road everywhere but for 4 pixels of car in the second; no bus, no sky."""
    for name, cars in (("0", 0), ("1", 4)):
        labels = np.zeros((4, 6), np.uint8)
        labels[0, :cars] = 1
        for part, pixels in (("images", np.zeros((4, 6, 3), np.uint8)), ("labels", labels)):
            (tmp_path / part).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / part / f"{name}.png")
    (tmp_path / "classes.yaml").write_text("classes: [road, car, bus, sky]")
    return open_dataset("folder", tmp_path)


ABSENT = "folder: classes that no label map holds: bus, sky"


def notes(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if not line.startswith("check images")]


def test_classes_that_are_never_drawn_are_noted(source, capsys):
    order = source_order(source, 0.01, least=4)
    assert list(order.examples) == [0] and order.pixels.tolist() == [[24, 0, 0, 0], [20, 4, 0, 0]]
    absent, never = notes(capsys)
    assert absent == ABSENT
    assert never.startswith("warning: folder: classes that rare class sampling never draws, with no more than 4 pixels")
    assert never.endswith("in any image: car; lower rare_pixels to draw them")


def test_classes_that_are_drawn_are_not_noted(source, capsys):
    order = source_order(source, 0.01, least=3, least_in_crop=2)
    assert {index: places.tolist() for index, places in order.examples.items()} == {0: [0, 1], 1: [1]}
    assert order.least_in_crop == 2
    assert source_order(source, None, least=99) == Shuffled()
    assert notes(capsys) == [ABSENT, ABSENT]


def test_a_source_without_a_class_to_draw_is_refused(source):
    with pytest.raises(UserError, match="no image has more than 24 pixels of any class; lower rare_pixels"):
        source_order(source, 0.01, least=24)


def test_a_broken_file_is_refused(source):
    with open(source.items[1].label, "wb"):
        pass
    with pytest.raises(UserError, match=r"1 of 2 images cannot be used: .*labels/1\.png: an empty file"):
        source_order(source, None, least=0)
