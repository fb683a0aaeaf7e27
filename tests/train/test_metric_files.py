"""Metric files: what is written, what is cut off, which line is the last one of training."""

import json
import sys

import pytest

from fmda.errors import UserError
from fmda.train import last_metrics
from fmda.train.metrics import MetricLog, TensorBoard


def test_lines_hold_values_and_times(tmp_path):
    log = MetricLog(tmp_path, 0)
    log.write(5, {"loss": 1.5, "odd": float("nan")}, {"seconds": 2.0})
    log.write(5, {"val/miou": 0.5})
    log.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 5, "loss": 1.5, "odd": None, "time": {"seconds": 2.0}},
        {"step": 5, "val/miou": 0.5},
    ]


def test_the_last_line_of_training_is_not_an_evaluation(tmp_path):
    assert last_metrics(tmp_path) == {}
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "val/miou": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert last_metrics(tmp_path) == lines[1]


def test_resuming_cuts_off_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 2, "lo')
    MetricLog(tmp_path, 2).close()
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
