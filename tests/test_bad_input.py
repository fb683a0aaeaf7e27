"""Every kind of bad input through the real command line: exit code 2, one line with the mend, nothing overwritten."""

import ctypes
import json
import os
import re
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from small_place import make_place

from fmda import cli

WEIGHTS = "model.safetensors"
RUN, CLIP, WORLD = "run floss.yaml work_dir=new", "run clip.yaml work_dir=new", "run world.yaml work_dir=new"
PLAN = "plan floss.yaml"
SCORE = "run floss.yaml work_dir=new ranking.file=ranking.json"
"""Reads the ranking, so that the labelled pictures come first."""
EVALUATE = "evaluate done folder --root data --out new"
PREDICT = "predict done data/val/images --out new"
CHECK, VERIFY, CONVERT = "data check folder --root data", "models check clip", "convert clip new"
PROGRESS = re.compile(r"  |\[\d/\d\] |(rank|evaluate|encode|predict|check|captions|render|clip|zero-shot)\b")


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    """The place with a finished run `done` and its `ranking.json`."""
    folder = tmp_path_factory.mktemp("pristine")
    make_place(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("FMDA_CACHE", str(folder.parent / "cache"))
        cli.main("run floss.yaml work_dir=done".split())
    shutil.copy(folder / "done/rank/ranking.json", folder)
    return folder


@pytest.fixture
def place(pristine, tmp_path, monkeypatch):
    """A copy of the place, which the test may damage, as working directory."""
    monkeypatch.setenv("FMDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(shutil.copytree(pristine, tmp_path / "place"))
    return Path()


def content(folder):
    """Returns {path: bytes, or None for a folder} of everything in a folder."""
    return {p: None if p.is_dir() else p.read_bytes() for p in sorted(folder.rglob("*"))}


def fails(capsys, command, *fragments, around=()):
    """Runs a command that must exit with 2 and one line that holds the fragments; returns its stdout."""
    capsys.readouterr()
    before = content(Path())
    with pytest.raises(SystemExit) as ended:
        cli.main(command.split() if isinstance(command, str) else command)
    out, err = capsys.readouterr()
    *progress, line = err.splitlines()
    assert ended.value.code == 2 and line.startswith("fmda: "), err
    assert all(fragment in line for fragment in fragments), line
    assert re.search(r"[;,] |: known", line), f"no mend in: {line}"
    assert all(PROGRESS.match(other) for other in progress), err
    assert not [p for p in before if p not in content(Path())]
    after = content(Path())
    assert {p: after[p] for p in before} == before
    assert not [p for p in after if ".part" in p.name]
    return out, [p for p in after if p not in before]


def png(path, values):
    return lambda: Image.fromarray(np.asarray(values)).save(path)


def cut(path):
    return lambda: os.truncate(path, Path(path).stat().st_size - 30)


def write(path, text):
    return lambda: Path(path).write_text(text)


def remove(path):
    return lambda: Path(path).unlink()


def empty(folder):
    return lambda: [path.unlink() for path in Path(folder).iterdir()]


def weights(change):
    def damage():
        arrays = load_file(f"clip/{WEIGHTS}")
        change(arrays)
        save_file(arrays, f"clip/{WEIGHTS}")

    return damage


def foreign_ranking():
    ranking = json.loads(Path("ranking.json").read_text())
    ranking["classes"] = {"cat": ranking["classes"]["car"]}
    Path("ranking.json").write_text(json.dumps(ranking))


def nothing():
    pass


LABEL = "data/val/labels/1.png"
SCENE_LABEL = "scenes/labels/000002.png"
SCORERS = [SCORE, EVALUATE, CHECK]
LOADERS = [RUN, EVALUATE, PREDICT, CONVERT, VERIFY]
# item -> (how the place is damaged, what the line must hold, the commands that must say so)
CASES = {
    "missing data folder": (nothing, ["nowhere: no such folder", "root="], [
        f"{RUN} data.root=nowhere", "evaluate done folder --root nowhere", "data check folder --root nowhere"]),
    "missing pictures": (nothing, ["nowhere: no such file or folder"], ["predict done nowhere --out new"]),
    "missing scenes": (nothing, ["nowhere/captions.jsonl: not found"], [f"{CLIP} data=[nowhere]"]),
    "missing run": (nothing, ["nowhere: no such run folder"], [
        "predict nowhere data/val/images --out new", "evaluate nowhere folder --root data", "report nowhere"]),
    "missing checkpoint": (nothing, ["nowhere: no such folder"], [
        f"{RUN} clip=nowhere", f"{PLAN} clip=nowhere", "models check nowhere", "convert nowhere new"]),
    "missing configuration": (nothing, ["flos.yaml: no such configuration file; did you mean 'floss.yaml'"], [
        "run flos.yaml", "plan flos.yaml"]),
    "wrong data folder": (nothing, ["clip: no images of 'folder'", "looked for"], [
        f"{RUN} data.root=clip", "evaluate done folder --root clip", "data check folder --root clip"]),
    "wrong run folder": (nothing, ["words: holds no model.json"], [
        "predict words data/val/images --out new", "evaluate words folder --root data"]),
    "wrong run folder in a report": (nothing, ["words: holds no run"], ["report done words"]),
    "wrong checkpoint folder": (nothing, ["data: holds no weights"], [
        f"{RUN} clip=data", "models check data", "convert data new"]),
    "a file for a folder": (nothing, ["ranking.json"], [
        "run world.yaml work_dir=ranking.json", "data render ranking.json", "convert clip ranking.json",
        "predict done data/val/images --out ranking.json", "report done --out ranking.json/page.html",
        "evaluate done folder --root data --out ranking.json"]),
    "empty set": (empty("data/val/images"), ["data: no images of 'folder', split 'val'"], [RUN, EVALUATE, CHECK]),
    "empty folder of pictures": (empty("data/val/images"), ["data/val/images: holds no image"], [PREDICT]),
    "empty scenes": (write("scenes/captions.jsonl", ""), ["scenes: no pictures"], [CLIP]),
    "truncated PNG": (cut("data/val/images/1.png"), ["data/val/images/1.png: truncated or damaged"], [
        SCORE, EVALUATE, PREDICT]),
    "truncated PNG to rank": (cut("data/train/images/1.png"), ["data/train/images/1.png: truncated"], [RUN]),
    "truncated scene": (cut("scenes/images/000002.png"), ["scenes/images/000002.png: missing or trunc"], [CLIP]),
    "16-bit label": (png(LABEL, np.zeros((32, 48), np.uint16)), [f"{LABEL}: a 16-bit label map"], SCORERS[:2]),
    "RGB label": (png(LABEL, np.zeros((32, 48, 3), np.uint8)), [f"{LABEL}: a colour picture (RGB)"], SCORERS[:2]),
    "label value 37": (png(LABEL, np.full((32, 48), 37, np.uint8)), [f"{LABEL}: label value 37 is"], SCORERS[:2]),
    "16-bit scene label": (png(SCENE_LABEL, np.zeros((32, 64), np.uint16)), [f"{SCENE_LABEL}: a 16-bit"], [CLIP]),
    "RGB scene label": (png(SCENE_LABEL, np.zeros((32, 64, 3), np.uint8)), [f"{SCENE_LABEL}: a colour"], [CLIP]),
    "scene label value 37": (png(SCENE_LABEL, np.full((32, 64), 37, np.uint8)), [f"{SCENE_LABEL}: label value 37"],
        [CLIP]),
    "image without label": (remove(LABEL), ["data/val/images/1.png: image without label"], [RUN, EVALUATE]),
    "scene without label": (remove(SCENE_LABEL), [f"{SCENE_LABEL}: missing"], [CLIP]),
    "damaged captions": (write("scenes/captions.jsonl", '{"name"'), ["scenes/captions.jsonl, line 1: "], [CLIP]),
    "class list with a duplicate": (write("data/classes.yaml", "classes: [road, car, road]"),
        ["data/classes.yaml: class 'road' stands twice"], [*SCORERS, f"{PLAN} classes=data/classes.yaml"]),
    "template without a slot": (write("t.txt", "a photo of a {}.\na photo of a road.\n"),
        ["t.txt: template 1 'a photo of a road.' needs exactly one slot {}"], [
        f"{RUN} templates=t.txt", f"{PLAN} templates=t.txt"]),
    "ranking for other classes": (foreign_ranking, ["ranking.json: ranks other classes (cat", "road"], [SCORE]),
    "one key missing": (weights(lambda a: a.pop("text_projection.weight")),
        ["1 missing: text_projection.weight", f"clip/{WEIGHTS}"], LOADERS[:-1]),
    "one key too many": (weights(lambda a: a.update({"vision_model.extra.weight": np.zeros(3, np.float32)})),
        ["1 not known to the model: vision_model.extra.weight", f"clip/{WEIGHTS}"], LOADERS[:-1]),
    "one wrong shape": (weights(lambda a: a.update({"visual_projection.weight": np.zeros((15, 16), np.float32)})),
        ["visual_projection.weight is [15, 16] but should be [16, 16]", f"clip/{WEIGHTS}"], LOADERS[:-1]),
    "pickle": (lambda: Path(f"clip/{WEIGHTS}").rename("clip/pytorch_model.bin"),
        ["clip/pytorch_model.bin: a torch pickle can run code", "convert it once with"], LOADERS),
    "YAML with a typo": (write("floss.yaml", "kind: floss\nclip: clip\nhosst: {name: maskclip}\n"),
        ["floss.yaml: unknown key 'hosst'; did you mean 'host'?"], ["run floss.yaml", PLAN]),
    "YAML that is none": (write("floss.yaml", "kind: floss\nclip: [clip\n"), ["floss.yaml, line 3: not valid YAML"], [
        "run floss.yaml", PLAN]),
    "typo in an override": (nothing, ["unknown key '", "did you mean '"], [
        "run floss.yaml dat.root=data", "plan clip.yaml crops.size=3", "data render new heigth=64",
        "demo --work-dir new runs.held.heigth=64", "demo --work-dir new runs.maskclip-night.data.rot=x"]),
    "work folder of another configuration": (nothing, ["done: holds a run of another configuration (", "work_dir="], [
        "run floss.yaml n=2 work_dir=done", "run clip.yaml work_dir=done", "run world.yaml work_dir=done",
        "demo --work-dir done"]),
    "work folder that is none": (nothing, ["data: is not empty and no run of ours", "work_dir="], [
        "run floss.yaml work_dir=data", "demo --work-dir data"]),
    "output of something else": (nothing, ["done/host: holds another evaluation"], [
        "evaluate done folder --root data --split train --out done/host"]),
    "output that is there": (nothing, ["clip: is there already"], ["convert clip clip"]),
    "predictions that are there": (lambda: shutil.copytree("data/val/labels", "new"), ["0.png: exists already"], [PREDICT]),
    "pictures of another configuration": (nothing, ["scenes: holds pictures of another", "choose another"], []),
}  # fmt: skip


@pytest.mark.parametrize(("item", "command"), [(item, c) for item, case in CASES.items() for c in case[2]])
def test_one_line_and_nothing_overwritten(place, capsys, item, command):
    damage, fragments, _ = CASES[item]
    damage()
    _, new = fails(capsys, command, *fragments)
    assert {path.parts[0] for path in new} <= {"new"}
