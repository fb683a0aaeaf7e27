"""Kind `table`: cells in order, scores by hand, resume, gaps, references between rows."""

import dataclasses
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fmda.config import from_dict, override
from fmda.data.config import DataConfig
from fmda.errors import UserError
from fmda.evaluate import Segmenter
from fmda.evaluate.comparison import Comparison, Outcome
from fmda.evaluate.report import report
from fmda.methods import kinds
from fmda.methods import table as table_kind
from fmda.methods.kinds import open_run
from fmda.methods.table import Cell, Config, cell_values
from fmda.methods.uda.run import TargetConfig
from fmda.runs.stages import Stage

TABLE = """kind: table
runs:
  weights: {kind: cell, right: 0}
common: {kind: cell, right: 1, batch: 2, steps: 5, read: '@weights/made'}
rows:
  source only: {once: true, config: {right: 4}}
  adapted: {config: {read: '@source only/made', plus: 1}}
  labels: {scored: false, take: [kind, seed], config: {read: '@adapted/made', right: 0}}
  more: {config: {read: '@labels/made', plus: 3, dead: [sky]}}
columns:
  night: {config: {right: 4}, test: {name: folder, root: data, split: test}}
  fog: {config: {right: 3}, test: {name: folder, root: data, split: test}}
  far: {config: {}, only_with: acdc, test: {name: acdc, split: val}}
seeds: [0, 2]
"""


@dataclasses.dataclass(frozen=True)
class Toy:
    """A run whose network gets `right` + `plus` + `seed` of ten pixels right."""

    right: int
    plus: int = 0
    seed: int = 0
    read: Path | None = None
    batch: int = 1
    steps: int = 1
    dead: tuple[str, ...] = ()


def load(folder):
    right = json.loads((folder / "model.json").read_text())["right"]

    def forward(image):
        labels = np.zeros(image.shape[:2], np.uint8)
        labels[0, right:] = 1
        return labels, None

    classes = DataConfig(name="folder", root=Path("data"), split="test").open().classes
    return Segmenter(forward, classes, "cell", f"right {right}")


@pytest.fixture
def log(tmp_path, monkeypatch):
    """What the kind `cell` did, in the order of its runs, beside a data set of one image of ten pixels."""
    log: list[str] = []

    def stages(config):
        def train(folder, done):
            log.append(Path(folder).parent.relative_to(Path("out").absolute()).as_posix())
            assert config.read is None or (config.read / "stage.json").is_file()
            if Path("stop").is_file() and "more" in folder.parts:
                raise KeyboardInterrupt
            rows = [{"step": 1, "teacher/dead": len(config.dead), **{f"teacher/share/{d}": 0.0 for d in config.dead}}]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

        def export(folder, done):
            right = config.right + config.plus + config.seed
            (folder / "model.json").write_text(json.dumps({"loader": "fmda_cell:load", "right": right}))

        return [Stage("train", train, config), Stage("made", export, None, ("train",))]

    module = types.SimpleNamespace(
        Config=Toy, stages=stages, load=load, flops=lambda config: 3e9 * config.batch * config.steps
    )
    monkeypatch.setitem(sys.modules, "fmda_cell", module)
    monkeypatch.setitem(kinds.KINDS, "cell", ("fmda_cell", "cell"))
    loaded = Segmenter.load
    monkeypatch.setattr(Segmenter, "load", lambda source, **more: loaded(source, packages=("fmda_cell",), **more))
    monkeypatch.delenv("FMDA_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    for part in ("images", "labels"):
        (tmp_path / "data/test" / part).mkdir(parents=True)
    Image.fromarray(np.zeros((1, 10, 3), np.uint8)).save("data/test/images/a.png")
    Image.fromarray(np.zeros((1, 10), np.uint8)).save("data/test/labels/a.png")
    Path("data/classes.yaml").write_text("classes: [road, sky]\n")
    Path("table.yaml").write_text(TABLE)
    return log


def execute(*overrides):
    lines: list[str] = []
    open_run("table.yaml", ["work_dir=out", *overrides]).execute(lines.append)
    return lines


def table():
    return json.loads(Path("out/table/table.json").read_text())


def scores(right, plus, seeds=(0, 2)):
    """The mIoU of two classes, the second of which is never right."""
    return {str(seed): pytest.approx((right + plus + seed) / 20) for seed in seeds}


def test_a_table_trains_each_cell_once_and_scores_it(log):
    lines = execute()
    cells = [
        "cells/source only/{}", "cells/adapted/night/{}", "cells/adapted/fog/{}", "cells/labels/night/{}",
        "cells/labels/fog/{}", "cells/more/night/{}", "cells/more/fog/{}",
    ]  # fmt: skip
    assert log == ["weights", *(name.format(seed) for seed in (0, 2) for name in cells)]
    assert lines[0].startswith("column far: left out, the dataset 'acdc' is not on this machine")
    assert any(line.startswith("table: 1/14 cells, source only, seed 0: night 20.0, fog 20.0, ETA ") for line in lines)
    assert any(line.startswith("table: 14/14 cells, more, seed 2: fog 40.0") for line in lines)
    found = table()
    assert found["rows"] == ["source only", "adapted", "more"] and found["columns"] == ["night", "fog"]
    source, night, fog = (found["cells"][r][c] for r, c in (("source only", "fog"), ("more", "night"), ("more", "fog")))
    assert source["miou"] == scores(4, 0) and source["gain"] is None
    # 0.35 and 0.45 against 0.20 and 0.30
    assert night["miou"] == scores(4, 3) and night["mean"] == pytest.approx(0.4)
    assert (night["least"], night["most"]) == (pytest.approx(0.35), pytest.approx(0.45))
    assert night["gain"] == pytest.approx(0.15) and fog["gain"] == pytest.approx(0.1)
    assert night["dead"] == {"sky": 2} and night["seconds"] >= 0
    text = Path("out/table/table.md").read_text()
    assert "| more | 40.0 (35.0–45.0) +15.0 † | 35.0 (30.0–40.0) +10.0 † | 0:00 |" in text
    assert "† Classes without pseudo-labels" in text and "\n\nmore, fog: sky.\n" in text
    page = report(["out"], "page.html").read_text()
    assert "40.0 (35.0–45.0) +15.0 †" in page and "cells/more" not in page


def test_a_stopped_table_keeps_what_is_finished_and_goes_on(log):
    Path("stop").touch()
    with pytest.raises(KeyboardInterrupt):
        execute()
    Path("stop").unlink()
    text = Path("out/table/table.md").read_text()
    assert "| source only | 20.0 (1 of 2 seeds) | 20.0 (1 of 2 seeds) |" in text
    assert "| adapted | 25.0 (1 of 2 seeds) +5.0 | 20.0 (1 of 2 seeds) +0.0 |" in text
    assert "| more | – | – | – |" in text and table()["cells"]["more"]["night"] is None
    log.clear()
    execute()
    assert log[:3] == ["cells/more/night/0", "cells/more/fog/0", "cells/source only/2"] and len(log) == 9
    log.clear()
    lines = execute()
    assert log == [] and sum("finished before" in line for line in lines) == len(lines) - 3


def test_rows_columns_and_seeds_may_be_added(log):
    execute("seeds=[0]")
    log.clear()
    execute("rows.less={config: {right: 0}}", "columns.fog.rows.less={plus: 1}", "seeds=[0, 2, 5]", "baseline=adapted")
    assert log[:3] == ["cells/less/night/0", "cells/less/fog/0", "cells/source only/2"]
    # 0.05 and 0.15 and 0.3 against 0.2 and 0.3 and 0.45
    assert table()["cells"]["less"]["fog"]["gain"] == pytest.approx(-0.15)
    with pytest.raises(UserError, match=r"cells/adapted/night/0: made from other inputs or settings \(.*plus: 1 -> 7"):
        execute("rows.adapted.config.plus=7")


def test_one_image_of_the_target_by_seed():
    column = "columns={n: {config: {target: {name: camvid}}, images: [000001, b], test: data}}"
    values = override({}, ["common={target: {split: all}}", "seeds=[4, 5, 6]", column])
    rows = {"a": {"config": {"target": {"only": ["{image}"]}, "look": "@b/{image}.png"}}, "b": {}}
    config = from_dict(Config, values | {"rows": rows})
    cells = [cell_values(config, Cell("a", "n", seed), "here") for seed in (4, 5, 6)]
    assert [cell["target"]["only"] for cell in cells] == [["000001"], ["b"], ["000001"]]
    assert cells[1]["look"] == "@cells/b/n/5/b.png"
    # whichever other seeds run beside it
    alone = cell_values(dataclasses.replace(config, seeds=(5,)), Cell("a", "n", 5), "here")
    assert alone["target"]["only"] == ["b"]
    assert from_dict(TargetConfig, cells[0]["target"]) == TargetConfig(name="camvid", split="all", only=("000001",))


def test_rows_and_columns_may_be_left_out(log):
    execute("rows.labels=null", "rows.more=null", "columns.fog=null")
    assert log == ["weights", *(f"cells/{name}/{k}" for k in (0, 2) for name in ("source only", "adapted/night"))]


def test_a_row_may_be_left_out_of_a_column(log):
    # what a column says of a row goes with it
    execute(
        "rows.labels=null", "rows.more=null", "columns.night.rows.more={}", "columns.fog.rows.adapted=null", "seeds=[0]"
    )
    assert log == ["weights", "cells/source only/0", "cells/adapted/night/0"]
    assert table()["cells"]["adapted"]["fog"] is None
    plan = open_run("table.yaml", ["columns.fog=null", "columns.night.rows.more=null"]).plan()
    assert [name for name, _ in plan.stages] == ["weights", "source only", "adapted", "labels"]


def test_a_plan_counts_the_cells(log):
    plan = open_run("table.yaml", ["work_dir=out"]).plan()
    assert ("adapted", "4 cells: night, fog; 2 seeds") in plan.stages and plan.stages[0][0] == "weights"
    assert ("more, 4 cells", 4 * 3e9 * 2 * 5) in plan.flops
    # rows without the common settings have batch 1 and one step
    assert plan.flops[-1] == ("all cells", (2 + 4 + 4) * 3e9 * 10 + 4 * 3e9)
    assert not Path("out").exists()


def test_the_comparison_of_adaptation_is_valid(monkeypatch):
    monkeypatch.setattr(table_kind, "absent", lambda wanted: None)
    recipe = Path(__file__).parents[2] / "configs/tables/adaptation.yaml"
    stages = {stage.name: stage for stage in open_run(recipe, ["rows.mmd=null"]).stages()}
    cell = stages["cells/pseudo-labels/night/1"]
    assert cell.inputs == ("cells/labels/night/1", "cells/start/1", "held", "training")
    assert cell.config["config"].val.split == "night" and "cells/source only/0/test-night" in stages
    assert not any("mmd/" in name and "one-shot" not in name for name in stages)
    assert stages["cells/one-shot dacs/fog/2"].config["config"].target.only == ("000002",)
    one = stages["cells/one-shot pseudo-labels/fog/2"]
    assert one.inputs[0] == "cells/one-shot labels/fog/2" and not one.config["config"].target.only
    labelled = stages["cells/one-shot labels/fog/2"].config["config"].data
    assert (labelled.split, labelled.only) == ("fog", ("000002",))
    # DATUM's one picture is that of the one-shot rows
    image = stages["cells/personalise/fog/2"].config["config"].image
    assert str(image) == "@training/render/fog/images/000002.png" and "cells/datum/kitti/0" not in stages
    assert stages["cells/datum/fog/2"].inputs == ("cells/generate/fog/2", "cells/start/2", "held", "training")
    # photographs are not looked for among rendered scenes
    configs = [config for config in map(trained, stages.values()) if config and config.target]
    for data in (data for config in configs for data in (config.target, config.val)):
        assert data.name in ("world", "folder") or data.root is None
    # every row is scored on the part that it neither trains on nor is validated on
    tests = [stage.config["test"] for name, stage in stages.items() if "/test-" in name]
    assert {(test.name, str(test.root), test.split) for test in tests if test.name == "world"} == {
        ("world", "@test/render", split) for split in ("night", "fog")
    }


def test_the_comparison_on_camvid_reads_no_street_world(monkeypatch):
    monkeypatch.setattr(table_kind, "absent", lambda wanted: None)
    stages = open_run(Path(__file__).parents[2] / "configs/tables/camvid-dusk.yaml").stages()
    assert stages[0].name == "cells/start/0" and stages[0].inputs == ()
    used = {(c.data.split, c.target.split, c.val.split) for c in map(trained, stages) if c and c.target}
    assert used == {("train-day", "train-dusk", "train-dusk"), ("train-day", "train", "train-dusk")}
    tests = {stage.config["test"].split for stage in stages if "/test-" in stage.name}
    assert tests == {"test-dusk"}


def test_datum_of_three_photographs_is_a_table():
    stages = {s.name: s for s in open_run(Path(__file__).parents[2] / "configs/tables/datum-gta5.yaml").stages()}
    images = [stages[f"cells/personalise/cityscapes/{seed}"].config["config"].image for seed in range(3)]
    assert len(set(images)) == 3 and images[0].endswith("train/aachen/aachen_000000_000019_leftImg8bit.png")
    datum = stages["cells/datum/cityscapes/2"]
    assert datum.inputs == ("cells/generate/cityscapes/2",) and datum.config["config"].seed == 0
    assert stages["cells/generate/cityscapes/2"].inputs == ("cells/personalise/cityscapes/2",)
    alone = stages["cells/source only/0"].config["config"]
    assert dataclasses.replace(datum.config["config"], target=None, learn=alone.learn) == alone


def trained(stage):
    kind = stage.config["kind"] if stage.config and "kind" in stage.config else None
    return stage.config["config"] if kind == "uda" else None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rows.adapted.config.read=@later/made", "'@later/made' names no earlier run"),
        ("rows.source only.config.read=@adapted/made", "rows.source only: is trained once, but '@adapted/made'"),
        ("rows.a/b={}", "'a/b' is a folder of the table; name it without '/'"),
        ("rows.weights={}", "rows.weights: a run has this name too"),
        ("baseline=sorce only", "baseline: 'sorce only' is no scored row; did you mean 'source only'?"),
        ("rows.adapted.config.rihgt=1", "unknown key 'rihgt'; did you mean 'right'?"),
        ("rows.adapted.conf=1", "unknown key 'rows.adapted.conf'; did you mean 'config'?"),
        ("columns.night.config=dark", "columns.night.config: expected a group of keys"),
        ("columns.night.test.root=nowhere", "columns.night.test: .*nowhere"),
        ("columns.fog.rows.mor={}", "columns.fog.rows: 'mor' is no row; did you mean 'more'?"),
        ("rows.adapted.config.read='{image}'", "'{image}' needs an image, but columns.night.images names none"),
        ("rows.source only.config.read='{image}'", "'{image}' needs an image, but a row trained once has no target"),
        ("seeds=[]", "rows, columns and seeds each need one entry at least"),
    ],
)
def test_faults_are_named_before_the_first_cell(log, override, message):
    with pytest.raises(UserError, match=message):
        execute(override)
    assert log == [] and not Path("out").exists()


def test_gains_compare_the_same_seeds():
    outcomes = {("s", "c", 0): 0.2, ("s", "c", 1): 0.4, ("m", "c", 1): 0.5, ("m", "c", 2): 0.9}
    comparison = Comparison(
        ["s", "m"], ["c", "d"], [0, 1, 2], "s", {key: Outcome(score, 60.0) for key, score in outcomes.items()}
    )
    summary = comparison.summary("m", "c")
    assert summary.gain == pytest.approx(0.1) and summary.mean == pytest.approx(0.7)
    assert "| m | 70.0 (50.0–90.0, 2 of 3 seeds) +10.0 | – | 1:00 |" in comparison.markdown()
    lost = Comparison(["s", "m"], ["c"], [1], "s", {("s", "c", 1): Outcome(0.4, 1), ("m", "c", 1): Outcome(0.35, 1)})
    assert "35.0 −5.0" in lost.markdown()
