"""Folders know what they hold, and accept configurations that only gained defaults."""

import dataclasses
import json
from dataclasses import dataclass, field

import pytest

from fmda.config import FREE
from fmda.errors import UserError
from fmda.runs.identity import claim


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1


@dataclass(frozen=True)
class Config:
    steps: int
    inner: Inner = Inner()
    log_every: int = field(default=25, metadata=FREE)


def test_a_new_folder_is_recorded_and_recognised(tmp_path):
    facts = {"config": Config(10), "weights": "abc"}
    assert claim(tmp_path / "run", facts) is False
    assert claim(tmp_path / "run", facts) is True
    assert json.loads((tmp_path / "run/identity.json").read_text())["config"] == {"steps": 10, "inner": {"rate": 0.1}}


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"config": Config(11), "weights": "abc"}, "config.steps: 10 -> 11"),
        ({"config": Config(10, Inner(0.2)), "weights": "abc"}, "config.inner.rate: 0.1 -> 0.2"),
        ({"config": Config(10), "weights": "abd"}, "weights: 'abc' -> 'abd'"),
        ({"config": Config(10)}, "weights: 'abc' -> '(none)'"),
    ],
)
def test_other_facts_are_refused_and_named(tmp_path, facts, named):
    claim(tmp_path, {"config": Config(10), "weights": "abc"})
    with pytest.raises(UserError, match=named.replace("(", r"\(").replace(")", r"\)")):
        claim(tmp_path, facts)


def test_free_values_may_change_at_any_depth(tmp_path):
    claim(tmp_path, {"runs": {"a": Config(10)}, "devices": 8}, free=("devices",))
    assert claim(tmp_path, {"runs": {"a": Config(10, log_every=1)}, "devices": 1}, free=("devices",))


def test_a_new_field_with_a_default_accepts_old_folders(tmp_path):
    claim(tmp_path, {"config": Config(10)})
    grown_inner = dataclasses.make_dataclass("Inner", [("rate", float, 0.1), ("blur", float, 0.0)], frozen=True)
    grown = dataclasses.make_dataclass(
        "Config", [("steps", int), ("inner", object, grown_inner()), ("crop", object, (1, 2))], frozen=True
    )
    assert claim(tmp_path, {"config": grown(10)})
    with pytest.raises(UserError, match="config.inner.blur: 0.0 -> 1.0"):
        claim(tmp_path, {"config": grown(10, grown_inner(blur=1.0))})
    with pytest.raises(UserError, match="config.crop"):
        claim(tmp_path, {"config": grown(10, crop=(1, 3))})
    # in a list too
    claim(tmp_path / "list", {"parts": (Inner(0.1), Inner(0.2))})
    assert claim(tmp_path / "list", {"parts": (grown_inner(0.1), grown_inner(0.2))})
    for other in ((grown_inner(0.1), grown_inner(0.3)), (grown_inner(0.1),), (grown_inner(0.1), grown_inner(0.2, 1.0))):
        with pytest.raises(UserError, match="parts"):
            claim(tmp_path / "list", {"parts": other})


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "identity.json").write_text("{")
    with pytest.raises(UserError, match="identity.json: damaged"):
        claim(tmp_path, {"config": Config(10)})
