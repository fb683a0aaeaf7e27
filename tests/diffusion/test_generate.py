"""Generated folders: the same bytes whatever the batch, the processes and the kills; redrawing, refusals, overview."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import zlib
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest

from fmda.diffusion.filters import BannedWords, ClassPresence, ClipScore, ConstantImage, DuplicatePrompt, NearDuplicate
from fmda.diffusion.generate import contact_sheet, generate, image_seed
from fmda.diffusion.manifest import Manifest, Prompt, load_image
from fmda.errors import UserError

FACTS = {"sampler": "plms", "steps": 50, "guidance": 7.5, "checkpoint": "0123456789ab", "size": [8, 12]}
PROMPTS = (Prompt("a photo of cars", 0, "car"), Prompt("a photo of buses", 1, "bus"), Prompt("a wet street"))
EMBED = NearDuplicate(lambda images: images.reshape(len(images), -1) - 127.5, most=0.8, model="pixels")
BRIGHT = ClipScore(lambda images, texts: images.mean((1, 2, 3)) / 255, least=0.48, model="brightness")


def one_image(text, seed):
    """Noise of text and seed; every fifth seed gives black, every third another noise that is always the same."""
    if seed % 5 == 0:
        return np.zeros((8, 12, 3), np.uint8)
    key = [7] if seed % 3 == 0 else [seed, zlib.crc32(text.encode())]
    return np.random.default_rng(key).integers(0, 256, (8, 12, 3), np.uint8)


def draw(texts, seeds):
    assert len(texts) == len(seeds)
    return np.stack([one_image(*item) for item in zip(texts, seeds, strict=True)])


def make(folder, **changes):
    """Generates with both kinds of filters, unless told otherwise."""
    options = dict(
        draw=draw, prompts=PROMPTS, count=20, batch=4, seed=3, facts=FACTS, filters=(BRIGHT, EMBED), tries=50
    )
    return generate(folder=folder, **{**options, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of 20 images made in one go."""
    folder = tmp_path_factory.mktemp("whole")
    make(folder)
    return folder


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def images(folder):
    return {name: data for name, data in content(folder).items() if name.parent.name == "images"}


def test_the_manifest_says_all_about_each_image(whole):
    rows = lines(whole / "manifest.jsonl")
    assert [row["index"] for row in rows] == list(range(20))
    assert [row["prompt"] for row in rows[:4]] == [*(prompt.text for prompt in PROMPTS), PROMPTS[0].text]
    assert rows[4] | {"scores": None} == {
        "index": 4, "file": "images/im_000004_p1.png", "prompt": "a photo of buses", "prompt_index": 1,
        "class_index": 1, "class_name": "bus", "seed": image_seed(3, 4, rows[4]["attempt"]),
        "attempt": rows[4]["attempt"], "scores": None, **FACTS,
    }  # fmt: skip
    assert list(rows[4]["scores"]) == ["constant", "clip_score", "near_duplicate"]
    assert {path.name for path in whole.iterdir()} == {
        "settings.json", "images", "manifest.jsonl", "refused.jsonl", "summary.json", "contact-sheet.png"
    }  # fmt: skip


def test_each_image_is_drawn_again_alone_from_its_line(whole):
    for picture in Manifest.read(whole):
        again = one_image(picture.prompt, picture.seed)
        np.testing.assert_array_equal(load_image(whole / picture.file), again)
    colours = cv2.imread(str(whole / "images/im_000004_p1.png"))[..., ::-1]
    np.testing.assert_array_equal(colours, one_image(*[(p.prompt, p.seed) for p in Manifest.read(whole)][4]))


def test_seeds_are_fixed():
    assert [image_seed(0, 0, 0), image_seed(3, 4, 1), image_seed(-1, 10**9, 2)] == [1421166345, 3947304180, 3724211908]
    assert len({image_seed(0, j, a) for j in range(100) for a in range(10)}) == 1000


def test_refusals_are_logged_with_their_reason_and_counted(whole):
    rows, kept = lines(whole / "refused.jsonl"), Manifest.read(whole)
    assert [(r["index"], r["attempt"]) for r in rows] == sorted((r["index"], r["attempt"]) for r in rows)
    # each index has the attempts 0, 1, ... up to the one that was kept
    assert all(p.attempt == sum(row["index"] == p.index for row in rows) for p in kept)
    for row in rows:
        image = one_image(row["prompt"], row["seed"])
        assert row["seed"] == image_seed(3, row["index"], row["attempt"])
        by = "constant" if not image.any() else "clip_score" if image.mean() / 255 < 0.47995 else "near_duplicate"
        assert row["filter"] == by and f"{row['score']}" in row["why"] and f"{row['threshold']}" in row["why"]
    counts = {name: sum(row["filter"] == name for row in rows) for name in ("constant", "clip_score", "near_duplicate")}
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["refused"] == counts == kept.refused and min(counts.values()) > 0
    assert summary["images"] == 20 and summary["drawn"] == 20 + len(rows)
    assert [row["images"] for row in summary["prompts"]] == [7, 7, 6]
    assert sum(row["refused"] for row in summary["prompts"]) == len(rows)


def test_kept_images_differ_and_the_first_of_a_kind_is_kept(whole):
    pixels = EMBED.features(np.stack([load_image(path) for path in Manifest.read(whole).paths]))
    assert (pixels @ pixels.T - 2 * np.eye(20)).max() < 0.8
    (first,) = [picture.index for picture in Manifest.read(whole) if picture.seed % 3 == 0]
    later = [row for row in lines(whole / "refused.jsonl") if row["filter"] == "near_duplicate"]
    assert all(row["index"] > first and f"cosine 1.0 to image {first} is above" in row["why"] for row in later)


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_the_batch_changes_nothing(whole, tmp_path, batch):
    sizes = set()

    def counted(texts, seeds):
        sizes.add(len(texts))
        return draw(texts, seeds)

    make(tmp_path, batch=batch, draw=counted)
    assert content(tmp_path) == content(whole) and sizes == {batch}


@pytest.mark.parametrize("filters", [(), (BRIGHT,), (BRIGHT, EMBED)])
def test_a_smaller_set_is_a_beginning_of_a_larger_one(tmp_path, filters):
    make(tmp_path / "grown", count=7, filters=filters)
    few = content(tmp_path / "grown")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "grown/images").iterdir()}
    make(tmp_path / "grown", filters=filters)
    make(tmp_path / "large", filters=filters)
    assert content(tmp_path / "grown") == content(tmp_path / "large")
    assert few.items() & images(tmp_path / "large").items() == images(tmp_path / "large").items() & few.items()
    assert len([name for name in few if name.parent.name == "images"]) == 7
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_smaller_count_leaves_the_rest_and_returns_the_beginning(whole):
    before = content(whole)
    assert len(make(whole, count=5)) == 5
    assert content(whole) == before


def test_a_second_call_draws_and_writes_nothing(whole):
    def never(*_):
        raise AssertionError("called")

    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    still = make(whole, draw=never, filters=(ClipScore(never, 0.48, "brightness"), NearDuplicate(never, 0.8, "pixels")))
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    assert still == Manifest.read(whole)


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the folder, which the test may damage."""
    return shutil.copytree(whole, tmp_path / "copy")


@pytest.mark.parametrize("size", [None, 0, 5, 100, -1])
def test_a_lost_or_truncated_image_comes_back_as_it_was(whole, copy, size):
    for path in (copy / "images/im_000000_p0.png", copy / "images/im_000011_p2.png"):
        if size is None:
            path.unlink()
        else:
            os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    make(copy)
    assert content(copy) == content(whole)


def test_a_truncated_image_of_a_set_that_broke_off_is_drawn_again(whole, tmp_path):
    with stopping(4) as stopped:
        make(tmp_path, draw=stopped)
    os.truncate(tmp_path / lines(tmp_path / "drawn-0.jsonl")[-1]["file"], 100)
    make(tmp_path)
    assert content(tmp_path) == content(whole)


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
    options = dict(filters=(ConstantImage(least=-1.0),), prompt_filters=(BannedWords(("buses",)),), count=4)
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


@pytest.mark.parametrize("kind", ["drawn", "refused"])
@pytest.mark.parametrize("torn", [1, 30, 10000])
def test_a_torn_line_is_drawn_again(whole, tmp_path, kind, torn):
    with stopping(4) as stopped:
        make(tmp_path, draw=stopped)
    path = tmp_path / f"{kind}-0.jsonl"
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


def test_black_images_are_always_made_again(tmp_path):
    made = make(tmp_path, filters=())
    black = [p.index for p in made if p.attempt]
    assert black == [j for j in range(20) if image_seed(3, j, 0) % 5 == 0] and len(black) > 1
    assert all(load_image(path).any() for path in made.paths)
    assert made.refused == {"constant": len(lines(tmp_path / "refused.jsonl"))}


def test_a_threshold_of_ones_own_replaces_the_one_for_constant_images(tmp_path):
    made = make(tmp_path, filters=(ConstantImage(least=-1.0),))
    assert not made.refused and any(not load_image(path).any() for path in made.paths)


def test_what_was_refused_is_reported(tmp_path, capsys):
    made = make(tmp_path, filters=(), prompts=(*PROMPTS, Prompt("A wet street!")), prompt_filters=(DuplicatePrompt(),))
    err = capsys.readouterr().err
    assert f"refused and made again: constant {made.refused['constant']}; prompts refused: 1; see" in err
    assert made.refused_prompts == {"duplicate_prompt": 1} and "generate: 20/20 images" in err
    row = lines(tmp_path / "refused.jsonl")[0]
    assert (row["index"], row["prompt_index"], row["why"]) == (None, 3, "says the same as 'a wet street'")


def test_a_refused_prompt_leaves_the_cycle_and_the_others_keep_their_numbers(tmp_path):
    made = make(tmp_path, count=4, filters=(), prompt_filters=(BannedWords(("buses",)),))
    assert [p.file[-6:] for p in made] == ["p0.png", "p2.png", "p0.png", "p2.png"]


def hopeless(texts, seeds):
    """Cannot draw buses."""
    return np.stack([one_image(t, 0 if "bus" in t else s) for t, s in zip(texts, seeds, strict=True)])


def test_used_up_tries_end_in_one_line_after_the_others_are_drawn(tmp_path, capsys):
    with pytest.raises(UserError) as fault:
        make(tmp_path, draw=hopeless, filters=(BRIGHT,), tries=30, count=9)
    line = str(fault.value)
    assert "image 1 ('a photo of buses'): all 30 tries refused (constant 30; last: spread of levels is 0.0" in line
    assert "and so of 2 more; what is drawn stays: generate again with more tries" in line
    assert capsys.readouterr().err.count("all 30 tries refused; going on") == 3
    assert len(images(tmp_path)) == 6 and not (tmp_path / "manifest.jsonl").exists()
    before = content(tmp_path)
    with pytest.raises(UserError, match="all 30 tries refused"):
        make(tmp_path, draw=None, filters=(BRIGHT,), tries=30, count=9)
    assert content(tmp_path) == before
    # more tries, and luck
    made = make(tmp_path, filters=(BRIGHT,), tries=60, count=9)
    assert len(made) == 9 and all(p.attempt >= 30 for p in made if p.class_name == "bus")


def test_where_nothing_can_be_kept_it_ends_at_once(tmp_path):
    calls = []

    def black(texts, seeds):
        calls.append(len(texts))
        return np.zeros((len(texts), 8, 12, 3), np.uint8)

    with pytest.raises(UserError, match=r"image 0 \('a photo of cars'\): all 3 tries refused \(constant 3; "):
        make(tmp_path, draw=black, tries=3)
    assert len(calls) == 3


def test_a_collapsed_model_is_noticed_at_its_second_image(tmp_path):
    with pytest.raises(UserError, match="image 1 .*near_duplicate 3; last: cosine 1.0 to image 0 is above 0.8"):
        make(tmp_path, draw=lambda texts, seeds: np.stack([one_image("x", 1)] * len(texts)), tries=3, filters=(EMBED,))
    assert "im_000001_p1.png" not in {path.name for path in (tmp_path / "images").iterdir()}


def test_more_tries_go_on_to_what_they_would_have_made_at_once(whole, tmp_path):
    for tries in (1, 2, 4):
        with pytest.raises(UserError, match="generate again with more tries"):
            make(tmp_path, tries=tries)
    make(tmp_path)
    assert content(tmp_path) == content(whole)


def test_a_class_that_is_not_there_is_drawn_again(tmp_path):
    def present(found):
        return np.stack([found[..., 0].mean((1, 2)), found[..., 1].mean((1, 2))], 1) / 255

    made = make(tmp_path, filters=(ClassPresence(present, 0.5, "channels"),))
    for picture in made:
        share = None if picture.class_index is None else load_image(tmp_path / picture.file)[..., picture.class_index]
        assert share is None or share.mean() / 255 >= 0.49995
    assert made.refused["class_presence"] > 0


CHANGES = {
    r"checkpoint: '0123456789ab' -> 'ba9876543210'": {"facts": {**FACTS, "checkpoint": "ba9876543210"}},
    r"steps: 50 -> 25; seed: 3 -> 4": {"facts": {**FACTS, "steps": 25}, "seed": 4},
    r"personalisation: '\(none\)' -> 200": {"facts": {**FACTS, "personalisation": 200}},
    r"other prompts": {"prompts": PROMPTS[:2]},
    r"other filters": {"filters": (BRIGHT,)},
    r"other filters\)": {"filters": (BRIGHT, NearDuplicate(EMBED.embed, 0.9, "pixels"))},
    r"other prompt filters": {"prompt_filters": (DuplicatePrompt(),)},
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_folder_of_another_generation_is_refused_and_left_as_it_is(whole, message):
    before = content(whole)
    with pytest.raises(UserError, match=f"holds images of another generation .*{message}.*; choose another folder"):
        make(whole, draw=None, **CHANGES[message])
    assert content(whole) == before


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty and no folder of generated images; choose another folder"):
        make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("name", ["settings.json", "manifest.jsonl", "refused.jsonl"])
@pytest.mark.parametrize("text", ["{", "[1]\n", '{"index": 1}\n', '{"index": "a"}\n', "\n\n"])
def test_damaged_files_are_named(tmp_path, name, text):
    make(tmp_path, count=2)
    with open(tmp_path / name, "w") as file:
        file.write(text + "\n")
    damage = {"settings.json": "is not what", "manifest.jsonl": "damaged", "refused.jsonl": "damaged"}[name]
    with pytest.raises(UserError, match=rf"{name}: {damage}"):
        make(tmp_path, count=2)


def put_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"checkpoint": "ba9876543210"}, "checkpoint: 'ba9876543210' -> '0123456789ab'"),
        ({"steps": 25, "seed": 1}, "steps: 25 -> 50; seed: 1 -> "),
        ({"model": "x"}, r"model: 'x' -> '\(none\)'"),
        ({"prompt": "a photo of vans"}, "other prompt"),
        ({"prompt_index": 2, "file": "images/im_000004_p2.png"}, "other file; other prompt index"),
        ({"class_index": None, "class_name": "car"}, "other class index; other class name"),
    ],
)
@pytest.mark.parametrize("name", ["manifest.jsonl", "drawn-0.jsonl"])
def test_lines_of_another_generation_are_refused_and_left_as_they_are(copy, name, change, what):
    rows = lines(copy / "manifest.jsonl")
    (copy / "manifest.jsonl").unlink()
    put_lines(copy / name, [row | change if row["index"] == 4 else row for row in rows])
    before = content(copy)
    line = rf"{name}: lines of another generation \(image 4: {what}.*\); choose another folder"
    with pytest.raises(UserError, match=line):
        make(copy, draw=None, count=3)
    assert content(copy) == before


def test_lines_are_known_again_by_their_json(tmp_path):
    facts = {**FACTS, "size": (8, 12)}
    make(tmp_path, facts=facts, count=2)
    make(tmp_path, facts=dict(reversed(facts.items())), count=2, draw=None)


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
    with pytest.raises(UserError, match="im_000001_p1.png: missing, truncated or no PNG; delete it and generate again"):
        contact_sheet(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count: 0; give at least 1"),
        ({"batch": 0}, "batch: 0; give at least 1"),
        ({"tries": 0}, "tries: 0; give at least 1"),
        ({"prompts": ()}, "prompts: none given; give at least one"),
        ({"filters": (EMBED, EMBED)}, "two are called 'near_duplicate'; name them apart"),
    ],
)
def test_bad_values_are_named_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        make(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"facts": {"seed": 3}}, "'seed' is a key that manifest lines have already"),
        ({"process_count": 2}, "several processes need `wait`"),
        ({"process_index": 1}, "process_index 1 of process_count 1"),
        (
            {"draw": lambda texts, seeds: np.zeros((4, 8, 8, 3))},
            r"draw returned float64 \(4, 8, 8, 3\), expected uint8",
        ),
    ],
)
def test_faults_of_the_caller_are_no_user_errors(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "new", **changes)


@contextmanager
def full_disk(largest):
    """No file can grow past `largest` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_the_same_call_goes_on(whole, tmp_path):
    # settings, an image, a line of the first batch, one of a later batch, a refusal, the overview
    largest, reached = [0, 300, 700, 1000, 2500, 5000, 9000], []
    for size in largest:
        with full_disk(size), pytest.raises(UserError, match=r"cannot write \(File too large\); make room.* to go on"):
            make(tmp_path / "new")
        reached.append(len(content(tmp_path / "new")))
        assert not [path for path in (tmp_path / "new").rglob(".*")]
    make(tmp_path / "new")
    assert content(tmp_path / "new") == content(whole)
    assert reached == sorted(reached) and len(set(reached)) > 3


def test_the_overview_shows_the_first_image_of_each_prompt(whole):
    sheet, first = contact_sheet(whole, 2), [load_image(path) for path in Manifest.read(whole).paths[:3]]
    height, width = sheet.shape[0] // 2, sheet.shape[1] // 2
    assert sheet.shape == (2 * (107 + 18), 2 * 160, 3)
    for k in range(3):
        cell = sheet[k // 2 * height :, k % 2 * width :][:107, :160]
        small = cv2.resize(np.ascontiguousarray(cell), (12, 8), interpolation=cv2.INTER_AREA)
        others = [np.abs(small.astype(int) - other).mean() for other in first]
        assert np.argmin(others) == k
        assert np.ptp(sheet[k // 2 * height + 107 :, k % 2 * width :][:18, :160]) > 100
    assert (sheet[height:, width:] == 255).all()
    np.testing.assert_array_equal(load_image(whole / "contact-sheet.png"), contact_sheet(whole))
    with pytest.raises(UserError, match="columns: 0"):
        contact_sheet(whole, 0)


def test_a_folder_without_a_manifest_is_named(tmp_path):
    with pytest.raises(UserError, match="manifest.jsonl: not found; name a folder of generated images"):
        contact_sheet(tmp_path)


# At a draw, a file before or after it takes its place, or a wait, the process kills itself if it was told that word.
_SCRIPT = """
    import os, signal, sys, time
    from pathlib import Path
    sys.path[:0] = {paths!r}
    from test_generate import draw, make
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
    "before settings.json", "after settings.json", "draw", "before im_000002_p2.png", "after im_000005_p2.png",
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
