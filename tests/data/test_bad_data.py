"""Bad input: one line that names the file and the mend; and `check`, which finds all of it at once."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from fmda.data import FileFault, open_dataset, read_image, read_labels
from fmda.data.check import check
from fmda.errors import UserError


def one_line(fault: pytest.ExceptionInfo[UserError]) -> str:
    text = str(fault.value)
    assert "\n" not in text and ";" in text  # what is wrong; how to mend it
    return text


def test_missing_folder_names_the_layout(tmp_path) -> None:
    with pytest.raises(UserError) as fault:
        open_dataset("cityscapes", tmp_path / "nowhere")
    text = one_line(fault)
    assert str(tmp_path / "nowhere") in text and "leftImg8bit/{split}/{key}_leftImg8bit.png" in text


def test_wrong_folder_says_what_was_looked_for(tmp_path, put) -> None:
    put("other/a.png")
    with pytest.raises(UserError) as fault:
        open_dataset("cityscapes", tmp_path / "other")
    assert "looked for leftImg8bit/val/{key}_leftImg8bit.png" in one_line(fault)


def test_empty_set(tmp_path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError) as fault:
        open_dataset("folder", tmp_path)
    assert "no images of 'folder'" in one_line(fault)


def test_unknown_set_split_and_place(tmp_path) -> None:
    with pytest.raises(UserError, match="did you mean 'cityscapes'"):
        open_dataset("cityscape")
    with pytest.raises(UserError, match="gta5 has no split 'val'; it has: train"):
        open_dataset("gta5", tmp_path)
    with pytest.raises(UserError, match="name its folder with root="):
        open_dataset("folder")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_picture(tmp_path, suffix: str) -> None:
    file = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(FileFault) as fault:
        read_image(file)
    assert str(file) in one_line(fault) and fault.value.kind == "truncated image"


@pytest.mark.parametrize(("content", "kind"), [(b"", "truncated image"), (b"<html>", "unreadable image")])
def test_no_picture_at_all(tmp_path, content: bytes, kind: str) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(FileFault) as fault:
        read_image(tmp_path / "a.png")
    assert fault.value.kind == kind and "a.png" in one_line(fault)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3)])
def test_16_bit_picture(tmp_path, suffix: str, shape: tuple[int, ...]) -> None:
    assert cv2.imwrite(str(tmp_path / f"a.{suffix}"), np.full(shape, 40000, np.uint16))
    with pytest.raises(FileFault) as fault:
        read_image(tmp_path / f"a.{suffix}")
    assert fault.value.kind == "16-bit image" and "convert it to an 8-bit image" in one_line(fault)


def test_truncated_16_bit_label_of_synthia(tmp_path) -> None:
    values = np.random.default_rng(0).integers(0, 22, (32, 32, 3)).astype(np.uint16)
    assert cv2.imwrite(str(tmp_path / "a.png"), values)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png", red16=True), values[..., 2])
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-50])
    with pytest.raises(FileFault, match="truncated or damaged"):
        read_labels(tmp_path / "a.png", red16=True)


@pytest.mark.parametrize(
    ("labels", "kind", "text"),
    [
        (np.zeros((4, 6), np.uint16), "16-bit label", "save it with 8 bits"),
        (np.zeros((4, 6, 3), np.uint8), "colour label", "save one 8-bit channel of class ids"),
        (np.full((4, 6), 37, np.uint8), "value outside", "label value 37 is outside the class list (0-2, 255"),
        (np.zeros((4, 5), np.uint8), "size differs", "labels are 5x4 but the image"),
    ],
)
def test_faulty_label_is_named_on_reading_and_by_check(street: Path, put, labels, kind: str, text: str) -> None:
    file = put("street/labels/1.png", labels)
    found = open_dataset("folder", street)
    with pytest.raises(FileFault) as fault:
        found[1]
    assert str(file) in one_line(fault) and text in str(fault.value) and fault.value.kind == kind
    report = check(found)
    assert [(f.kind, f.path) for f in report.faults] == [(kind, str(file))]


def test_label_value_37_in_cityscapes_ids(tmp_path, put) -> None:
    put("leftImg8bit/val/ulm/a_leftImg8bit.png")
    put("gtFine/val/ulm/a_gtFine_labelIds.png", np.full((4, 6), 37, np.uint8))
    with pytest.raises(FileFault, match=r"label value 37 is outside the class list \(0-33, 255 for none\)"):
        open_dataset("cityscapes", tmp_path)[0]


def test_image_without_label(street: Path) -> None:
    (street / "labels/2.png").unlink()
    with pytest.raises(UserError) as fault:
        open_dataset("folder", street)
    assert f"{street / 'images/2.png'}: image without label (1 of 3)" in one_line(fault)
    report = check(open_dataset("folder", street, strict=False))
    assert [f.kind for f in report.faults] == ["image without label"]
    assert open_dataset("folder", street, labels=False)[2].labels is None


def test_check_finds_every_fault_at_once(street: Path, put) -> None:
    (street / "labels/2.png").unlink()
    (street / "images/1.png").write_bytes((street / "images/1.png").read_bytes()[:40])
    put("street/labels/0.png", np.full((4, 6), 9, np.uint8))
    put("street/labels/7.png", np.zeros((4, 6), np.uint8))
    report = check(open_dataset("folder", street, strict=False))
    kinds = sorted(f.kind for f in report.faults)
    assert kinds == ["image without label", "label without image", "truncated image", "value outside"]
    assert "not fit for a run: 4 faults" in report.text()
    assert [f["file"] for f in report.to_json()["faults"]] == [f.path for f in report.faults]


def test_check_counts_pixels_by_class(street: Path) -> None:
    report = check(open_dataset("folder", street))
    assert report.pixels.tolist() == [23, 23, 23] and report.ignored == 3 and not report.faults
    np.testing.assert_allclose(report.shares, 1 / 3)
    assert report.sizes == {(4, 6): 3}
    plain = json.loads(json.dumps(report.to_json()))
    assert plain["pixels"] == {"road": 23, "car": 23, "sky": 23} and plain["fit"] is True
    assert "33.33%" in report.text() and report.text().endswith("fit for a run")


def test_check_of_an_empty_set(street: Path) -> None:
    report = check(open_dataset("folder", street)[:0])
    assert [f.kind for f in report.faults] == ["empty"] and report.shares.tolist() == [0, 0, 0]


def test_check_notes_a_short_split_and_absent_classes(tmp_path, put) -> None:
    put("camvid/val/images/0016E5_1.png")
    put("camvid/val/labels/0016E5_1.png", np.full((4, 6), 3, np.uint8))
    report = check(open_dataset("camvid", tmp_path))
    assert report.expected == 101 and report.notes[0] == "the published split has 101 images, this folder 1"
    assert "classes without a pixel: sky, building" in report.notes[1]


def test_missing_class_list(street: Path) -> None:
    (street / "classes.yaml").unlink()
    with pytest.raises(UserError) as fault:
        open_dataset("folder", street)
    assert "classes.yaml: no class list" in one_line(fault)


def test_class_list_with_a_duplicate(street: Path) -> None:
    (street / "classes.yaml").write_text("classes: [road, car, road]")
    with pytest.raises(UserError, match="class 'road' occurs twice"):
        open_dataset("folder", street)


def test_listed_image_that_is_missing(tmp_path) -> None:
    listing = tmp_path / "ImageSets/Segmentation/val.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("2007_000033\n")
    report = check(open_dataset("voc20", tmp_path, strict=False))
    assert report.faults[0].kind == "missing image" and "JPEGImages/2007_000033.jpg" in report.faults[0].path
