"""Every kind of bad input through the real command line: exit code 2, one line with the mend, nothing overwritten."""

import ctypes
import json
import os
import re
import shlex
import shutil
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from full_disk import full_disk
from PIL import Image
from safetensors.numpy import load_file, save_file
from small_place import make_place

from fmda import cli

WEIGHTS = "model.safetensors"
RUN, CLIP, WORLD = "run floss.yaml work_dir=new", "run clip.yaml work_dir=new", "run world.yaml work_dir=new"
UDA = "run uda.yaml work_dir=new"
PLAN = "plan floss.yaml"
SCORE = "run floss.yaml work_dir=new ranking.file=ranking.json"
"""Reads the ranking, so that the labelled pictures come first."""
EVALUATE = "evaluate done folder --root data --out new"
PREDICT = "predict done data/val/images --out new"
CHECK, VERIFY, CONVERT = "data check folder --root data", "models check clip", "convert clip new"
PROGRESS = re.compile(
    r"  |\[\d/\d\] |(rank|evaluate|encode|predict|check|captions|decode|render|clip|zero-shot)\b|[\w, -]+: left out, "
)


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
    copy = shutil.copytree(pristine, tmp_path / "place")
    for path in (p for p in (copy / "done").rglob("*") if p.suffix in (".json", ".yaml")):
        # runs record absolute paths; the copy reads its own weights and images
        path.write_text(path.read_text().replace(str(pristine), str(copy)))
    monkeypatch.chdir(copy)
    return Path()


def content(folder):
    """Returns {path: bytes, or None for a folder} of everything in a folder."""
    return {p: None if p.is_dir() else p.read_bytes() for p in sorted(folder.rglob("*"))}


def fails(capsys, command, *fragments, goes_on=""):
    """Runs a command that must exit with 2 and one line that holds the fragments; returns its stdout and new paths.

    What was there must be left as it was, but for the folder `goes_on`, in which an earlier try of the command worked.
    """
    capsys.readouterr()
    before = {path: data for path, data in content(Path()).items() if path.parts[0] != goes_on}
    with pytest.raises(SystemExit) as ended:
        cli.main(shlex.split(command))
    out, err = capsys.readouterr()
    *progress, line = err.splitlines()
    assert ended.value.code == 2 and line.startswith("fmda: "), err
    assert all(fragment in line for fragment in fragments), line
    assert re.search(r"[;,] |: known", line), f"no mend in: {line}"
    assert all(PROGRESS.match(other) for other in progress), err
    after = content(Path())
    assert [p for p in before if p not in after or after[p] != before[p]] == []
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
TARGET = "scenes/images/000002.png"
SCORERS = [SCORE, EVALUATE, CHECK]
LOADERS = [RUN, EVALUATE, PREDICT, CONVERT, VERIFY]
# item -> (how the place is damaged, what the line must hold, the commands that must say so)
CASES = {
    "missing data folder": (nothing, ["nowhere: no such folder", "root="], [
        f"{RUN} data.root=nowhere", f"{PLAN} data.root=nowhere",
        "evaluate done folder --root nowhere", "data check folder --root nowhere"]),
    "missing pictures": (nothing, ["nowhere: no such file or folder"], ["predict done nowhere --out new"]),
    "missing scenes": (nothing, ["nowhere/captions.jsonl: not found"], [f"{CLIP} data=[nowhere]"]),
    "missing run": (nothing, ["nowhere: no such run folder"], [
        "predict nowhere data/val/images --out new", "evaluate nowhere folder --root data", "report nowhere"]),
    "missing checkpoint": (nothing, ["nowhere: no such folder"], [
        f"{RUN} clip=nowhere", "models check nowhere", "convert nowhere new"]),
    "missing checkpoint of a plan": (nothing, ["clip: the shapes of 'nowhere' are not known"], [
        f"{PLAN} clip=nowhere"]),
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
    "empty scenes": (write("scenes/captions.jsonl", ""), ["scenes: no images"], [CLIP]),
    "truncated PNG": (cut("data/val/images/1.png"), ["data/val/images/1.png: truncated or damaged"], [
        SCORE, EVALUATE, PREDICT]),
    "truncated PNG to rank": (cut("data/train/images/1.png"), ["data/train/images/1.png: truncated"], [RUN]),
    "truncated scene": (cut("scenes/images/000002.png"), ["scenes/images/000002.png: missing, trunc"], [CLIP]),
    "truncated target": (cut(TARGET), ["1 of 4 images cannot be used: ", f"{TARGET}: truncated"], [UDA]),
    "target that is no image": (write(TARGET, "words"), [f"{TARGET}: not an image file"], [UDA]),
    "targets that are no images": (lambda: [path.write_text("") for path in Path(TARGET).parent.iterdir()],
        ["scenes: none of the 4 images can be read"], [f"{UDA} target.skip_broken=true"]),
    "target smaller than the crop": (png(TARGET, np.zeros((24, 64, 3), np.uint8)),
        [f"{TARGET}: has 64x24 pixels, less than a crop of 32"], [UDA]),
    "empty target": (lambda: Path("hollow").mkdir(), ["hollow: no images of 'folder', split 'train'"], [
        f"{UDA} target.root=hollow"]),
    "source without a class to draw": (nothing, ["no image has more than 999 pixels of any class", "rare_pixels"], [
        f"{UDA} rare_pixels=999"]),
    "network of other classes": (nothing, ["start has 2 classes, the source 3", "network.new_head=true"], [
        f"{UDA} network.start=start"]),
    "16-bit label": (png(LABEL, np.zeros((32, 48), np.uint16)), [f"{LABEL}: a 16-bit label map"], SCORERS[:2]),
    "RGB label": (png(LABEL, np.zeros((32, 48, 3), np.uint8)), [f"{LABEL}: a colour image (RGB)"], SCORERS[:2]),
    "label value 37": (png(LABEL, np.full((32, 48), 37, np.uint8)), [f"{LABEL}: label value 37 is"], SCORERS[:2]),
    "16-bit scene label": (png(SCENE_LABEL, np.zeros((32, 64), np.uint16)), [f"{SCENE_LABEL}: a 16-bit"], [CLIP]),
    "RGB scene label": (png(SCENE_LABEL, np.zeros((32, 64, 3), np.uint8)), [f"{SCENE_LABEL}: a colour"], [CLIP]),
    "scene label value 37": (png(SCENE_LABEL, np.full((32, 64), 37, np.uint8)), [f"{SCENE_LABEL}: label value 37"],
        [CLIP]),
    "image without label": (remove(LABEL), ["data/val/images/1.png: image without label"], [RUN, EVALUATE]),
    "scene without label": (remove(SCENE_LABEL), [f"{SCENE_LABEL}: missing"], [CLIP]),
    "damaged captions": (write("scenes/captions.jsonl", '{"name"'), ["scenes/captions.jsonl, line 1: "], [CLIP]),
    "class list with a duplicate": (write("data/classes.yaml", "classes: [road, car, road]"),
        ["data/classes.yaml: class 'road' occurs twice"], [*SCORERS, f"{PLAN} classes=data/classes.yaml"]),
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
        "run floss.yaml dat.root=data", "plan clip.yaml crop.siz=3", "data render new heigth=64",
        "demo --work-dir new runs.held.heigth=64", "demo --work-dir new runs.maskclip-night.data.rot=x"]),
    "work folder of another configuration": (nothing, ["done: holds work of another configuration (", "work_dir="], [
        "run floss.yaml n=2 work_dir=done", "run clip.yaml work_dir=done", "run world.yaml work_dir=done",
        "demo --work-dir done"]),
    "work folder that is none": (nothing, ["data: is not empty and has no identity.json", "work_dir="], [
        "run floss.yaml work_dir=data", "demo --work-dir data"]),
    "output of something else": (nothing, ["done/host: holds work of another configuration"], [
        "evaluate done folder --root data --split train --out done/host"]),
    "output that is there": (nothing, ["clip: is there already"], ["convert clip clip"]),
    "predictions that are there": (lambda: shutil.copytree("data/val/labels", "new"), ["0.png: exists already"], [
        PREDICT]),
    "pictures of something else": (lambda: Path("done/host").rename("done/photo"),
        ["done/photo: is not empty and has no identity.json"], ["data render done 'domains={photo: 1}'"]),
}  # fmt: skip


@pytest.mark.parametrize(("item", "command"), [(item, c) for item, case in CASES.items() for c in case[2]])
def test_one_line_and_nothing_overwritten(place, capsys, item, command):
    damage, fragments, _ = CASES[item]
    damage()
    _, new = fails(capsys, command, *fragments)
    assert {path.parts[0] for path in new} <= {"new"}


@pytest.mark.parametrize(
    ("label", "kind"),
    [
        (np.zeros((32, 48), np.uint16), "a 16-bit label map"),
        (np.zeros((32, 48, 3), np.uint8), "a colour image (RGB)"),
        (np.full((32, 48), 37, np.uint8), "label value 37 is outside the class list (0-2"),
        (None, "data/val/images/1.png: image without label"),
    ],
)
def test_data_check_lists_the_fault_and_exits_with_2(place, capsys, label, kind):
    remove(LABEL)() if label is None else png(LABEL, label)()
    out, new = fails(capsys, CHECK, "folder: 1 faults, listed above; fix or remove those files")
    assert kind in out and LABEL.replace("labels", "images" if label is None else "labels") in out
    assert new == []


@pytest.mark.parametrize("item", ["one key missing", "one key too many", "one wrong shape"])
def test_models_check_lists_the_fault_and_exits_with_2(place, capsys, item):
    damage, (fault, _), _ = CASES[item]
    damage()
    out, new = fails(capsys, VERIFY, f"clip: {WEIGHTS}: not fit for use, see above; copy or download it again")
    assert fault.removeprefix("1 ").split(": ")[-1] in out and "NOT GOOD" in out
    assert new == []


def test_a_bfloat16_checkpoint_is_read_as_it_is(place, capsys):
    before = load_file(f"clip/{WEIGHTS}")
    weights(lambda a: a.update({name: value.astype(ml_dtypes.bfloat16) for name, value in a.items()}))()
    cli.main(VERIFY.split())
    assert f"{len(before)} arrays bfloat16" in capsys.readouterr().out
    cli.main(CONVERT.split())
    after = load_file(f"new/{WEIGHTS}")
    cli.main("run floss.yaml work_dir=half ranking.file=ranking.json".split())
    scores = [json.loads(Path(run, "floss/scores.json").read_text())["scores"]["accuracy"] for run in ("done", "half")]
    assert all(value.dtype == np.float32 for value in after.values())
    assert all(np.array_equal(after[n], v.astype(ml_dtypes.bfloat16).astype(np.float32)) for n, v in before.items())
    assert scores[0] == pytest.approx(scores[1], abs=0.05)


RENDER = "data render new 'domains={photo: 1}' height=32 width=64 batch=1"
BENCH = "bench loader --out new/r.json -- --size 16 16 --side 16 --batch 1 --images 1 --rounds 1 --workers 0 --seconds "
# the record holds the command; so it is longer than the pictures, and they still fit on the disk
BENCH += f"0.01{500 * '0'}"
# command -> sizes at which the disk is full, in turn; the file by which to see that all is done at the end
DISKS = [
    (RUN, (0, 4096, 40000), "new/report.html"),
    (CLIP, (0, 4096), None),
    (WORLD, (0, 300, 700), None),
    (RENDER, (0, 300, 700), None),
    (PREDICT, (0, 300), "new/1_overlay.jpg"),
    (EVALUATE, (0, 900, 2000), "new/scores.json"),
    (CONVERT, (0, 4096), "new/config.json"),
    ("report done --out new/page.html", (0, 4096), "new/page.html"),
    ("demo --work-dir new", (0,), None),
    (BENCH, (1000,), "new/r.json"),
    pytest.param(RENDER, (1500, 3000), "new/contact-sheet.png", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("command", "sizes", "end"), DISKS)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(place, capsys, command, sizes, end):
    for size in sizes:
        with full_disk(size):
            fails(capsys, command, "File too large", "new", goes_on="new")
    if end is not None:
        cli.main(shlex.split(command))
        assert Path(end).stat().st_size
    for name in ("rank/ranking.json", "host/scores.json", "floss/scores.json"):
        assert not Path("new", name).exists() or Path("new", name).read_bytes() == Path("done", name).read_bytes()


class _Sets(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


@contextmanager
def read_only(*folders):
    """Nobody can write in the folders, not even root.

    Root passes over the mode of a folder by a capability of its threads. This one lays it down for the time being, and
    so do the threads it starts; ordinary users, and systems other than Linux, have nothing to lay down.
    """
    header, sets, libc = (ctypes.c_uint32 * 2)(0x20080522, 0), (_Sets * 2)(), ctypes.CDLL(None)
    capable = hasattr(libc, "capget") and libc.capget(header, sets) == 0
    before = sets[0].effective
    for folder in folders:
        folder.chmod(0o555)
    if capable:
        sets[0].effective &= ~(1 << 1)  # CAP_DAC_OVERRIDE
        assert libc.capset(header, sets) == 0
    try:
        with pytest.raises(PermissionError):
            (folders[0] / "probe").touch()
        yield
    finally:
        if capable:
            sets[0].effective = before
            assert libc.capset(header, sets) == 0
        for folder in folders:
            folder.chmod(0o755)


@pytest.mark.parametrize(
    "command",
    [
        *(command.replace("new", "sealed/new") for command in (RUN, CLIP, WORLD, RENDER, PREDICT, EVALUATE, CONVERT)),
        "demo --work-dir sealed/new",
        "report done --out sealed/page.html",
        BENCH.replace("new", "sealed/new"),
        "run floss.yaml work_dir=sealed",
        "predict done data/val/images --out sealed",
        "evaluate done folder --root data --split train",
        "convert clip sealed",
    ],
)
def test_a_read_only_folder_is_one_line(place, capsys, command):
    Path("sealed").mkdir()
    with read_only(Path("sealed"), Path("done")):
        _, new = fails(capsys, command, "Permission denied", "sealed" if "sealed" in command else "done")
    assert new == []


def test_a_run_that_became_read_only_is_left_as_it_is(place, capsys):
    shutil.rmtree("done/score")
    with read_only(Path("done")):
        _, new = fails(capsys, "run floss.yaml work_dir=done", "done/score: Permission denied", "run again")
    assert new == []


def test_a_work_folder_in_which_nothing_was_made_is_free_for_the_mended_run(place, capsys):
    fails(capsys, f"{RUN} data.root=nowhere", "nowhere: no such folder")
    assert not Path("new").exists()
    cli.main(RUN.split())
    assert Path("new/rank/ranking.json").read_bytes() == Path("ranking.json").read_bytes()


def test_a_benchmark_that_cannot_write_its_record_measures_nothing(place, capsys):
    before = content(place)
    printed, _ = fails(capsys, BENCH.replace("new/r.json", "data"), "data: cannot be written")
    assert not printed and content(place) == before
