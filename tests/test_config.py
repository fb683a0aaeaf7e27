"""Configurations: order of sources, strictness, fingerprints."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from fmda.config import differences, fingerprint, from_dict, load, override, read_yaml, to_dict
from fmda.errors import UserError


@dataclass(frozen=True)
class Inner:
    rate: float = 1e-3
    kind: Literal["adamw", "sgd"] = "adamw"


@dataclass(frozen=True)
class Outer:
    steps: int
    name: str = "run"
    inner: Inner = field(default_factory=Inner)
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, float] = (1, 2.0)
    root: Path | None = None
    counts: dict[str, int] = field(default_factory=dict)


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_defaults_then_file_then_overrides(tmp_path):
    path = write(tmp_path, "steps: 5\ninner: {rate: 1e-4}\ncounts: {night: 3}\n")
    config = load(Outer, path, ["steps=7", "inner.kind=sgd", "sizes=[3, 4]", "root=some/where", "counts.fog=2"])
    assert config == Outer(
        7, inner=Inner(1e-4, "sgd"), sizes=(3, 4), root=Path("some/where"), counts={"night": 3, "fog": 2}
    )


def test_base_is_merged_one_level_deep(tmp_path):
    write(tmp_path, "steps: 1\ninner: {rate: 0.5}\n", "base.yaml")
    child = write(tmp_path, "base: base.yaml\ninner: {kind: sgd}\n")
    assert load(Outer, child) == Outer(1, inner=Inner(0.5, "sgd"))
    grandchild = write(tmp_path, "base: run.yaml\n", "third.yaml")
    with pytest.raises(UserError, match="may not have a base of its own"):
        read_yaml(grandchild)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nstpes: 2", "unknown key 'stpes'; did you mean 'steps'"),
        ("steps: 1\ninner: {rte: 2}", "unknown key 'inner.rte'; did you mean 'rate'"),
        ("name: x", "key 'steps' is missing"),
        ("steps: many", "steps: expected a whole number, got 'many'"),
        ("steps: true", "steps: expected a whole number"),
        ("steps: 1\ninner: {kind: adam}", "'adam' is none of the choices; did you mean 'adamw'"),
        ("steps: 1\nsteps: 2", "line 2: not valid YAML: key 'steps' stands twice"),
        ("steps: [1", "not valid YAML"),
        ("- 1\n- 2", "holds a list"),
        ("steps: 1\npair: [1]", "expected a list of 2 values"),
        ("steps: 1\nsizes: 3", "sizes: expected a list"),
    ],
)
def test_faults_are_one_line_naming_file_and_mend(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as fault:
        load(Outer, path)
    assert str(path) in str(fault.value) and "\n" not in str(fault.value)
    assert message in str(fault.value)


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, "steps: 1", "camvid.yaml")
    with pytest.raises(UserError, match=r"camvd\.yaml: no such configuration file; did you mean 'camvid.yaml'"):
        read_yaml(tmp_path / "camvd.yaml")


def test_override_needs_an_equals_sign():
    with pytest.raises(UserError, match="key.sub=value"):
        override({}, ["steps"])


def test_fingerprint_follows_values_not_spelling():
    same = from_dict(Outer, {"steps": 2, "inner": {"rate": 1}})
    assert fingerprint(same) == fingerprint(from_dict(Outer, {"inner": {"rate": 1.0}, "steps": 2.0}))
    assert fingerprint(same) != fingerprint(from_dict(Outer, {"steps": 3, "inner": {"rate": 1}}))
    assert to_dict(from_dict(Outer, to_dict(same))) == to_dict(same)


def test_differences_name_each_changed_key():
    old, new = Outer(1), Outer(2, inner=Inner(kind="sgd"))
    assert differences(old, new) == ["steps: 1 -> 2", "inner.kind: 'adamw' -> 'sgd'"]
    assert differences(old, old) == []
