"""Each known data set, read from a tiny folder in its own layout."""

import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from fmda.data import ClassMap, data_root, known_datasets, open_dataset
from fmda.data.catalog import CATALOG
from fmda.errors import UserError
from fmda.places import below_data

PICTURE = np.full((2, 3, 3), (200, 100, 50), np.uint8)


def rows(*values: int) -> np.ndarray:
    """Returns a label map of 2 x 3 with the values in reading order."""
    return np.array(values, np.uint8).reshape(2, 3)


# data set, split, image file, label file, raw labels, labels that must come out
LAYOUTS = [
    (
        "cityscapes",
        "val",
        "cityscapes/leftImg8bit/val/ulm/ulm_000001_000019_leftImg8bit.png",
        "cityscapes/gtFine/val/ulm/ulm_000001_000019_gtFine_labelIds.png",
        (0, 7, 26, 33, 11, 4),
        (255, 0, 13, 18, 2, 255),
    ),
    (
        "cityscapes",
        "train",
        "leftImg8bit/train/ulm/a_leftImg8bit.png",
        "gtFine/train/ulm/a_gtFine_labelTrainIds.png",
        (0, 7, 18, 255, 11, 4),
        (0, 7, 18, 255, 11, 4),
    ),
    (
        "gta5",
        "train",
        "gta5/images/00001.png",
        "gta5/labels/00001.png",
        (7, 8, 34, 0, 33, 24),
        (0, 1, 255, 255, 18, 11),
    ),
    ("gta", "train", "gta/images/1.png", "gta/labels/1_labelTrainIds.png", (7, 8, 0, 0, 18, 1), (7, 8, 0, 0, 18, 1)),
    (
        "bdd10k",
        "val",
        "bdd10k/images/10k/val/7d06.jpg",
        "bdd10k/labels/sem_seg/masks/val/7d06.png",
        (0, 18, 255, 3, 4, 5),
        (0, 18, 255, 3, 4, 5),
    ),
    (
        "mapillary",
        "val",
        "mapillary/validation/images/x.jpg",
        "mapillary/validation/labels/x.png",
        (13, 44, 49, 65, 21, 9),
        (0, 5, 7, 255, 12, 1),
    ),
    (
        "mapillary-strict",
        "val",
        "mapillary/validation/images/x.jpg",
        "mapillary/validation/v1.2/labels/x.png",
        (13, 44, 49, 65, 21, 41),
        (0, 255, 255, 255, 12, 0),
    ),
    (
        "mapillary",
        "val",
        "mapillary/half/val_img/x.jpg",
        "mapillary/half/val_label/x.png",
        (13, 0, 18, 255, 1, 9),
        (13, 0, 18, 255, 1, 9),
    ),
    (
        "acdc",
        "val",
        "acdc/rgb_anon/fog/val/GOPR0476/GOPR0476_frame_000761_rgb_anon.png",
        "acdc/gt/fog/val/GOPR0476/GOPR0476_frame_000761_gt_labelTrainIds.png",
        (0, 1, 2, 3, 18, 255),
        (0, 1, 2, 3, 18, 255),
    ),
    (
        "acdc-night",
        "val",
        "acdc/rgb_anon/night/val/G/f_rgb_anon.png",
        "acdc/gt/night/val/G/f_gt_labelIds.png",
        (7, 8, 0, 3, 33, 255),
        (0, 1, 255, 255, 18, 255),
    ),
    (
        "dark-zurich",
        "val",
        "dark_zurich/rgb_anon/val/night/GOPR0356/GOPR0356_frame_000321_rgb_anon.png",
        "dark_zurich/gt/val/night/GOPR0356/GOPR0356_frame_000321_gt_labelTrainIds.png",
        (0, 1, 2, 3, 18, 255),
        (0, 1, 2, 3, 18, 255),
    ),
    (
        "ade20k",
        "val",
        "ade20k/images/validation/ADE_val_00000001.jpg",
        "ade20k/annotations/validation/ADE_val_00000001.png",
        (0, 1, 150, 2, 3, 4),
        (255, 0, 149, 1, 2, 3),
    ),
    (
        "coco-stuff",
        "val",
        "coco_stuff164k/images/val2017/000000000139.jpg",
        "coco_stuff164k/annotations/val2017/000000000139.png",
        (0, 10, 12, 181, 255, 11),
        (0, 10, 11, 170, 255, 255),
    ),
    (
        "cocostuff",
        "train",
        "coco-stuff/images/train2017/1.jpg",
        "coco-stuff/annotations/train2017/1_labelTrainIds.png",
        (0, 10, 12, 170, 255, 11),
        (0, 10, 12, 170, 255, 11),
    ),
    (
        "camvid",
        "val",
        "camvid/val/images/0016E5_1.png",
        "camvid/val/labels/0016E5_1.png",
        (0, 3, 10, 11, 8, 1),
        (0, 3, 10, 255, 8, 1),
    ),
    (
        "camvid",
        "val",
        "camvid/val/0016E5_1.png",
        "camvid/valannot/0016E5_1.png",
        (0, 3, 10, 11, 8, 1),
        (0, 3, 10, 255, 8, 1),
    ),
    (
        "kitti",
        "all",
        "kitti-semantics/training/image_2/000000_10.png",
        "kitti-semantics/training/semantic/000000_10.png",
        (7, 23, 26, 0, 24, 255),
        (0, 10, 13, 255, 11, 255),
    ),
    (
        "world",
        "val",
        "world/images/000000.png",
        "world/labels/000000.png",
        (0, 18, 255, 3, 4, 5),
        (0, 18, 255, 3, 4, 5),
    ),
    (
        "world",
        "night",
        "world/night/images/0.png",
        "world/night/labels/0.png",
        (0, 18, 255, 3, 4, 5),
        (0, 18, 255, 3, 4, 5),
    ),
]


@pytest.mark.parametrize(("name", "split", "image", "label", "raw", "expected"), LAYOUTS)
@pytest.mark.parametrize("palette", [False, True])
def test_layout_and_label_map(tmp_path, put, name, split, image, label, raw, expected, palette) -> None:
    put(image, PICTURE)
    put(label, rows(*raw), palette=palette)
    found = open_dataset(name, tmp_path, split)
    example = found[0]
    assert len(found) == 1 and example.image.dtype == np.uint8 and example.image.shape == (2, 3, 3)
    assert np.abs(example.image.astype(int) - PICTURE).max() <= 8  # JPEG, where the set has JPEG
    assert example.labels is not None and example.labels.dtype == np.uint8
    np.testing.assert_array_equal(example.labels, rows(*expected))


@pytest.mark.parametrize(
    ("name", "year", "folder", "lists", "raw", "expected"),
    [
        ("voc20", "VOC2012", "SegmentationClass", "Segmentation", (0, 1, 20, 255, 5, 6), (255, 0, 19, 255, 4, 5)),
        ("voc21", "VOC2012", "SegmentationClass", "Segmentation", (0, 1, 20, 255, 5, 6), (0, 1, 20, 255, 5, 6)),
        (
            "context59",
            "VOC2010",
            "SegmentationClassContext",
            "SegmentationContext",
            (0, 1, 59, 255, 5, 6),
            (255, 0, 58, 255, 4, 5),
        ),
        (
            "context60",
            "VOC2010",
            "SegmentationClassContext",
            "SegmentationContext",
            (0, 1, 59, 255, 5, 6),
            (0, 1, 59, 255, 5, 6),
        ),
    ],
)
def test_pascal_sets_go_by_their_lists(tmp_path, put, name, year, folder, lists, raw, expected) -> None:
    base = f"VOCdevkit/{year}"
    for key in ("2007_000033", "2007_000042", "2007_000061"):
        put(f"{base}/JPEGImages/{key}.jpg", PICTURE)
        put(f"{base}/{folder}/{key}.png", rows(*raw), palette=True)
    listing = tmp_path / base / f"ImageSets/{lists}/val.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("2007_000061\n2007_000033\n")
    found = open_dataset(name, tmp_path)
    assert [item.name for item in found.items] == ["2007_000061", "2007_000033"]
    np.testing.assert_array_equal(found[1].labels, rows(*expected))


def test_synthia_class_is_in_the_red_16_bit_channel(tmp_path, put) -> None:
    put("synthia/RGB/0000000.png", PICTURE)
    file = tmp_path / "synthia/GT/LABELS/0000000.png"
    file.parent.mkdir(parents=True)
    values = np.zeros((2, 3, 3), np.uint16)
    values[..., 1] = 777  # instance ids
    values[..., 2] = rows(3, 21, 0, 10, 12, 22)  # OpenCV's order puts red last
    assert cv2.imwrite(str(file), values)
    found = open_dataset("synthia", tmp_path, "train")
    np.testing.assert_array_equal(found[0].labels, rows(0, 3, 255, 11, 17, 255))


def test_camvid_sequences_are_splits(put, tmp_path) -> None:
    for place, key in (
        ("train", "0001TP_1"),
        ("test", "0001TP_9"),
        ("train", "0006R0_f1"),
        ("val", "0016E5_2"),
        ("test", "Seq05VD_f2"),
    ):
        put(f"camvid/{place}/images/{key}.jpg", PICTURE)
        put(f"camvid/{place}/labels/{key}.png", rows(0, 1, 2, 3, 4, 5))
    names = {split: [i.name for i in open_dataset("camvid", tmp_path, split).items] for split in ("dusk", "day", "all")}
    assert names["dusk"] == ["0001TP_1", "0001TP_9"]
    assert names["day"] == ["0006R0_f1", "0016E5_2", "Seq05VD_f2"]
    assert len(names["all"]) == 5 and len(open_dataset("camvid", tmp_path, "test")) == 2


def test_kitti_is_cut_at_one_hundred(tmp_path) -> None:
    folder = tmp_path / "training/image_2"
    folder.mkdir(parents=True)
    for i in range(200):
        (folder / f"{i:06}_10.png").touch()
    tune, last = (open_dataset("kitti-semantics", tmp_path, split, labels=False) for split in ("val", "test"))
    assert (len(tune), tune.items[0].name, tune.items[-1].name) == (100, "000000_10", "000099_10")
    assert (len(last), last.items[0].name, last.items[-1].name) == (100, "000100_10", "000199_10")


def test_acdc_conditions_together_and_flattened(tmp_path, put) -> None:
    for condition in ("fog", "rain"):
        put(f"acdc/rgb_anon/{condition}/val/G/f_rgb_anon.png", PICTURE)
        put(f"acdc/gt/{condition}/val/G/f_gt_labelTrainIds.png", rows(0, 1, 2, 3, 4, 5))
    put("flat/rgb_anon/val/g_rgb_anon.png", PICTURE)
    put("flat/gt/val/g_gt_labelTrainIds.png", rows(0, 1, 2, 3, 4, 5))
    both = open_dataset("acdc", tmp_path)
    assert len(both) == 2 and len({item.name for item in both.items}) == 2
    assert len(open_dataset("acdc-rain", tmp_path)) == 1
    assert open_dataset("acdc", tmp_path / "flat").items[0].name == "g"


def test_dark_zurich_train_is_by_night_and_without_labels(tmp_path, put) -> None:
    put("dark_zurich/rgb_anon/train/night/G/a_rgb_anon.png", PICTURE)
    put("dark_zurich/rgb_anon/train/day/G/b_rgb_anon.png", PICTURE)
    found = open_dataset("dark_zurich", tmp_path, "train", labels=False)
    assert [item.name for item in found.items] == ["a"] and found[0].labels is None
    with pytest.raises(UserError, match="has no labels; open it with labels=False"):
        open_dataset("dark-zurich", tmp_path, "train")


def test_folder_with_and_without_splits(tmp_path, street, put) -> None:
    assert [e.labels[1, 1] for e in open_dataset("folder", street)] == [0, 1, 2]
    put("split/images/train/sub/a.jpg", PICTURE)
    put("split/labels/train/sub/a.png", rows(0, 1, 0, 1, 0, 1))
    (tmp_path / "split/classes.yaml").write_text("classes: cityscapes")
    found = open_dataset("folder", tmp_path / "split", "train")
    assert found[0].name == "a" and found.classes.names[1] == "sidewalk"


def test_an_undivided_folder_is_no_training_split(street) -> None:
    with pytest.raises(UserError, match="split 'train'.*undivided folder is split 'val' or 'all'"):
        open_dataset("folder", street, "train")


def test_bare_pictures_open_without_labels(tmp_path, put) -> None:
    put("holiday/a.png", PICTURE)
    put("holiday/deep/b.jpg", PICTURE)
    found = open_dataset("folder", tmp_path / "holiday", labels=False)
    assert [item.name for item in found.items] == ["a", "b"] and len(found.classes) == 0


def test_grey_palette_and_alpha_pictures_become_rgb(tmp_path, put) -> None:
    put("mix/a.png", np.full((2, 3), 7, np.uint8))
    put("mix/b.png", np.full((2, 3, 4), 9, np.uint8))
    put("mix/c.png", np.full((2, 3), 1, np.uint8), palette=True)
    found = open_dataset("folder", tmp_path / "mix", labels=False)
    assert [e.image[0, 0].tolist() for e in found] == [[7, 7, 7], [9, 9, 9], [10, 8, 9]]


def test_mapped_and_sliced(street, tmp_path) -> None:
    (tmp_path / "map.yaml").write_text(f"from: {street / 'classes.yaml'}\nto: camvid\nmap: {{car: car, sky: sky}}\n")
    found = open_dataset("folder", street)[1:].mapped(ClassMap.load(tmp_path / "map.yaml"))
    assert len(found) == 2 and found.classes.names[8] == "car"
    assert [e.labels[1, 1] for e in found] == [8, 0] and found[0].labels[0, 0] == 255
    with pytest.raises(UserError, match="name another map"):
        open_dataset("folder", street).mapped("camvid-to-cityscapes")


def test_a_data_set_is_a_light_picklable_sequence(street) -> None:
    found = pickle.loads(pickle.dumps(open_dataset("folder", street)))
    assert found[2].image[0, 0, 0] == 20 and len(list(found)) == 3
    files = [(Path(item.image).name, Path(item.label).name) for item in found.items]
    assert files == [(name, name) for name in ("0.png", "1.png", "2.png")]


def test_a_path_is_looked_for_in_the_working_folder_and_then_below_the_data_root(monkeypatch, tmp_path) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FMDA_DATA", "/data")
    assert below_data("here") == Path("here") and below_data(tmp_path / "x") == tmp_path / "x"
    assert below_data("x/y") == Path("/data/x/y")
    monkeypatch.delenv("FMDA_DATA")
    assert below_data("x/y") == Path("x/y")


def test_data_root_is_the_environments_alone(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for named, expected in ((str(tmp_path), tmp_path), ("~/data", tmp_path / "data"), ("", None)):
        monkeypatch.setenv("FMDA_DATA", named)
        assert data_root() == expected
    monkeypatch.delenv("FMDA_DATA")
    assert data_root() is None
    with pytest.raises(UserError, match="'cityscapes': its folder is not named; name it with root=.*or FMDA_DATA"):
        open_dataset("cityscapes")


def test_known_datasets_describes_each() -> None:
    table = {row["name"]: row for row in known_datasets()}
    assert set(table) == set(CATALOG)
    assert table["cityscapes"]["splits"] == {"train": 2975, "val": 500, "test": 1525}
    assert table["ade20k"]["classes"] == 150 and "{key}" in table["gta5"]["layout"]
    assert all(row["home"].startswith("http") or row["note"] for row in table.values())


def test_data_does_not_import_jax() -> None:
    # the loader is left out: grain itself imports jax for its profiler, without starting a backend
    code = "import sys, fmda.data, fmda.data.transforms, fmda.data.check; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_the_loader_starts_no_jax_backend() -> None:
    code = (
        "from fmda.data.streams import Stream, batches; next(batches(Stream([{'x': 1}], None, 1), 0));"
        "from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
