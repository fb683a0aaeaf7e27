import csv
import json

import numpy as np
import pytest
from PIL import Image

from fmda.data import ClassList, ClassMap, Example, open_dataset
from fmda.errors import UserError
from fmda.evaluate import Protocol, Segmenter, confusion_matrix, evaluate_dataset
from fmda.evaluate.maps import common_list


def files(folder):
    """Returns all results but the timing."""
    paths = (p for p in folder.rglob("*") if p.is_file() and p.name != "timing.json")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def like(segmenter, forward):
    """Returns the segmenter with another function in its place."""
    return Segmenter(forward, segmenter.classes, segmenter.name, segmenter.fingerprint)


def test_scores_are_those_of_all_pixels_together(segmenter, memory):
    labels = np.stack([e.labels for e in memory.examples])
    guesses = np.stack([e.image[..., 0] // 100 for e in memory.examples])
    scores = evaluate_dataset(segmenter, memory)
    np.testing.assert_array_equal(scores.confusion, confusion_matrix(labels, guesses, 3))


def test_writes_scores_table_and_figures(segmenter, memory, tmp_path):
    scores = evaluate_dataset(segmenter, memory, out=tmp_path, keep=2)
    data = json.loads((tmp_path / "scores.json").read_text())
    assert data["scores"] == scores.to_json()
    assert (data["model"], data["dataset"], data["images"]) == ("threshold", "memory", 6)
    assert data["fingerprint"] == "threshold-100" and data["scores"]["protocol"]["crop"] == 0
    assert data["palette"][1] == [70, 130, 180]
    assert [(e["kind"], e["name"]) for e in data["examples"]] == [
        ("worst", "image-5"),
        ("worst", "image-4"),
        ("best", "image-0"),
        ("best", "image-1"),
    ]
    assert all((tmp_path / e["figure"]).is_file() for e in data["examples"])
    with open(tmp_path / "images.csv") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"name": "image-0", "miou": "1.0000", "accuracy": "1.0000", "pixels": "84"}
    assert float(rows[3]["accuracy"]) == pytest.approx(54 / 84, abs=1e-4)


@pytest.mark.parametrize("cut", [0, 7])
def test_resumes_after_a_kill_with_the_same_bytes(segmenter, memory, tmp_path, cut):
    evaluate_dataset(segmenter, memory, out=tmp_path / "whole", keep=2)
    calls = []

    def dying(image):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return segmenter.forward(image)

    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        evaluate_dataset(like(segmenter, dying), memory, out=broken, keep=2)
    assert not (broken / "scores.json").exists()
    log = broken / "images.jsonl"
    if cut:  # the kill came in the middle of a line
        log.write_bytes(log.read_bytes()[:-cut])
    again = []

    def counting(image):
        again.append(1)
        return segmenter.forward(image)

    evaluate_dataset(like(segmenter, counting), memory, out=broken, keep=2)
    assert len(again) == (4 if cut else 3) + 2  # the two best images are predicted again for their figures
    assert files(broken) == files(tmp_path / "whole")


def test_finished_evaluation_predicts_nothing_but_missing_figures(segmenter, memory, tmp_path):
    first = evaluate_dataset(segmenter, memory, out=tmp_path, keep=0)

    def never(image):
        raise AssertionError("predicted again")

    assert evaluate_dataset(like(segmenter, never), memory, out=tmp_path, keep=0) == first


def test_examples_are_the_worst_and_the_best_of_many(segmenter, memory, tmp_path):
    order = [3, 1, 5, 0, 2, 4]
    memory.examples[:] = [memory.examples[k] for k in order]
    evaluate_dataset(segmenter, memory, out=tmp_path, keep=1)
    examples = json.loads((tmp_path / "scores.json").read_text())["examples"]
    assert [(e["kind"], e["name"]) for e in examples] == [("worst", "image-5"), ("best", "image-0")]


def test_examples_of_another_evaluation_are_shown_again(segmenter, memory, tmp_path):
    evaluate_dataset(segmenter, memory, out=tmp_path / "before", keep=1)
    inverse = Segmenter(lambda image: (2 - image[..., 0] // 100, None), segmenter.classes, "inverse", "inverse-100")
    evaluate_dataset(inverse, memory, out=tmp_path / "after", keep=1, examples_of=tmp_path / "before")
    summaries = [json.loads((tmp_path / name / "scores.json").read_text()) for name in ("before", "after")]
    before, after = (summary["examples"] for summary in summaries)
    assert [(row["kind"], row["name"]) for row in after] == [(row["kind"], row["name"]) for row in before]
    assert after[0]["miou"] != before[0]["miou"]
    for folder, fault in (("before", "image '.*' is not of memory"), ("nowhere", "holds no scores.json")):
        with pytest.raises(UserError, match=f"examples_of: .*{fault}"):
            evaluate_dataset(inverse, memory[1:], out=tmp_path / folder / "new", examples_of=tmp_path / folder)


def test_a_folder_of_another_model_or_protocol_is_refused(segmenter, memory, tmp_path):
    evaluate_dataset(segmenter, memory, out=tmp_path, keep=1)
    before = files(tmp_path)
    for name, fingerprint, protocol, reason in (
        ("other", "threshold-100", Protocol(), "model.name: 'threshold' -> 'other'"),
        ("threshold", "threshold-90", Protocol(), "model.fingerprint: 'threshold-100' -> 'threshold-90'"),
        ("threshold", "threshold-100", Protocol(crop=8, stride=4), "protocol.crop: 0 -> 8"),
    ):
        other = Segmenter(segmenter.forward, segmenter.classes, name, fingerprint, protocol)
        with pytest.raises(UserError, match=f"holds work of another configuration .{reason}") as caught:
            evaluate_dataset(other, memory, out=tmp_path)
        assert "\n" not in str(caught.value)
    assert files(tmp_path) == before


@pytest.fixture
def place(tmp_path, classes):
    """Two folders with equal names and classes, whose label files have one size."""
    for root, label in (("A", 0), ("B", 1)):
        for kind in ("images", "labels"):
            (tmp_path / root / "val" / kind).mkdir(parents=True)
        classes.save(tmp_path / root / "classes.yaml")
        for k in range(2):
            image = np.full((6, 8, 3), 40 * k, np.uint8)
            Image.fromarray(image).save(tmp_path / root / "val" / "images" / f"{k}.png")
            write_label(tmp_path / root, k, label)
    return tmp_path


def write_label(root, k, value):
    Image.fromarray(np.full((6, 8), value, np.uint8)).save(root / "val" / "labels" / f"{k}.png")


def test_other_data_of_the_same_names_is_refused_and_a_moved_root_is_not(segmenter, place):
    out = place / "out"
    assert evaluate_dataset(segmenter, open_dataset("folder", place / "A"), out=out).accuracy == 1
    with pytest.raises(UserError, match=r"dataset\.contents"):
        evaluate_dataset(segmenter, open_dataset("folder", place / "B"), out=out)
    (place / "A").rename(place / "C")
    assert evaluate_dataset(segmenter, open_dataset("folder", place / "C"), out=out).accuracy == 1
    write_label(place / "C", 1, 2)
    with pytest.raises(UserError, match=r"dataset\.contents"):
        evaluate_dataset(segmenter, open_dataset("folder", place / "C"), out=out)


def test_a_journal_of_unknown_origin_is_refused(segmenter, memory, tmp_path):
    (tmp_path / "images.jsonl").write_text('{"name": "image-0", "counts": [[0, 0, 84]]}\n')
    with pytest.raises(UserError, match="belongs to an unknown evaluation"):
        evaluate_dataset(segmenter, memory, out=tmp_path)


def test_image_without_labels_is_named(segmenter, memory):
    memory.examples[1] = Example(memory.examples[1].image, None, "bare")
    with pytest.raises(UserError, match="'bare' has no label map"):
        evaluate_dataset(segmenter, memory)


def test_limit_and_empty_set(segmenter, memory):
    assert evaluate_dataset(segmenter, memory, limit=1).accuracy == 1.0
    memory.examples.clear()
    with pytest.raises(UserError, match="holds no image"):
        evaluate_dataset(segmenter, memory)


COARSE = ClassList(("ground", "thing"))


def test_map_of_predictions_merges_and_void_is_a_miss(segmenter, memory):
    to_coarse = ClassMap(segmenter.classes, COARSE, {"road": "ground", "car": "thing"})
    image = np.zeros((1, 4, 3), np.uint8)
    image[..., 0] = [0, 120, 220, 220]  # road, sky (no counterpart), car, car
    memory.classes = COARSE
    memory.examples[:] = [Example(image, np.array([[0, 0, 1, 255]], np.uint8), "x")]
    scores = evaluate_dataset(segmenter, memory, to_coarse)
    assert scores.iou.tolist() == [0.5, 1.0]
    assert scores.void.tolist() == [1, 0]


def test_map_of_labels_merges_many_to_one(memory):
    to_coarse = ClassMap(memory.classes, COARSE, {"road": "ground", "sky": "ground", "car": "thing"})
    coarse = Segmenter(lambda image: (np.ones(image.shape[:2]), None), COARSE, "all things", "")
    scores = evaluate_dataset(coarse, memory, to_coarse)
    labels = np.stack([e.labels for e in memory.examples])
    assert scores.confusion.tolist() == [[0, int((labels < 2).sum())], [0, int((labels == 2).sum())]]


def test_one_shared_list_is_merged_on_both_sides(classes):
    to_coarse = ClassMap(classes, COARSE, {"road": "ground"})
    common = common_list(classes, classes, to_coarse)
    values = np.arange(3, dtype=np.uint8)
    assert common.predictions[values].tolist() == common.labels[values].tolist() == [0, 255, 255]
    assert common.classes.names == COARSE.names


def test_two_maps_to_a_third_list(classes):
    mine = ClassList(("street", "vehicle"))
    ours = ClassMap(mine, COARSE, {"street": "ground", "vehicle": "thing"})
    theirs = ClassMap(classes, COARSE, {"road": "ground", "car": "thing"})
    common = common_list(mine, classes, [ours, theirs])
    assert common.predictions[np.array([1], np.uint8)].tolist() == [1]
    assert common.labels[np.array([2, 1], np.uint8)].tolist() == [1, 255]


def test_lists_that_do_not_meet_are_refused(classes):
    with pytest.raises(UserError, match="give a class map"):
        common_list(COARSE, classes)
    with pytest.raises(UserError, match="starts from 19 classes"):
        common_list(COARSE, classes, "cityscapes-to-camvid")


def test_known_map_scores_nineteen_classes_on_eleven():
    from fmda.data import class_list

    common = common_list(class_list("cityscapes"), class_list("camvid"), "cityscapes-to-camvid")
    mapped = common.predictions[np.array([0, 8, 12, 18, 17, 9, 255], np.uint8)]
    names = [*common.classes.names, "void"]
    assert [names[min(v, 11)] for v in mapped[[0, 1, 5, 6]]] == ["road", "tree", "void", "void"]
    assert mapped[2] == mapped[3] == mapped[4]
