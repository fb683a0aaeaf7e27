"""True files of true data sets, where the data root holds them; without them, the help that is given instead."""

import numpy as np
import pytest

from fmda.data import ClassMap, data_root, open_dataset
from fmda.data.check import check
from fmda.errors import UserError

# data set, split, images, size of the first (height, width), share of labelled pixels of one class
HELD = [
    ("cityscapes", "train", 4, (1024, 2048), "road", 0.394),
    ("bdd10k", "train", 16, (720, 1280), "road", None),
    ("bdd10k", "val", 8, (720, 1280), "road", None),
    ("coco-stuff", "train", 13, None, "person", None),
    ("coco-stuff", "val", 8, (426, 640), "person", None),
    ("camvid", "train", 367, (360, 480), "road", None),
    ("camvid", "val", 101, (360, 480), "road", 0.2946),
    ("camvid", "test", 233, (360, 480), "road", None),
    ("camvid", "dusk", 124, (360, 480), "road", None),
    ("camvid", "day", 577, (360, 480), "road", None),
    ("camvid", "train-dusk", 62, (360, 480), "road", None),
    ("camvid", "train-day", 305, (360, 480), "road", None),
    ("camvid", "test-dusk", 62, (360, 480), "road", None),
    ("camvid", "test-day", 171, (360, 480), "road", None),
    ("kitti-semantics", "val", 100, (375, 1242), "road", 0.231),
    ("kitti-semantics", "test", 100, (375, 1242), "road", None),
    ("kitti-semantics", "all", 200, (375, 1242), "road", None),
]


def present(name: str) -> bool:
    """Whether the data root holds the set's folder."""
    places = {"cityscapes": "samples/cityscapes", "bdd10k": "samples/bdd10k", "coco-stuff": "samples/coco-stuff"}
    root = data_root()
    return root is not None and (root / places.get(name, name)).is_dir()


@pytest.mark.parametrize(("name", "split", "count", "size", "class_name", "share"), HELD)
def test_true_files(name, split, count, size, class_name, share, capsys) -> None:
    if not present(name):
        with pytest.raises(UserError, match="expected layout"):
            open_dataset(name, split=split)
        with capsys.disabled():
            print(f" [{name} {split}: ran without real photographs]", end="")
        return
    found = open_dataset(name, split=split)
    first = found[0]
    assert len(found) == count and first.labels is not None
    assert size is None or first.image.shape[:2] == size
    assert first.labels.shape == first.image.shape[:2] and 20 < first.image.mean() < 235
    report = check(found[:101] if share is not None else found[:4])
    assert not report.faults
    if share is not None:
        np.testing.assert_allclose(report.shares[found.classes.index(class_name)], share, atol=2e-3)
    else:
        assert report.pixels.sum() > 0.5 * (report.pixels.sum() + report.ignored)


def test_camvid_dusk_is_darker_than_day(capsys) -> None:
    if not present("camvid"):
        with pytest.raises(UserError, match="expected layout"):
            open_dataset("camvid", split="dusk")
        with capsys.disabled():
            print(" [camvid: ran without real photographs]", end="")
        return
    grey = {
        s: np.mean([e.image.mean() for e in open_dataset("camvid", split=s, labels=False)[::20]])
        for s in ("dusk", "day")
    }
    assert 45 < grey["dusk"] < 80 and 90 < grey["day"] < 140


def test_camvid_sequences_are_those_of_the_lists(capsys) -> None:
    if not present("camvid"):
        with pytest.raises(UserError, match="expected layout"):
            open_dataset("camvid", split="0001TP")
        with capsys.disabled():
            print(" [camvid: ran without real photographs]", end="")
        return
    for sequence in ("0001TP", "0006R0", "0016E5", "Seq05VD"):
        listed = (data_root() / "camvid" / f"seq_{sequence}.txt").read_text().split()
        names = {item.name for item in open_dataset("camvid", split=sequence).items}
        assert names == {line.rpartition("/")[2] for line in listed}


def test_camvid_labels_in_cityscapes_classes(capsys) -> None:
    if not present("camvid"):
        with pytest.raises(UserError, match="expected layout"):
            open_dataset("camvid")
        with capsys.disabled():
            print(" [camvid: ran without real photographs]", end="")
        return
    plain = open_dataset("camvid")[0].labels
    mapped = open_dataset("camvid").mapped("camvid-to-cityscapes")[0].labels
    assert ((plain == 3) == (mapped == 0)).all() and ((plain == 255) == (mapped == 255)).all()
    np.testing.assert_array_equal(ClassMap.load("camvid-to-cityscapes").apply(plain), mapped)
