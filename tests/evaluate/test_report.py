import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from fmda.errors import UserError
from fmda.evaluate import Segmenter, evaluate_dataset
from fmda.evaluate.charts import curves, heat_map
from fmda.evaluate.confusion import Scores
from fmda.evaluate.report import cell, percent, points, report
from fmda.evaluate.runs import read_run
from fmda.evaluate.sections import Section, Table, read_sections, write_sections
from fmda.evaluate.summary import groups_of, outcome


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
    assert page.count("<figure>") == 3 and page.count('class="roll"') == 4  # two images by two models, and the sheet
    assert "void (not labelled)" in page and "1.012" in page
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
    with pytest.raises(UserError, match="name at least one run"):
        report([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_damaged_scores_are_named(run, tmp_path):
    (run / "ours" / "scores.json").write_text('{"scores": {')
    with pytest.raises(UserError, match="scores.json: not valid JSON"):
        report([run], tmp_path / "report.html")
    (run / "ours" / "scores.json").write_text('{"scores": {"names": ["a"], "miou": 1}}')
    with pytest.raises(UserError, match="no confusion counts"):
        report([run], tmp_path / "report.html")


def test_config_alone_is_enough(tmp_path):
    (tmp_path / "config.yaml").write_text("kind: x\n")
    assert "kind: x" in report([tmp_path], tmp_path / "report.html").read_text()


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
    with pytest.raises(UserError, match="not a list of sections"):
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
    assert "road predicted as sky &amp; more: 25.0 %" in svg
    assert svg.count("<rect") == 4
    assert heat_map(np.eye(60, dtype=int), [str(k) for k in range(60)]).count("<rect") == 1600


def test_curves_are_equal_for_equal_input():
    lines = [("a", [0, 1, 2], [3.0, 2.0, 1.0]), ("b", [0, 1], [1.0, 2.0])]
    svg = curves(lines, "loss")
    assert svg == curves(lines, "loss") and "Date" not in svg and svg.lstrip().startswith("<?xml")


def scored(folder, model, correct, dataset="street"):
    """Writes the scores of a model that gets `correct` of 100 pixels right; the second class is always right."""
    confusion = [[correct, 100 - correct], [0, 50]]
    scores = Scores.from_confusion(np.asarray(confusion), ("road", "sky")).to_json()
    folder.mkdir(parents=True)
    content = {"model": model, "dataset": dataset, "split": "val", "images": 3, "scores": scores}
    content |= {"palette": [[128, 64, 128], [70, 130, 180]], "examples": []}
    (folder / "scores.json").write_text(json.dumps(content))


@pytest.fixture
def hosts(tmp_path):
    """A run with two hosts; the second gains by FLOSS but stays below the first."""
    folder = tmp_path / "hosts"
    for name, host, floss in (("a", 90, 80), ("b", 50, 60)):
        scored(folder / name / "host", f"host-{name}", host)
        scored(folder / name / "floss", f"host-{name} + FLOSS", floss)
    record = {"fingerprint": "ab12", "outputs": {"step": 300, "reason": "most diverse"}}
    (folder / "stop").mkdir()
    (folder / "stop/stage.json").write_text(json.dumps(record))
    return folder


def test_equal_models_are_told_apart_by_their_runs(tmp_path):
    for name, correct in (("source-only", 50), ("adapted", 60)):
        scored(tmp_path / name / "score", "network", correct)
    for runs in ([tmp_path], [tmp_path / "source-only", tmp_path / "adapted"]):
        [group] = groups_of([e for run in runs for e in read_run(run).evaluations])
        assert sorted(group.labels) == ["adapted", "source-only"]


def test_a_method_is_compared_with_its_own_host(hosts, tmp_path):
    [group] = groups_of(read_run(hosts).evaluations)
    assert group.labels == ("host-a", "host-a + FLOSS", "host-b", "host-b + FLOSS")
    assert group.references == (0, 0, 0, 2)
    page = report([hosts], tmp_path / "report.html").read_text()
    gains = [round(100 * gain, 2) for gain in map(group.gain, range(1, 4))]
    assert gains[0] < 0 and gains[1] < 0 and gains[2] > 0
    assert f"+{gains[2]:.2f} to host-b" in page and f"+{gains[2]:.2f} to host-a" not in page
    assert "to host-b</th>" in page


def test_the_end_of_a_run_says_what_came_out(hosts):
    record = {"fingerprint": "ab12", "outputs": {"page": "report.html", "images": 7}}
    (hosts / "stage.json").write_text(json.dumps(record))
    title, *scores, images, chosen, page = outcome(hosts)
    assert title.split() == ["street", "val,", "3", "images", "mIoU"]
    assert [line.split("  ")[1] for line in scores] == ["host-a", "host-a + FLOSS", "host-b", "host-b + FLOSS"]
    assert scores[3].endswith("to host-b") and "+" in scores[3].split("FLOSS")[1]
    assert [images, chosen, page] == [
        "hosts: images 7", "stop: chosen step 300 (most diverse)", "report: report.html",
    ]  # fmt: skip


def test_ties_are_not_bold(tmp_path):
    for name in ("one", "two"):
        scored(tmp_path / "run" / name, name, 70)
    assert "bar best" not in report([tmp_path / "run"], tmp_path / "report.html").read_text()
    scored(tmp_path / "run" / "three", "three", 80)
    page = report([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert page.count("bar best") == 2  # both classes, since a miss is also an error of the other class


def test_long_tables_are_folded(hosts, tmp_path):
    for rows in (3, 30):
        write_sections(hosts, [Section("Experts", table=Table(("class",), (("road",),) * rows))])
        page = report([hosts], tmp_path / "report.html").read_text()
        assert ("<summary>class: 30 rows</summary>" in page) == (rows == 30)
