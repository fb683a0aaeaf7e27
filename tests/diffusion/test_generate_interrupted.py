"""Generated folders: the same bytes after stops, losses, a full disk, kills and by two processes; damage is named."""

import os
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import pytest
from full_disk import full_disk
from small_set import content, draw, lines, make, put_lines

from fmda.diffusion.filters import banned_words
from fmda.diffusion.manifest import contact_sheet
from fmda.errors import UserError


@pytest.mark.parametrize("size", [None, 0, 5, 100, -1])
def test_a_lost_or_truncated_image_comes_back_as_it_was(whole, copy, size):
    for path in (copy / "images/im_000000_p0.png", copy / "images/im_000011_p2.png"):
        if size is None:
            path.unlink()
        else:
            os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    make(copy)
    assert content(copy) == content(whole)


@pytest.mark.parametrize("name", ["contact-sheet.png", "summary.json", "refused.jsonl", "manifest.jsonl"])
def test_a_lost_file_beside_the_images_comes_back_as_it_was(whole, copy, name):
    (copy / name).unlink()
    make(copy)
    assert content(copy) == content(whole)


@pytest.mark.parametrize("name", ["contact-sheet.png", "summary.json"])
def test_a_lost_overview_comes_back_without_a_drawing(whole, copy, name):
    (copy / name).write_bytes(b"") if name.endswith("png") else (copy / name).unlink()
    assert len(make(copy, draw=None, count=5)) == 5
    assert content(copy) == content(whole)


def test_a_lost_log_without_refused_images_comes_back(tmp_path):
    # no image of this seed is black
    options = dict(seed=6, filters=(), duplicates=None, prompt_filters=(banned_words(("buses",)),), count=4)
    make(tmp_path, **options)
    before = content(tmp_path)
    (tmp_path / "refused.jsonl").unlink()
    make(tmp_path, draw=None, **options)
    assert content(tmp_path) == before and len(lines(tmp_path / "refused.jsonl")) == 1


class Stop(Exception):
    pass


@contextmanager
def stopping(at):
    """A draw that is stopped in its call number `at`."""
    calls = []

    def stopped(texts, seeds):
        calls.append(0)
        if len(calls) > at:
            raise Stop
        return draw(texts, seeds)

    with pytest.raises(Stop):
        yield stopped


def test_a_truncated_image_of_a_set_that_broke_off_is_drawn_again(whole, tmp_path):
    with stopping(4) as stopped:
        make(tmp_path, draw=stopped)
    os.truncate(tmp_path / [row for row in lines(tmp_path / "drawn-0.jsonl") if "file" in row][-1]["file"], 100)
    make(tmp_path)
    assert content(tmp_path) == content(whole)


@pytest.mark.parametrize("torn", [1, 30, 300, 600, 10000])
def test_a_torn_line_is_drawn_again(whole, tmp_path, torn):
    with stopping(4) as stopped:
        make(tmp_path, draw=stopped)
    path = tmp_path / "drawn-0.jsonl"
    os.truncate(path, max(5, path.stat().st_size - torn))
    make(tmp_path)
    assert content(tmp_path) == content(whole)


def test_a_set_that_broke_off_while_it_grew_can_be_had_as_it_was(whole, tmp_path):
    make(tmp_path, count=7)
    before = content(tmp_path)
    with stopping(4) as stopped:
        make(tmp_path, draw=stopped)
    again = make(tmp_path, count=7)
    assert len(again) == 7
    assert (tmp_path / "manifest.jsonl").read_bytes() == before[Path("manifest.jsonl")]
    assert len(list((tmp_path / "images").iterdir())) > 7
    make(tmp_path)
    assert content(tmp_path) == content(whole)


@pytest.mark.parametrize("name", ["identity.json", "manifest.jsonl", "refused.jsonl"])
@pytest.mark.parametrize("text", ["{", "[1]\n", '{"index": 1}\n', '{"index": "a"}\n', "\n\n"])
def test_damaged_files_are_named(tmp_path, name, text):
    make(tmp_path, count=2)
    with open(tmp_path / name, "w") as file:
        file.write(text + "\n")
    with pytest.raises(UserError, match=rf"{name}(, line \d)?: damaged|holds work of another configuration"):
        make(tmp_path, count=2)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(("manifest.jsonl", change) for change in (
            {"index": None, "file": 5}, {"index": True}, {"prompt": 7}, {"prompt_index": "x"}, {"scores": None},
            {"attempt": "a"}, {"class_index": 1.0}, {"class_name": 3}, {"index": 2}, {"file": "../../../../etc/passwd"},
            {"file": "../images/im_000001_p1.png"},
        )),
        *(("refused.jsonl", change) for change in (
            {"attempt": "a"}, {"attempt": None}, {"index": None}, {"filter": [1]}, {"prompt_index": {}}, {"why": None},
        )),
    ],
)  # fmt: skip
def test_lines_with_wrong_values_are_named(copy, name, change):
    rows = lines(copy / name)
    put_lines(copy / name, [rows[0], rows[1] | change, *rows[2:]])
    before = content(copy)
    for read in (make, contact_sheet):
        with pytest.raises(UserError) as fault:
            read(copy)
        assert str(fault.value) == f"{copy / name}: damaged; delete the folder and generate it again"
    assert content(copy) == before


@pytest.mark.parametrize("row", [{"index": 1}, {"index": 1, "attempt": 0}, {"index": None}])
def test_lines_that_lack_a_key_are_named(copy, row):
    put_lines(copy / "refused.jsonl", [row])
    with pytest.raises(UserError, match="refused.jsonl: damaged"):
        make(copy)


def test_a_line_that_is_there_twice_is_named(copy):
    put_lines(copy / "manifest.jsonl", 2 * lines(copy / "manifest.jsonl"))
    with pytest.raises(UserError, match="manifest.jsonl: damaged"):
        make(copy)


def test_a_truncated_image_is_named_where_it_is_needed(copy):
    os.truncate(copy / "images/im_000001_p1.png", 100)
    with pytest.raises(UserError, match="im_000001_p1.png: missing, truncated or not a PNG; delete it"):
        contact_sheet(copy)


def test_a_full_disk_is_one_line_and_the_same_call_goes_on(whole, tmp_path):
    # settings, an image, a line of the first batch, one of a later batch, a refusal, the overview
    largest, reached = [0, 300, 700, 1000, 2500, 5000, 9000], []
    for size in largest:
        with full_disk(size), pytest.raises(UserError, match="File too large; make room .* to resume"):
            make(tmp_path / "new")
        reached.append(len(content(tmp_path / "new")))
        assert not [path for path in (tmp_path / "new").rglob(".*")]
    make(tmp_path / "new")
    assert content(tmp_path / "new") == content(whole)
    assert reached == sorted(reached) and len(set(reached)) > 3


# At a draw, a file before or after it takes its place, or a wait, the process kills itself if it was told that word.
_SCRIPT = """
    import os, signal, sys, time
    from pathlib import Path
    sys.path[:0] = {paths!r}
    from small_set import draw, make
    number, processes, mark = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    def event(*words):
        if " ".join(words) == mark:
            os.kill(os.getpid(), signal.SIGKILL)
    def slow_draw(texts, seeds):
        event("draw")
        return draw(texts, seeds)
    def slow_replace(source, target, replace=os.replace):
        event("before", Path(target).name)
        replace(source, target)
        event("after", Path(target).name)
    os.replace = slow_replace
    def wait(what):
        event("wait", what)
        marks = [Path(f"{{sys.argv[1]}}-{{what}}-{{k}}") for k in range(processes)]
        marks[number].touch()
        while not all(mark.exists() for mark in marks):
            time.sleep(0.01)
    make(Path(sys.argv[1]), draw=slow_draw, process_index=number, process_count=processes, wait=wait)
    print("done", flush=True)
"""


def start(tmp_path, folder, number=0, processes=1, mark=""):
    here = Path(__file__).parent
    script = tmp_path / "generate.py"
    script.write_text(textwrap.dedent(_SCRIPT.format(paths=[str(here.parents[1]), str(here)])))
    command = [sys.executable, str(script), str(folder), str(number), str(processes), mark]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env={**os.environ, "FMDA_PROCESS": str(number)}, **pipes)


def killed(child):
    """Returns whether a run came to its mark, when it has ended."""
    child.communicate(timeout=120)
    return child.returncode == -signal.SIGKILL


MARKS = [
    "before identity.json", "after identity.json", "draw", "before im_000002_p2.png", "after im_000005_p2.png",
    "before refused.jsonl", "after manifest.jsonl", "before contact-sheet.png",
]  # fmt: skip


def test_killed_at_eight_moments_the_folder_is_the_same(whole, tmp_path):
    reached = [killed(start(tmp_path, tmp_path / "cut", mark=mark)) for mark in MARKS]
    out, err = start(tmp_path, tmp_path / "cut").communicate(timeout=120)
    assert out.endswith("done\n"), err
    assert dict(zip(MARKS, reached, strict=True)) == dict.fromkeys(MARKS, True)
    assert content(tmp_path / "cut") == content(whole)


def test_two_processes_equal_one(whole, tmp_path):
    pair = [start(tmp_path, tmp_path / "two", number, 2) for number in range(2)]
    ends = [child.communicate(timeout=120) for child in pair]
    assert all(out.endswith("done\n") for out, _ in ends), ends
    assert content(tmp_path / "two") == content(whole)
    # the first one alone shows how far it is
    assert "generate" in ends[0][1] and not ends[1][1]


def test_two_killed_processes_are_continued_by_one(whole, tmp_path):
    # one in the middle, of which half an image is left; the other one when it waits for it
    marks = ["wait drawn", "before im_000007_p1.png"]
    pair = [start(tmp_path, tmp_path / "two", number, 2, mark) for number, mark in enumerate(marks)]
    assert all([killed(child) for child in pair])
    assert (tmp_path / "two/images/.im_000007_p1.part1.png").is_file() and (tmp_path / "two/drawn-0.jsonl").is_file()
    make(tmp_path / "two")
    assert content(tmp_path / "two") == content(whole)
