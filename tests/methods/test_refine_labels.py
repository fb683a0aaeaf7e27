"""Tests of kind `refine-labels` on four images, with a SAM built by hand."""

import json

import numpy as np
import pytest
from tiny_sam import blocks, pair

from fmda.errors import UserError
from fmda.evaluate.report import report
from fmda.methods.kinds import open_run
from fmda.png import read_png, write_png

CLASSES = "classes: [road, car, sky, pole]\n"


@pytest.fixture
def place(tmp_path):
    """Images of four blocks, their labels, and recorded maps with noise and holes."""
    rng = np.random.default_rng(0)
    for k in range(4):
        image, numbers = blocks(96, 128)
        noisy = np.where(rng.random(numbers.shape) < 0.3, rng.integers(0, 4, numbers.shape), numbers)
        noisy[rng.random(numbers.shape) < 0.1] = 255
        for folder, array in (("images", image), ("labels", numbers), ("../recorded/deep", noisy)):
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            write_png(tmp_path / "data" / folder / f"{k}.png", array.astype(np.uint8))
    (tmp_path / "data/classes.yaml").write_text(CLASSES)
    (tmp_path / "run.yaml").write_text(
        f"kind: refine-labels\nsam: {pair(tmp_path / 'sam')}\nlabels: {tmp_path / 'recorded'}\n"
        f"data: {{name: folder, root: {tmp_path / 'data'}, split: all}}\nclasses: {tmp_path / 'data/classes.yaml'}\n"
        f"work_dir: {tmp_path / 'run'}\nimproved: {{uncovered: map, least_stability: 0}}\n"
    )
    return tmp_path


def execute(place, *overrides):
    return open_run(place / "run.yaml", overrides).execute(lambda _: None)


def test_maps_are_refined_and_scored_before_and_after(place):
    done = execute(place)
    outputs = json.loads((done["scores"] / "stage.json").read_text())["outputs"]
    assert outputs["improved"]["miou"] > outputs["recorded"]["miou"] + 0.2
    assert outputs["recorded"]["answered"] == pytest.approx(0.9, abs=0.01)
    assert read_png(done["improved"] / "labels/3.png").shape == (96, 128)
    weights = json.loads((done["improved"] / "stage.json").read_text())["outputs"]["weights"]
    assert set(weights) == {"road", "car", "sky", "pole"}
    page = report([place / "run"], place / "report.html").read_text()
    assert "Before and after" in page and "improved: 0" in page and "paper: 3" in page
    # a second call finds all of it finished; the regions do not depend on how they vote
    regions = {path: path.stat().st_mtime_ns for path in (done["masks"] / "regions").iterdir()}
    execute(place, "threads=1", "figures=1")
    assert len(regions) == 4 and all(path.stat().st_mtime_ns == time for path, time in regions.items())


def test_each_second_image_in_one_mode_without_labels(place):
    done = execute(place, "every=2", "modes=[paper]", "score=false", "cache=" + str(place / "cache"))
    written = sorted(path.name for path in (done["paper"] / "labels").iterdir())
    assert sorted(done) == ["paper"] and written == ["0.png", "2.png"]
    assert len(list((place / "cache").iterdir())) == 1  # the images are equal


def test_recorded_maps_that_do_not_fit(place):
    recorded = place / "recorded/deep"
    (recorded / "2.png").unlink()
    with pytest.raises(UserError, match="no label map for 2"):
        execute(place)
    write_png(recorded / "2.png", np.zeros((96, 100), np.uint8))
    with pytest.raises(UserError, match="is 100x96 and its image 128x96"):
        execute(place)
    write_png(recorded / "2.png", np.full((96, 128), 9, np.uint8))
    with pytest.raises(UserError, match="not a label map of the class list"):
        execute(place)
    write_png(recorded.parent / "1.png", np.zeros((96, 128), np.uint8))
    with pytest.raises(UserError, match="two label maps for 1"):
        execute(place)


def test_the_plan_writes_nothing(place):
    plan = open_run(place / "run.yaml").plan()
    assert [name for name, _ in plan.stages] == ["masks", "improved", "paper", "scores"] and plan.notes == ("4 images",)
    assert not (place / "run").exists()
