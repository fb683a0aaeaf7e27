"""Stages: finished ones are skipped, interrupted ones resume, foreign folders are left alone."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fmda.config import FREE
from fmda.errors import UserError
from fmda.methods.kinds import open_run
from fmda.methods.pipeline import Plan, Stage, run_stages


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
    with pytest.raises(UserError, match="made from other inputs or settings"):
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


def test_a_folder_with_foreign_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is not empty and no run of ours"):
        run_stages(stages([]), tmp_path, {}, lambda _: None)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_folder_with_half_a_hidden_file_of_a_killed_start_is_taken(tmp_path):
    (tmp_path / ".config.part.yaml").write_text("half")
    run_stages([Stage("one", lambda folder, done: None)], tmp_path, {"a": 1}, say=lambda line: None)
    assert (tmp_path / "one/stage.json").is_file()


def test_a_stage_may_read_earlier_ones_only(tmp_path):
    with pytest.raises(UserError, match="reads 'draw', which is no earlier stage"):
        run_stages(stages([])[::-1], tmp_path, {}, lambda _: None)
    assert not list(tmp_path.iterdir())


def test_an_unwritable_folder_is_one_line():
    with pytest.raises(UserError, match="cannot be written"):
        run_stages(stages([]), Path("/proc/fmda-run"), {}, lambda _: None)
    assert not Path("/proc/fmda-run").exists()


def test_plan_prints_aligned_lines():
    text = Plan(parameters=(("vision", 1234567),), flops=(("host", 3.1e9),), notes=("random weights",)).text()
    assert "1,234,567" in text and "3.10 GFLOP" in text and text.endswith("random weights")


def test_references_must_name_earlier_runs(tmp_path):
    recipe = tmp_path / "two.yaml"
    recipe.write_text("kind: pipeline\nruns:\n  page: {kind: report, runs: ['@wrld']}\n")
    with pytest.raises(UserError, match="'@wrld' names no earlier run"):
        open_run(recipe).stages()
    assert os.listdir(tmp_path) == ["two.yaml"]


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "fmda", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: flos\n", "kind 'flos' is unknown; did you mean 'floss'?"),
        ("kind: pipeline\nstages: {}\n", "unknown key 'stages'"),
        ("kind: [\n", "not valid YAML"),
    ],
)
def test_the_command_line_answers_faults_with_one_line_and_exit_code_2(tmp_path, text, message):
    recipe = tmp_path / "run.yaml"
    recipe.write_text(text)
    done = command("run", str(recipe), f"work_dir={tmp_path / 'work'}")
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "work").exists()


def test_help_of_every_verb_needs_no_jax():
    code = (
        "import sys, io, contextlib\nfrom fmda import cli\n"
        "for verb in cli.VERBS:\n"
        "  with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n"
        "    cli.main([*verb.split(), '--help'])\n"
        "  assert 'usage: fmda ' + verb in out.getvalue(), verb\n"
        "print('jax' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


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

    with pytest.raises(
        UserError, match="^fill: the device's memory is full .*; a smaller batch, smaller images"
    ) as full:
        run_stages([Stage("fill", fill, {})], tmp_path / "work", {"a": 1}, lambda _: None)
    assert "\n" not in str(full.value) and not (tmp_path / "work").exists()

    def fail(folder: Path, done: dict[str, Path]) -> None:
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another"):
        run_stages([Stage("fail", fail, {})], tmp_path / "work", {"a": 1}, lambda _: None)


@pytest.mark.parametrize("value", ["", "null", "[a]", "{a: 1}"])
def test_a_work_dir_that_is_no_path_is_refused(tmp_path, value):
    (tmp_path / "run.yaml").write_text("kind: report\nruns: [x]\n")
    with pytest.raises(UserError, match="work_dir: .* is not a path; name a folder"):
        open_run(tmp_path / "run.yaml", [f"work_dir={value}"])


def test_the_home_folder_may_be_written_short(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("kind: report\nruns: [x]\n")
    assert open_run(tmp_path / "run.yaml", ["work_dir=~/runs"]).work_dir == tmp_path / "runs"


@pytest.mark.parametrize("text", ["[]", "5", "", "{a"])
def test_a_damaged_configuration_of_a_run_is_named(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="config.yaml: is not what a run wrote; choose another work_dir="):
        run_stages(stages([]), tmp_path, {"a": 1}, lambda _: None)
