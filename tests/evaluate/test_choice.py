"""Choice of a checkpoint without labels, and the alarm for dead classes, with their sections of the report."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from fmda.evaluate import DeadClasses
from fmda.evaluate.choice import checkpoint_choices, choice_sections
from fmda.evaluate.dead_classes import dead_class_sections
from fmda.evaluate.report import report
from fmda.evaluate.runs import read_run

SND, CERTAINTY, MIOU = [1.0, 2.0, 3.0, 4.0], [0.9, 0.8, 0.7, 0.6], [0.3, 0.4, 0.5, 0.45]
ROWS = [
    {"step": 10 * (k + 1), "loss": 1.0, "val/miou": MIOU[k], "target/snd": SND[k], "target/certainty": CERTAINTY[k],
     "target/coverage": 1.0}
    for k in range(4)
]  # fmt: skip


def test_choices_by_hand():
    choices = checkpoint_choices([{"step": 5, "loss": 2.0}, *ROWS, {"step": 50, "target/snd": 9.0}], "val/miou")
    # ranks of the mIoU 1, 2, 4, 3: 1 - 6 * 2 / (4 * 15)
    assert [(c.score, c.step, c.truth, c.evaluations) for c in choices] == [
        ("target/snd", 40, 0.45, 4),
        ("target/certainty", 10, 0.3, 4),
        ("target/coverage", 10, 0.3, 4),
        ("last", 40, 0.45, 4),
        ("oracle", 30, 0.5, 4),
    ]
    assert [c.correlation for c in choices] == pytest.approx([0.8, -0.8, *[np.nan] * 3], nan_ok=True)


def test_runs_with_one_kind_of_score_alone_have_no_section():
    assert choice_sections([{"step": 1, "val/miou": 0.5}], "") == []
    assert choice_sections([{"step": 1, "target/snd": 0.5}], "") == []


def test_two_evaluations_choose_but_have_no_correlation():
    snd, *_, oracle = checkpoint_choices(ROWS[:2], "val/miou")
    assert np.isnan(snd.correlation) and snd.step == oracle.step == 20


def test_dead_classes_are_counted_and_named(capsys):
    evaluator = DeadClasses("teacher", 100, ("road", "train", "sky"), lambda state: state.aux["shares"])
    state = SimpleNamespace(aux={"shares": np.array([0.7, 2e-6, 0.3], np.float32)})
    values = dict(evaluator.run(state))
    assert (evaluator.name, evaluator.every, values["dead"]) == ("teacher", 100, 1)
    assert values["share/road"] == pytest.approx(0.7)
    assert capsys.readouterr().err == "warning: teacher: classes without pseudo-labels: train\n"
    state.aux["shares"][1] = 0.1
    assert dict(evaluator.run(state))["dead"] == 0 and capsys.readouterr().err == ""


def alarm(step, **shares):
    return {"step": step, "teacher/dead": 0, **{f"teacher/share/{name}": share for name, share in shares.items()}}


def test_a_class_is_dead_since_the_last_step_with_labels():
    rows = [alarm(1, road=1.0, train=0.0, bus=0.0), alarm(2, road=0.9, train=0.1, bus=0.0)]
    rows += [alarm(3, road=1.0, train=0.0, bus=0.0), alarm(4, road=1.0, train=1e-6, bus=0.0)]
    (section,) = dead_class_sections(rows)
    assert section.table.rows == (("train", 3, 1e-6), ("bus", 1, 0.0))
    assert dead_class_sections(rows[:1] + [alarm(5, road=0.5, train=0.4, bus=0.1)]) == []


def test_the_report_shows_both_tables(tmp_path):
    train = tmp_path / "run" / "train"
    train.mkdir(parents=True)
    rows = [row | alarm(row["step"], road=1.0, train=0.0) for row in ROWS]
    (train / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    titles = [section.title for _, section in read_run(tmp_path / "run").sections]
    assert titles == ["Warning: dead classes", "Checkpoint choice without labels"]
    page = report([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert "over the evaluations of train" in page and "val/miou there, %" in page
    charts = page[page.index('id="curves"') :]
    assert charts.index('alt="val/miou"') < charts.index('alt="teacher/share/road"')
