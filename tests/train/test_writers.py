"""Metric files: what is written, what is cut off, what is refused."""

import json
import sys

import pytest

from fmda.errors import UserError
from fmda.train.writers import JsonLines, TensorBoard


def test_json_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, 0)
    lines.scalars(5, {"loss": 1.5, "odd": float("nan")}, {"seconds": 2.0})
    lines.scalars(5, {"eval/miou": 0.5}, {})
    lines.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 5, "loss": 1.5, "odd": None, "time": {"seconds": 2.0}},
        {"step": 5, "eval/miou": 0.5},
    ]


def test_opening_cuts_off_later_steps_and_broken_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 3}\nnonsense\n{"step": 2}\n[1]\n{"step": 2, "lo')
    JsonLines(path, 2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_tensorboard_writes_events(tmp_path):
    board = TensorBoard(tmp_path / "board", 0)
    board.scalars(1, {"loss": 2.0}, {"seconds": 1.0})
    board.close()
    (events,) = (tmp_path / "board").iterdir()
    assert b"loss" in events.read_bytes() and b"time/seconds" in events.read_bytes()


def test_missing_tensorboard_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match="pip install tensorboardX"):
        TensorBoard(tmp_path, 0)
