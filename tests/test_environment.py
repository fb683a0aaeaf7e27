"""Caches and devices as the environment names them; the command line's reaction to them."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tyro.conf import Positional

import fmda
from fmda import cli, environment
from fmda.errors import UserError


@pytest.fixture
def no_jax(monkeypatch):
    """An environment in which nothing is known and jax is not loaded; its variables come back afterwards."""
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    monkeypatch.delitem(sys.modules, "jax")
    return monkeypatch


def test_the_cache_lies_where_the_environment_says(no_jax, tmp_path):
    no_jax.setattr(Path, "home", lambda: tmp_path)
    assert environment.cache_folder() == tmp_path / ".cache" / "fmda"
    os.environ["XDG_CACHE_HOME"] = str(tmp_path / "xdg")
    assert environment.cache_folder() == tmp_path / "xdg" / "fmda"
    os.environ["FMDA_CACHE"] = str(tmp_path / "own")
    assert environment.cache_folder() == tmp_path / "own"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_large_blocks_that_are_freed_are_kept():
    program = (
        "import resource; from fmda.environment import keep_freed_memory\n"
        "{}\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "b'1' * 2**27; before = faults(); [len(b'1' * n) for n in (2**27, 2**26, 2**27)]; print(faults() - before)"
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}

    def counted(call):
        command = [sys.executable, "-c", program.format(call)]
        return int(subprocess.run(command, env=own, check=True, capture_output=True).stdout)

    plain, kept = counted(""), counted("keep_freed_memory()")
    # of 128 MB in pages of 4 KiB each time, unless the system gives larger pages
    assert kept < plain / 10


def test_tilde_in_the_cache_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FMDA_CACHE", "~/c")
    assert environment.cache_folder() == tmp_path / "c"


def test_without_a_home_folder_there_is_no_cache(no_jax):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    no_jax.setattr(Path, "home", unknown)
    assert environment.cache_folder() is None
    environment.keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_compiled_programs_are_kept_unless_another_folder_is_named(no_jax, tmp_path):
    os.environ["FMDA_CACHE"] = str(tmp_path / "c")
    environment.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "c" / "jax") and (tmp_path / "c/jax").is_dir()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = "other"
    environment.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "other"


def test_a_folder_that_cannot_be_made_keeps_nothing(no_jax, tmp_path):
    (tmp_path / "c").write_text("a file")
    os.environ["FMDA_CACHE"] = str(tmp_path / "c")
    environment.keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


@pytest.mark.parametrize("raised", [AssertionError(), RuntimeError("Unable to initialize backend 'cpuu'")])
def test_unusable_platforms_are_one_line_that_names_the_variable(monkeypatch, capsys, raised):
    def devices():
        raise raised

    monkeypatch.setattr(jax, "devices", devices)
    assert environment.platform_fault() is None or "JAX_PLATFORMS" in os.environ
    monkeypatch.setenv("JAX_PLATFORMS", "cpuu")
    monkeypatch.setitem(cli.VERBS, "report", devices)
    with pytest.raises(SystemExit) as ended:
        cli.main(["report"])
    [line] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("fmda: JAX_PLATFORMS=cpuu: cannot be used on this machine")


def test_other_errors_keep_their_traceback(monkeypatch):
    def broken():
        raise RuntimeError("a fault of the program")

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setitem(cli.VERBS, "report", broken)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        cli.main(["report"])


def test_the_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"fmda {fmda.__version__}\n"


@pytest.mark.parametrize("asked", [False, True])
def test_a_traceback_shows_the_hidden_cause_if_asked_for(monkeypatch, capsys, asked):
    def refuse():
        try:
            int("x")
        except ValueError:
            raise UserError("count: not a number; fix the value") from None

    monkeypatch.setitem(cli.VERBS, "report", refuse)
    if asked:
        monkeypatch.setenv("FMDA_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        cli.main(["report"])
    err = capsys.readouterr().err
    assert err.endswith("fmda: count: not a number; fix the value\n")
    assert ("invalid literal for int()" in err) == asked


def test_paths_of_the_command_line_know_the_home_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    calls = []

    def report(runs: Positional[tuple[Path, ...]], out: Path = Path("report.html")) -> None:
        calls.append((runs, out))

    monkeypatch.setitem(cli.VERBS, "report", report)
    cli.main(["report", "~/run", "other", "--out=~/page.html"])
    assert calls == [((tmp_path / "run", Path("other")), tmp_path / "page.html")]
    with pytest.raises(SystemExit):
        cli.main(["plan", str(Path(__file__).parents[1] / "configs/demo.yaml"), "~n"])
    assert "'~n': an override reads key.sub=value" in capsys.readouterr().err


def test_a_start_says_at_once_that_it_loads_at_a_terminal_alone(tmp_path):
    (tmp_path / "run.yaml").write_text("kind: nothing\n")
    command = [sys.executable, "-m", "fmda", "plan", str(tmp_path / "run.yaml")]
    environment = os.environ | {"FMDA_CACHE": str(tmp_path)}
    piped = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "kind 'nothing' is unknown" in piped.stderr and piped.stderr.count("\n") == 1
    ours, terminal = pty.openpty()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=terminal, env=environment)
    os.close(terminal)
    assert os.read(ours, 4096).startswith(b"loading jax ...")


def test_64_bits_are_refused_before_jax_starts(monkeypatch, capsys):
    monkeypatch.setenv("JAX_ENABLE_X64", "0")
    environment.check_precision()
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    monkeypatch.setattr("sys.argv", ["fmda", "run", "none.yaml"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "fmda: JAX_ENABLE_X64: fmda computes in 32 bits; unset the variable\n"


@pytest.mark.parametrize(("name", "starts_jax"), [("load_clip", True), ("Segmenter", True), ("UserError", False)])
def test_library_names_that_start_jax_keep_compiled_programs(monkeypatch, name, starts_jax):
    calls = []
    monkeypatch.setattr(environment, "keep_compiled_programs", lambda: calls.append(name))
    assert getattr(fmda, name)
    assert calls == [name] * starts_jax


def test_predict_without_images_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["predict", "run"])
    assert ended.value.code == 2 and "predict: no image named; give image files" in capsys.readouterr().err
