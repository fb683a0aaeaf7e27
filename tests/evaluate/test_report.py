import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from fmda.errors import UserError
from fmda.evaluate import Segmenter, evaluate_dataset
from fmda.evaluate.charts import curves, heat_map
from fmda.evaluate.report import cell, percent, points, report
from fmda.evaluate.sections import Section, Table, read_sections, write_sections


@pytest.fixture
def run(segmenter, memory, tmp_path):
    """A run folder with two evaluations, curves, a section and a figure."""
    folder = tmp_path / "street-run"
    evaluate_dataset(segmenter, memory, out=folder / "host", keep=1)
    perfect = {e.image.tobytes(): np.where(e.labels == 255, 0, e.labels) for e in memory.examples}
    ours = Segmenter(lambda image: (perfect[image.tobytes()], None), segmenter.classes, "ours <b>", "perfect")
    evaluate_dataset(ours, memory, out=folder / "ours", keep=1)
    (folder / "config.yaml").write_text("kind: test\nconfig: {seed: 1}\n")
    for name in ("host", "ours"):
        versions = {"jax": "0.10.2"}
        record = {"fingerprint": "ab12", "seconds": 3.5, "versions": versions, "device": "cpu, 2 cores"}
        (folder / name / "stage.json").write_text(json.dumps(record))
    lines = [{"step": k, "loss": 1 / (k + 1), "time": {"examples_per_second": 20.0 + k}} for k in range(5)]
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 5, "lo'
    (folder / "train").mkdir()
    (folder / "train" / "metrics.jsonl").write_text(text)
    (folder / "figures").mkdir()
    Image.fromarray(np.full((4, 6, 3), 90, np.uint8)).save(folder / "figures" / "sheet.png")
    table = Table(("class", "entropy"), (("road", 1.0121), ("sky", None)))
    write_sections(folder / "ours", [Section("Class experts", "One.\n\nTwo & three.", table)])
    return folder


def test_page_holds_scores_differences_and_what_methods_added(run, tmp_path):
    page = report([run], tmp_path / "out" / "report.html", title="Streets").read_text()
    assert "<h1>Streets</h1>" in page
    assert "memory val, 6 images" in page
    assert ">100.00<" in page and "+" in page
    assert 'style="background:#4682b4"' in page
    assert "Class experts" in page and "<p>Two &amp; three.</p>" in page
    assert ">1.012<" in page and ">–<" in page
    assert "cpu, 2 cores" in page and "jax 0.10.2" in page and "kind: test" in page
    assert page.count("<figure>") == 5  # worst and best of two evaluations, and the sheet
    assert ">22<" in page  # median images/s of the training log


def test_page_is_one_valid_file_without_network_or_script(run, tmp_path):
    page = report([run], tmp_path / "report.html").read_text()
    assert "<script" not in page and "ours <b>" not in page and "ours &lt;b&gt;" in page
    shown = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r"(src|href)=\"(?!data:|#)", shown)
    assert "http" not in shown
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_same_input_gives_same_bytes(run, tmp_path):
    first = report([run], tmp_path / "a.html").read_bytes()
    assert report([run], tmp_path / "b.html").read_bytes() == first


def test_several_runs_are_told_apart(run, tmp_path):
    other = tmp_path / "other-run"
    shutil.copytree(run, other)
    page = report([run, other], tmp_path / "two.html").read_text()
    assert "street-run: threshold" in page and "other-run: threshold" in page
    assert page.count("<svg") > report([run], tmp_path / "one.html").read_text().count("<svg")


def test_folder_without_a_run_is_refused_and_nothing_written(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        with pytest.raises(UserError, match=folder):
            report([tmp_path / folder], tmp_path / "report.html")
    with pytest.raises(UserError, match="no run given"):
        report([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_damaged_scores_are_named(run, tmp_path):
    (run / "ours" / "scores.json").write_text('{"scores": {')
    with pytest.raises(UserError, match="scores.json: is no valid JSON"):
        report([run], tmp_path / "report.html")
    (run / "ours" / "scores.json").write_text('{"scores": {"names": ["a"], "miou": 1}}')
    with pytest.raises(UserError, match="no confusion counts"):
        report([run], tmp_path / "report.html")


def test_config_alone_is_enough(tmp_path):
    (tmp_path / "config.yaml").write_text("kind: x\n")
    assert "kind: x" in report([tmp_path], tmp_path / "report.html").read_text()


def test_several_scores_in_one_file(run, tmp_path):
    data = json.loads((run / "host" / "scores.json").read_text())
    (run / "host" / "scores.json").unlink()
    bare = {"first": data["scores"], "second": {"dataset": "memory", "scores": data["scores"]}}
    (run / "train" / "scores.json").write_text(json.dumps(bare))
    page = report([run], tmp_path / "report.html").read_text()
    assert "mIoU · first" in page and "mIoU · second" in page


def test_sections_round_trip_and_are_checked(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png")
    sections = [Section("A", "t", Table(("a", "b"), ((1, "x"), (None, 2.5))), "x.png"), Section("B")]
    write_sections(tmp_path, sections)
    assert read_sections(tmp_path) == sections
    with pytest.raises(UserError, match="1 cells for 2 columns"):
        write_sections(tmp_path, [Section("A", table=Table(("a", "b"), ((1,),)))])
    with pytest.raises(UserError, match=r"image y\.png is not in"):
        write_sections(tmp_path, [Section("A", image="y.png")])
    assert read_sections(tmp_path) == sections
    (tmp_path / "sections.json").write_text("[1]")
    with pytest.raises(UserError, match="no list of sections"):
        read_sections(tmp_path)


def test_numbers_as_text():
    assert [percent(0.12345), percent(float("nan")), percent(None)] == ["12.35", "–", "–"]
    assert [points(0.5, 0.4), points(0.4, 0.5), points(float("nan"), 0.5)] == ["+10.00", "−10.00", ""]
    assert [cell(1234567), cell(0.000123456), cell(None), cell("x")] == [
        "1\u2009234\u2009567",
        "0.0001235",
        "–",
        "x",
    ]


def test_heat_map_rows_are_shares_of_the_truth():
    svg = heat_map(np.array([[3, 1, 0], [0, 0, 0]]), ("road", "sky & more"))
    assert "road seen as sky &amp; more: 25.0 %" in svg
    assert svg.count("<rect") == 4
    assert heat_map(np.eye(60, dtype=int), [str(k) for k in range(60)]).count("<rect") == 1600


def test_curves_are_equal_for_equal_input_and_prefixed():
    lines = [("a", [0, 1, 2], [3.0, 2.0, 1.0]), ("b", [0, 1], [1.0, 2.0])]
    svg = curves(lines, "loss", "c7")
    assert svg == curves(lines, "loss", "c7")
    assert set(re.findall(r'id="(\w+)-', svg)) == {"c7"}
    assert "Date" not in svg and "<metadata" not in svg
