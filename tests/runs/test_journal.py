"""Lines on disk are whole, in order, and survive a kill at any byte."""

import math

import pytest

from fmda.errors import UserError
from fmda.runs.journal import Journal, read_rows


def test_rows_are_appended_and_read_again(tmp_path):
    with Journal(tmp_path / "log.jsonl") as journal:
        journal.append({"step": 1, "loss": math.nan}, {"step": 2, "name": "Straße"})
    assert read_rows(tmp_path / "log.jsonl") == [{"step": 1, "loss": None}, {"step": 2, "name": "Straße"}]


def test_a_torn_tail_is_cut_at_every_byte(tmp_path):
    path, whole = tmp_path / "log.jsonl", b'{"a": 1}\n{"a": 22}\n'
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        journal = Journal(path)
        assert journal.rows == [{"a": 1}, {"a": 22}][: whole[:length].count(b"\n")]
        journal.append({"a": 3})
        journal.close()
        assert read_rows(path) == journal.rows
        assert journal.rows[-1] == {"a": 3}


def test_rows_after_the_first_rejected_one_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 5}\n{"step": 2}\n')
    assert Journal(path, keep=lambda row: row["step"] <= 3).rows == [{"step": 1}]
    assert path.read_text() == '{"step": 1}\n'


def test_damage_inside_the_file_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_text("{}\nhalf\n{}\n")
    with pytest.raises(UserError, match="line 2"):
        Journal(tmp_path / "log.jsonl")
