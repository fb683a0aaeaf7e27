"""Tests of rendered data sets: layout, resume without rewriting, reproduction by index, refusals."""

import json

import cv2
import numpy as np
import pytest

from fmda.errors import UserError
from fmda.methods.render import RenderConfig, plan, stages, write_world
from fmda.world.names import CLASSES

SMALL = dict(height=64, width=128, batch=4)
PARTS = ("images", "labels", "instances")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two domains of five and four pictures."""
    folder = tmp_path_factory.mktemp("world")
    write_world(RenderConfig(domains={"photo": 5, "night": 4}, **SMALL), folder)
    return folder


def content(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_layout(world):
    photo = world / "photo"
    assert all(len(list((photo / part).iterdir())) == 5 for part in PARTS)
    rows = [json.loads(line) for line in (photo / "captions.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == [f"{i:06d}" for i in range(5)]
    assert all(row["domain"] == "photo" and row["caption"] and row["facts"]["classes"] for row in rows)
    labels = cv2.imread(str(photo / "labels/000000.png"), cv2.IMREAD_UNCHANGED)
    instances = cv2.imread(str(photo / "instances/000000.png"), cv2.IMREAD_UNCHANGED)
    assert labels.dtype == np.uint8 and labels.shape == (64, 128) and instances.dtype == np.uint16
    counts = np.bincount(labels.ravel(), minlength=256)
    assert all(counts[CLASSES.index(name)] == n for name, n in rows[0]["facts"]["classes"].items())
    assert cv2.imread(str(world / "contact-sheet.png")) is not None


def test_the_folder_opens_as_a_data_set(world):
    from fmda.data import open_dataset

    found = open_dataset("folder", world / "night", "val")
    assert len(found) == 4 and tuple(found.classes.names) == CLASSES
    assert found[0].image.shape == (64, 128, 3)


def test_scenes_in_memory_equal_those_of_the_folder(world):
    from fmda.methods.pretrain.crops import Drawn, Scenes

    folder, memory = Scenes([world / "photo"]), Scenes([Drawn("photo", 5, **SMALL)])
    assert len(memory) == len(folder) == 5
    for ours, theirs in zip(memory, folder, strict=True):
        assert ours["facts"] == theirs["facts"]
        assert all(np.array_equal(ours[name], theirs[name]) for name in ("image", "labels", "instances"))


@pytest.mark.parametrize("wrong", [{"domain": "photos", "count": 5}, {"domain": "photo", "count": 0}])
def test_scenes_in_memory_are_checked_when_they_are_declared(wrong):
    from fmda.config import from_dict
    from fmda.methods.pretrain.crops import Drawn

    with pytest.raises(UserError):
        from_dict(Drawn, wrong)


def test_a_second_call_rewrites_nothing(world):
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*") if path.is_file() and path.parent != world}
    write_world(RenderConfig(domains={"photo": 5, "night": 4}, **SMALL), world)
    assert before == {
        path: path.stat().st_mtime_ns for path in world.rglob("*") if path.is_file() and path.parent != world
    }


def test_a_broken_off_folder_is_completed_to_the_same_bytes(world, tmp_path):
    whole = content(world / "photo")
    write_world(RenderConfig(domains={"photo": 3}, **SMALL), tmp_path)
    root = tmp_path / "photo"
    (root / "images/000001.png").unlink()
    journal = root / "captions.jsonl"
    journal.write_bytes(journal.read_bytes()[:-25])
    kept = (root / "images/000000.png").stat().st_mtime_ns
    write_world(RenderConfig(domains={"photo": 5}, **SMALL), tmp_path)
    assert content(root) == whole
    assert (root / "images/000000.png").stat().st_mtime_ns == kept


def test_another_configuration_is_refused_and_nothing_changes(world):
    before = content(world)
    with pytest.raises(UserError, match="holds work of another configuration .*seed"):
        write_world(RenderConfig(domains={"photo": 5}, seed=1, **SMALL), world)
    assert content(world) == before


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "photo").mkdir()
    (tmp_path / "photo/mine.txt").write_text("keep")
    with pytest.raises(UserError, match="is not empty and has no identity.json"):
        write_world(RenderConfig(domains={"photo": 1}, **SMALL), tmp_path)
    assert (tmp_path / "photo/mine.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"domains": {"nigth": 3}}, "did you mean 'night'"),
        ({"domains": {}}, "none named"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(UserError, match=message):
        RenderConfig(**values)


def test_plan_and_stages_name_the_work():
    config = RenderConfig(domains={"fog": 2})
    assert [stage.name for stage in stages(config)] == ["render"]
    assert "fog: 2 images of 128 x 256" in plan(config).text()
