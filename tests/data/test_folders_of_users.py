"""Folders as people have them: tools' hidden files, links, upper-case suffixes, Unicode names, no labels, no splits."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from fmda.data import open_dataset
from fmda.data.check import check
from fmda.errors import UserError


@pytest.mark.parametrize(
    "junk",
    [
        "images/._0.png",
        "images/.ipynb_checkpoints/0-checkpoint.png",
        "images/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
        "images/__MACOSX/0.png",
        "labels/._0.png",
        "labels/.ipynb_checkpoints/0-checkpoint.png",
        "labels/@eaDir/9.png",
    ],
)
def test_hidden_names_are_skipped(street, put, junk: str) -> None:
    put(f"street/{junk}")
    dataset = open_dataset("folder", street, strict=False)
    assert [item.name for item in dataset.items] == ["0", "1", "2"] and not check(dataset).faults


def test_bare_images_below_hidden_folders_are_skipped(tmp_path, put) -> None:
    put("holiday/a.png")
    put("holiday/.venv/doc/logo.png")
    assert [item.name for item in open_dataset("folder", tmp_path / "holiday", labels=False).items] == ["a"]


def test_each_real_folder_is_read_once(street, tmp_path, put) -> None:
    put("elsewhere/x.png")
    for part in ("images", "labels"):
        os.symlink(".", street / part / "all")
        os.symlink("..", street / part / "up")
    assert len(open_dataset("folder", street, strict=False)) == 3
    # a link to a folder that lies elsewhere is followed, and a real folder comes before a link to it
    for part in ("images", "labels"):
        put(f"street/{part}/z/y.png", np.zeros((4, 6), np.uint8))
        os.symlink("z", street / part / "a")
        os.symlink(tmp_path / "elsewhere", street / part / "more")
    items = open_dataset("folder", street, strict=False).items
    names = [Path(item.image).relative_to(street).as_posix() for item in items]
    assert names == [*(f"images/{i}.png" for i in range(3)), "images/more/x.png", "images/z/y.png"]


def test_upper_case_suffixes_are_read(street) -> None:
    os.rename(street / "labels/1.png", street / "labels/1.PNG")
    os.rename(street / "images/2.png", street / "images/2.PNG")
    dataset = open_dataset("folder", street, strict=False)
    assert len(dataset) == 3 and not check(dataset).faults and dataset[1].labels[1, 1] == 1


def test_two_unicode_forms_of_a_name_are_one(tmp_path, put) -> None:
    put(f"{'u'}/images/{unicodedata.normalize('NFD', 'größe')}.png")
    put(f"{'u'}/labels/{unicodedata.normalize('NFC', 'größe')}.png", np.zeros((4, 6), np.uint8))
    (tmp_path / "u/classes.yaml").write_text("classes: [road]")
    assert open_dataset("folder", tmp_path / "u")[0].labels is not None


def test_a_list_may_hold_labels_comments_and_names_with_blanks(tmp_path, put) -> None:
    for key in ("2007_000033", "my photo", "2007 2"):
        put(f"voc/JPEGImages/{key}.jpg")
        put(f"voc/SegmentationClass/{key}.png", np.zeros((4, 6), np.uint8))
    listing = tmp_path / "voc/ImageSets/Segmentation/val.txt"
    listing.parent.mkdir(parents=True)
    listing.write_bytes("# a comment\r\n2007_000033 -1\r\nmy photo\r\n2007 2\r\n".encode("utf-16"))
    names = [item.name for item in open_dataset("voc21", tmp_path / "voc").items]
    assert names == ["2007_000033", "my photo", "2007 2"]


def test_names_differ_where_suffixes_alone_do(tmp_path, put) -> None:
    put("holiday/a.png")
    put("holiday/a.jpg")
    dataset = open_dataset("folder", tmp_path / "holiday", labels=False)
    assert len({item.name for item in dataset.items}) == 2


def test_a_flat_folder_is_every_default_split_without_labels(tmp_path, put) -> None:
    for suffix in ("png", "JPG", "webp", "tif", "bmp"):
        put(f"flat/{suffix}.{suffix}")
    for split in ("train", "val", "all"):
        assert len(open_dataset("folder", tmp_path / "flat", split, labels=False)) == 5
    with pytest.raises(UserError, match="bare images open with labels=False"):
        open_dataset("folder", tmp_path / "flat")
    report = check(open_dataset("folder", tmp_path / "flat", strict=False))
    assert report.verdict == "fit only as unlabelled images: there are no labels"
    assert report.to_json()["fit"] is False and report.to_json()["fit_unlabelled"] is True


@pytest.mark.parametrize("layout", ["{split}/images/a.png", "images/{split}/a.png"])
def test_a_folder_with_splits_is_no_undivided_one(tmp_path, put, layout: str) -> None:
    put("parts/" + layout.format(split="train"))
    for split in ("val", "all"):
        with pytest.raises(UserError, match=f"split '{split}'.*its splits are: train"):
            open_dataset("folder", tmp_path / "parts", split, labels=False)


def test_check_says_where_it_looked_for_labels(street) -> None:
    os.rename(street / "labels", street / "masks")
    (street / "classes.yaml").unlink()
    report = check(open_dataset("folder", street, strict=False))
    assert report.text().endswith("fit only as unlabelled images: there are no labels")
    assert report.notes == (f"looked for labels labels/{{key}}.png in {street}",)


def test_check_opens_a_split_without_labels(tmp_path, put) -> None:
    put("leftImg8bit/test/ulm/a_leftImg8bit.png")
    report = check(open_dataset("cityscapes", tmp_path, "test", strict=False))
    assert report.images == 1 and report.verdict.startswith("fit only as unlabelled")
