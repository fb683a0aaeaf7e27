"""Stages: finished ones are skipped, interrupted ones resume, foreign folders are left alone."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from fmda.config import FREE
from fmda.errors import UserError
from fmda.runs.stages import Stage, run_stages


def stages(log: list[str], second: int = 1, fail: bool = False) -> list[Stage]:
    def draw(folder: Path, done: dict[str, Path]) -> dict:
        log.append("draw")
        (folder / "drawn.txt").write_text("x")
        return {"images": 3}

    def rank(folder: Path, done: dict[str, Path]) -> None:
        log.append("rank")
        assert (done["draw"] / "drawn.txt").read_text() == "x"
        if fail:
            raise KeyboardInterrupt

    return [Stage("draw", draw, {"n": 1}), Stage("rank", rank, {"n": second}, inputs=("draw",))]


def test_finished_stages_are_skipped_and_recorded(tmp_path):
    log: list[str] = []
    run_stages(stages(log), tmp_path / "work", {"a": 1}, lambda _: None)
    run_stages(stages(log), tmp_path / "work", {"a": 1}, lambda _: None)
    assert log == ["draw", "rank"]
    record = json.loads((tmp_path / "work/draw/stage.json").read_text())
    assert record["outputs"] == {"images": 3} and record["versions"]["python"]


def test_an_interrupted_stage_is_called_again(tmp_path):
    log: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_stages(stages(log, fail=True), tmp_path, {"a": 1}, lambda _: None)
    run_stages(stages(log), tmp_path, {"a": 1}, lambda _: None)
    assert log == ["draw", "rank", "rank"]


def test_another_configuration_is_refused_and_named(tmp_path):
    run_stages(stages([]), tmp_path, {"a": 1}, lambda _: None)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"another configuration \(a: 1 -> 2\); choose another work_dir="):
        run_stages(stages([]), tmp_path, {"a": 2}, lambda _: None)
    with pytest.raises(UserError, match=r"rank: made from other inputs or settings \(rank.n: 1 -> 2\); delete it"):
        run_stages(stages([], second=2), tmp_path, {"a": 1}, lambda _: None)
    assert (tmp_path / "config.yaml").read_text() == before


@dataclasses.dataclass(frozen=True)
class Inner:
    steps: int = 1
    log_every: int = dataclasses.field(default=5, metadata=FREE)


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str = "a"
    inner: Inner = Inner()
    count: int = dataclasses.field(default=1, metadata=FREE)


def test_what_is_free_may_change_between_the_parts_of_a_run(tmp_path):
    def chain(config):
        return [Stage("one", lambda folder, done: log.append(config), config)]

    log: list[Outer] = []
    first = Outer()
    run_stages(chain(first), tmp_path, {"kind": "x", "config": first}, lambda _: None)
    again = Outer(inner=Inner(log_every=9), count=2)
    run_stages(chain(again), tmp_path, {"kind": "x", "config": again}, lambda _: None)
    assert log == [first]  # finished, and still so
    assert "count: 2" in (tmp_path / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"config\.inner\.steps: 1 -> 2"):
        run_stages(chain(first), tmp_path, {"kind": "x", "config": Outer(inner=Inner(steps=2))}, lambda _: None)


def grown(**new: object) -> type:
    """The class `Outer` after its authors gave it and the class inside further fields with defaults."""
    fields = [(name, object, dataclasses.field(default=value)) for name, value in new.items()]
    inner = dataclasses.make_dataclass("Inner", fields, bases=(Inner,), frozen=True)
    return dataclasses.make_dataclass(
        "Outer", [("inner", inner, dataclasses.field(default=inner())), *fields], bases=(Outer,), frozen=True
    )


def test_a_configuration_that_gains_a_field_with_a_default_leaves_earlier_folders_usable(tmp_path):
    def chain(config):
        return [
            Stage("one", lambda folder, done: log.append("one"), config),
            Stage("two", lambda folder, done: log.append("two"), config.inner, inputs=("one",)),
        ]

    log: list[str] = []
    run_stages(chain(Outer()), tmp_path, {"kind": "x", "config": Outer()}, lambda _: None)
    new = grown(blur=0.0, colours=(1, 2))()
    run_stages(chain(new), tmp_path, {"kind": "x", "config": new}, lambda _: None)
    assert log == ["one", "two"]
    other = dataclasses.replace(new, blur=0.5)
    with pytest.raises(UserError, match=r"config\.blur: 0\.0 -> 0\.5"):
        run_stages(chain(other), tmp_path, {"kind": "x", "config": other}, lambda _: None)
    # a stage is recognised by the facts of those that it reads, too
    with pytest.raises(UserError, match=r"two: made from other inputs or settings \(one\.blur: 0\.0 -> 0\.5\)"):
        run_stages(
            [dataclasses.replace(chain(other)[0], always=True), *chain(other)[1:]],
            tmp_path, {"kind": "x", "config": new}, lambda _: None,
        )  # fmt: skip


def test_a_stage_that_renews_runs_again_when_a_free_setting_changed(tmp_path):
    log: list[int] = []
    for count in (1, 1, 2):
        config = Outer(count=count)
        stage = Stage("one", lambda folder, done, count=count: log.append(count), config, renew=True)
        run_stages([stage], tmp_path, {"config": config}, lambda _: None)
    assert log == [1, 2]


def test_a_folder_with_foreign_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is not empty and has no identity.json"):
        run_stages(stages([]), tmp_path, {}, lambda _: None)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_folder_with_half_a_hidden_file_of_a_killed_start_is_taken(tmp_path):
    (tmp_path / ".config.part.yaml").write_text("half")
    run_stages([Stage("one", lambda folder, done: None)], tmp_path, {"a": 1}, say=lambda line: None)
    assert (tmp_path / "one/stage.json").is_file()


def test_a_stage_may_read_earlier_ones_only(tmp_path):
    with pytest.raises(UserError, match="reads 'draw', which is not an earlier stage"):
        run_stages(stages([])[::-1], tmp_path, {}, lambda _: None)
    assert not list(tmp_path.iterdir())


def test_an_unwritable_folder_is_one_line():
    with pytest.raises(UserError, match="/proc/fmda-run: .*; make room or fix the path"):
        run_stages(stages([]), Path("/proc/fmda-run"), {}, lambda _: None)
    assert not Path("/proc/fmda-run").exists()


def test_a_second_run_at_the_same_time_is_refused_and_the_first_goes_on(tmp_path):
    def again(folder: Path, done: dict[str, Path]) -> None:
        with pytest.raises(UserError, match="another run is at work in it; wait for its end, or choose another work_"):
            run_stages(stages([]), tmp_path, {"a": 1}, lambda _: None)

    run_stages([Stage("again", again, {})], tmp_path, {"a": 1}, lambda _: None)
    log: list[str] = []
    run_stages(stages(log), tmp_path, {"a": 1}, lambda _: None)
    assert log == ["draw", "rank"]


def test_a_device_that_is_full_is_one_line_and_gives_the_folder_back(tmp_path):
    def fill(folder: Path, done: dict[str, Path]) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes\nand more")

    with pytest.raises(UserError, match="^fill: the memory of the device is full .*; use a smaller batch") as full:
        run_stages([Stage("fill", fill, {})], tmp_path / "work", {"a": 1}, lambda _: None)
    assert "\n" not in str(full.value) and not (tmp_path / "work").exists()

    def fail(folder: Path, done: dict[str, Path]) -> None:
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another"):
        run_stages([Stage("fail", fail, {})], tmp_path / "work", {"a": 1}, lambda _: None)


@pytest.mark.parametrize("text", ["[]", "5", "", "{a"])
def test_a_damaged_configuration_of_a_run_is_named(tmp_path, text):
    (tmp_path / "identity.json").write_text(text)
    with pytest.raises(UserError, match="identity.json: damaged or not a record of fmda; choose another work_dir="):
        run_stages(stages([]), tmp_path, {"a": 1}, lambda _: None)
