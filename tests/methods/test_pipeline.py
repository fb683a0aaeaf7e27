"""Kinds of run and pipelines: references, checks before the first stage, faults in one line."""

import dataclasses
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from fmda.config import FREE
from fmda.errors import UserError
from fmda.methods import kinds
from fmda.methods.kinds import open_run
from fmda.runs.plan import Plan
from fmda.runs.stages import Stage, pending
from fmda.weights import efficientnet_lite


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


@pytest.mark.parametrize("value", ["", "null", "[a]", "{a: 1}"])
def test_a_work_dir_that_is_no_path_is_refused(tmp_path, value):
    (tmp_path / "run.yaml").write_text("kind: report\nruns: [x]\n")
    with pytest.raises(UserError, match="work_dir: .* is not a path; name a folder"):
        open_run(tmp_path / "run.yaml", [f"work_dir={value}"])


def test_the_home_folder_may_be_written_short(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("kind: report\nruns: [x]\n")
    assert open_run(tmp_path / "run.yaml", ["work_dir=~/runs"]).work_dir == tmp_path / "runs"


@dataclasses.dataclass(frozen=True)
class Copy:
    """A kind of run that copies a file as often as it is asked to."""

    source: str
    seed: int = 0
    count: int = dataclasses.field(default=1, metadata=FREE)


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """The kind `copy`; returns what it did, and the function that opens a pipeline of two."""
    log: list[str] = []

    def stages(config):
        def run(folder: Path, done: dict[str, Path]) -> None:
            log.append(f"copy {Path(config.source).name} x{config.count}")
            (folder / "copy.txt").write_text(Path(config.source).read_text())
            if config.seed == 9:
                raise KeyboardInterrupt

        return [Stage("write", run, config, always=True)]

    def check(config):
        log.append(f"check {config.source}")
        if not pending(config.source) and not Path(config.source).is_file():
            raise UserError(f"source: {config.source} does not exist; fix the path")

    def plan(config):
        return Plan(
            stages=(("write", "x"),), memory=(("file", 8.0),), shardings=(("file", "whole"),), notes=(config.source,)
        )

    module = types.SimpleNamespace(Config=Copy, stages=stages, check=check, plan=plan)
    monkeypatch.setitem(sys.modules, "copy_kind", module)
    monkeypatch.setitem(kinds.KINDS, "copy", ("copy_kind", "copy"))
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a")
    Path("two.yaml").write_text(
        "kind: pipeline\nruns:\n  first: {kind: copy, source: a.txt}\n"
        "  second: {kind: copy, source: '@first/write/copy.txt'}\n"
    )
    return types.SimpleNamespace(log=log, module=module)


def execute(*overrides: str, recipe: str = "two.yaml") -> None:
    open_run(recipe, ["work_dir=out", *overrides]).execute(lambda _: None)


def test_everything_is_checked_before_the_first_stage(copies):
    with pytest.raises(UserError, match=r"two.yaml: runs.second: source: b.txt does not exist; fix the path"):
        execute("runs.second.source=b.txt")
    assert copies.log == ["check a.txt", "check b.txt"] and not Path("out").exists()


def test_what_an_earlier_run_makes_is_checked_when_it_is_there(copies):
    execute()
    assert copies.log[:2] == ["check a.txt", "check @first/write/copy.txt"]
    assert copies.log[-2:] == [f"check {Path('out/first/write/copy.txt').absolute()}", "copy copy.txt x1"]
    copies.log.clear()
    Path("a.txt").unlink()
    execute()  # nothing to do, and nothing to check
    assert copies.log == []


def test_free_settings_are_free_inside_pipelines(copies):
    execute()
    copies.log.clear()
    execute("runs.first.count=3")
    assert copies.log == ["copy a.txt x3"]
    with pytest.raises(UserError, match=r"config.second.config.seed: 0 -> 1"):
        execute("runs.second.seed=1")


def test_a_pipeline_accepts_its_folder_after_a_configuration_gained_a_field(copies):
    with pytest.raises(KeyboardInterrupt):
        execute("runs.second.seed=9")
    copies.log.clear()
    copies.module.Config = dataclasses.make_dataclass("Copy", [("blur", float, 0.0)], bases=(Copy,), frozen=True)
    with pytest.raises(KeyboardInterrupt):
        execute("runs.second.seed=9")
    assert copies.log[-1] == "copy copy.txt x1" and "copy a.txt x1" not in copies.log


def test_a_moved_pipeline_goes_on(copies):
    with pytest.raises(KeyboardInterrupt):
        execute("runs.second.seed=9")
    shutil.move("out", "moved")
    with pytest.raises(KeyboardInterrupt):
        open_run("two.yaml", ["work_dir=moved", "runs.second.seed=9"]).execute(lambda _: None)
    assert not Path("out").exists()


def test_a_plan_of_a_pipeline_keeps_memory_shardings_and_notes(copies):
    plan = open_run("two.yaml").plan()
    assert plan.memory == (("first: file", 8.0), ("second: file", 8.0)) and len(plan.shardings) == 2
    assert plan.notes == ("first: a.txt", "second: @first/write/copy.txt")


def test_runs_without_their_dataset_or_extra_are_left_out_with_a_line_for_each_reason(copies, monkeypatch):
    Path("some.yaml").write_text(
        "kind: pipeline\nruns:\n  first: {kind: copy, source: a.txt}\n"
        "  second: {kind: copy, only_with: small, source: '@first/write/copy.txt'}\n"
        "  third: {kind: copy, only_with: small, source: '@second/write/copy.txt'}\n"
        "  fourth: {kind: copy, only_with: acdc, source: a.txt}\n"
    )
    lines: list[str] = []
    monkeypatch.setattr(efficientnet_lite, "PACKAGE", "a_package_that_is_not_installed")
    open_run("some.yaml", ["work_dir=out"]).execute(lines.append)
    assert lines[0].startswith("second, third: left out, EfficientNet-Lite0's weights are not installed; run pip")
    assert lines[1].startswith("fourth: left out, the dataset 'acdc' is not on this machine")
    assert not Path("out/second").exists() and not Path("out/fourth").exists()

    monkeypatch.setattr(efficientnet_lite, "PACKAGE", "package")
    (Path("package") / "models").mkdir(parents=True)
    (Path("package/__init__.py")).touch()
    (Path("package/models/efficientnet-lite0-1.pth")).touch()
    monkeypatch.syspath_prepend(".")
    execute(recipe="some.yaml")
    assert Path("out/third/write/copy.txt").read_text() == "a" and not Path("out/fourth").exists()


def test_a_pipeline_inside_a_pipeline_is_refused(copies):
    Path("outer.yaml").write_text("kind: pipeline\nruns:\n  inner: {base: two.yaml}\n")
    with pytest.raises(UserError, match=r"outer.yaml: runs.inner: a pipeline among runs; list its runs here"):
        open_run("outer.yaml")


def test_old_names_of_kinds_are_read(tmp_path):
    for old in kinds.OLD_NAMES:
        (tmp_path / f"{old}.yaml").write_text(f"kind: {old}\nwrong: 1\n")
        with pytest.raises(UserError, match="unknown key 'wrong'"):
            open_run(tmp_path / f"{old}.yaml")
    assert {"clip", "dino", "dinoiser", "vae", "latent_diffusion"} == set(kinds.OLD_NAMES)
