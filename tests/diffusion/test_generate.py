"""Generated folders: the same bytes whatever the batch; redrawing, refusals, other generations, overview."""

import dataclasses
import json
from dataclasses import dataclass

import cv2
import numpy as np
import pytest
from small_set import BRIGHT, EMBED, FACTS, PROMPTS, content, draw, images, lines, make, one_image

from fmda.diffusion.filters import ImageFilter, NearDuplicate, banned_words, duplicate_prompt
from fmda.diffusion.generate import image_seed
from fmda.diffusion.manifest import Manifest, Prompt, contact_sheet
from fmda.errors import UserError
from fmda.png import read_png


def test_the_manifest_says_all_about_each_image(whole):
    rows = lines(whole / "manifest.jsonl")
    assert [row["index"] for row in rows] == list(range(20))
    assert [row["prompt"] for row in rows[:4]] == [*(prompt.text for prompt in PROMPTS), PROMPTS[0].text]
    assert rows[4] | {"scores": None} == {
        "index": 4, "file": "images/im_000004_p1.png", "prompt": "a photo of buses", "prompt_index": 1,
        "class_index": 1, "class_name": "bus", "seed": image_seed(3, 4, rows[4]["attempt"]),
        "attempt": rows[4]["attempt"], "scores": None, **FACTS,
    }  # fmt: skip
    assert list(rows[4]["scores"]) == ["constant", "bright", "near_duplicate"]
    assert {path.name for path in whole.iterdir()} == {
        "identity.json", "images", "manifest.jsonl", "refused.jsonl", "summary.json", "contact-sheet.png"
    }  # fmt: skip


def test_each_image_is_drawn_again_alone_from_its_line(whole):
    for picture in Manifest.read(whole):
        again = one_image(picture.prompt, picture.seed)
        np.testing.assert_array_equal(read_png(whole / picture.file), again)
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
        by = "constant" if not image.any() else "bright" if image.mean() / 255 < 0.47995 else "near_duplicate"
        assert row["filter"] == by and f"{row['score']}" in row["why"] and f"{row['threshold']}" in row["why"]
    counts = {name: sum(row["filter"] == name for row in rows) for name in ("constant", "bright", "near_duplicate")}
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["refused"] == counts == kept.refused and min(counts.values()) > 0
    assert summary["images"] == 20 and summary["drawn"] == 20 + len(rows)
    assert [row["images"] for row in summary["prompts"]] == [7, 7, 6]
    assert sum(row["refused"] for row in summary["prompts"]) == len(rows)


def test_kept_images_differ_and_the_first_of_a_kind_is_kept(whole):
    pixels = EMBED.embeddings(np.stack([read_png(path) for path in Manifest.read(whole).paths]))
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


@pytest.mark.parametrize("filters", [{"filters": (), "duplicates": None}, {"duplicates": None}, {}])
def test_a_smaller_set_is_a_beginning_of_a_larger_one(tmp_path, filters):
    make(tmp_path / "grown", count=7, **filters)
    few = content(tmp_path / "grown")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "grown/images").iterdir()}
    make(tmp_path / "grown", **filters)
    make(tmp_path / "large", **filters)
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
    bright, embed = dataclasses.replace(BRIGHT, score=never), dataclasses.replace(EMBED, embed=never)
    still = make(whole, draw=never, filters=(bright,), duplicates=embed)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    assert still == Manifest.read(whole)


def test_black_images_are_always_made_again(tmp_path):
    made = make(tmp_path, filters=(), duplicates=None)
    black = [p.index for p in made if p.attempt]
    assert black == [j for j in range(20) if image_seed(3, j, 0) % 5 == 0] and len(black) > 1
    assert all(read_png(path).any() for path in made.paths)
    assert made.refused == {"constant": len(lines(tmp_path / "refused.jsonl"))}


def test_what_was_refused_is_reported(tmp_path, capsys):
    prompts = (*PROMPTS, Prompt("A wet street!"))
    made = make(tmp_path, filters=(), duplicates=None, prompts=prompts, prompt_filters=(duplicate_prompt(),))
    err = capsys.readouterr().err
    assert f"refused and generated again: constant {made.refused['constant']}; prompts refused: 1; see" in err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["refused_prompts"] == {"duplicate_prompt": 1} and "generate: 20/20 images" in err
    row = lines(tmp_path / "refused.jsonl")[0]
    assert (row["index"], row["prompt_index"], row["why"]) == (None, 3, "duplicate of 'a wet street'")


def test_a_refused_prompt_leaves_the_cycle_and_the_others_keep_their_numbers(tmp_path):
    made = make(tmp_path, count=4, filters=(), duplicates=None, prompt_filters=(banned_words(("buses",)),))
    assert [p.file[-6:] for p in made] == ["p0.png", "p2.png", "p0.png", "p2.png"]


def hopeless(texts, seeds):
    """Cannot draw buses."""
    return np.stack([one_image(t, 0 if "bus" in t else s) for t, s in zip(texts, seeds, strict=True)])


def test_used_up_tries_end_in_one_line_after_the_others_are_drawn(tmp_path, capsys):
    with pytest.raises(UserError) as fault:
        make(tmp_path, draw=hopeless, duplicates=None, tries=30, count=9)
    line = str(fault.value)
    assert "image 1 ('a photo of buses'): all 30 tries refused (constant 30; last: spread of levels is 0.0" in line
    assert "and so of 2 more; generate again with more tries to continue" in line
    assert capsys.readouterr().err.count("all 30 tries refused; continuing") == 3
    assert len(images(tmp_path)) == 6 and not (tmp_path / "manifest.jsonl").exists()
    before = content(tmp_path)
    with pytest.raises(UserError, match="all 30 tries refused"):
        make(tmp_path, draw=None, duplicates=None, tries=30, count=9)
    assert content(tmp_path) == before
    # more tries, and luck
    made = make(tmp_path, duplicates=None, tries=60, count=9)
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
        make(tmp_path, draw=lambda texts, seeds: np.stack([one_image("x", 1)] * len(texts)), tries=3, filters=())
    assert "im_000001_p1.png" not in {path.name for path in (tmp_path / "images").iterdir()}


def test_more_tries_go_on_to_what_they_would_have_made_at_once(whole, tmp_path):
    for tries in (1, 2, 4):
        with pytest.raises(UserError, match="generate again with more tries"):
            make(tmp_path, tries=tries)
    make(tmp_path)
    assert content(tmp_path) == content(whole)


def test_a_class_that_is_not_there_is_drawn_again(tmp_path):
    def share(images, prompts):
        pairs = zip(images, prompts, strict=True)
        return [None if p.class_index is None else image[..., p.class_index].mean() / 255 for image, p in pairs]

    made = make(tmp_path, filters=(ImageFilter("presence", "share", share, 0.5),), duplicates=None)
    images = np.stack([read_png(path) for path in made.paths])
    assert all(value is None or value >= 0.49995 for value in share(images, made))
    assert made.refused["presence"] > 0


CHANGES = {
    r"facts.checkpoint: '0123456789ab' -> 'ba9876543210'": {"facts": {**FACTS, "checkpoint": "ba9876543210"}},
    r"seed: 3 -> 4; facts.steps: 50 -> 25": {"facts": {**FACTS, "steps": 25}, "seed": 4},
    r"facts.personalisation: '\(none\)' -> 200": {"facts": {**FACTS, "personalisation": 200}},
    r"prompts.2: \['a wet street', None, None\] -> '\(none\)'": {"prompts": PROMPTS[:2]},
    r"filters.near_duplicate: .* -> '\(none\)'": {"duplicates": None},
    r"filters.near_duplicate.most: 0.8 -> 0.9": {"duplicates": NearDuplicate(EMBED.embed, 0.9, "pixels")},
    r"prompt_filters.duplicate_prompt: '\(none\)' -> {}": {"prompt_filters": (duplicate_prompt(),)},
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_folder_of_another_generation_is_refused_and_left_as_it_is(whole, message):
    before = content(whole)
    with pytest.raises(UserError, match=f"holds work of another configuration .*{message}.*; choose another folder"):
        make(whole, draw=None, **CHANGES[message])
    assert content(whole) == before


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="is not empty and has no identity.json: .*; choose another folder"):
        make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@dataclass(frozen=True)
class Facts:
    sampler: str = "plms"
    steps: int = 50


def test_facts_that_gain_a_field_with_a_default_leave_earlier_folders_usable(tmp_path):
    made = make(tmp_path, facts=Facts(), count=2)
    grown = dataclasses.make_dataclass("Facts", [("eta", float, 0.0)], bases=(Facts,), frozen=True)
    assert make(tmp_path, facts=grown(), count=2, draw=None).images == made.images
    with pytest.raises(UserError, match=r"facts.eta: 0.0 -> 0.5"):
        make(tmp_path, facts=grown(eta=0.5), count=2, draw=None)


def test_lines_are_known_again_by_their_json(tmp_path):
    facts = {**FACTS, "size": (8, 12)}
    made = make(tmp_path, facts=facts, count=2)
    assert make(tmp_path, facts=dict(reversed(facts.items())), count=2, draw=None).images == made.images


def test_a_draw_that_returns_something_else_is_no_user_error(tmp_path):
    with pytest.raises(ValueError, match=r"draw returned float64 \(4, 8, 8, 3\), expected uint8"):
        make(tmp_path, draw=lambda texts, seeds: np.zeros((4, 8, 8, 3)))


def test_the_overview_shows_the_first_image_of_each_prompt(whole):
    sheet, first = contact_sheet(whole, 2), [read_png(path) for path in Manifest.read(whole).paths[:3]]
    height, width = sheet.shape[0] // 2, sheet.shape[1] // 2
    assert sheet.shape == (2 * (107 + 18), 2 * 160, 3)
    for k in range(3):
        cell = sheet[k // 2 * height :, k % 2 * width :][:107, :160]
        small = cv2.resize(np.ascontiguousarray(cell), (12, 8), interpolation=cv2.INTER_AREA)
        others = [np.abs(small.astype(int) - other).mean() for other in first]
        assert np.argmin(others) == k
        assert np.ptp(sheet[k // 2 * height + 107 :, k % 2 * width :][:18, :160]) > 100
    assert (sheet[height:, width:] == 255).all()
    np.testing.assert_array_equal(read_png(whole / "contact-sheet.png"), contact_sheet(whole))


def test_a_folder_without_a_manifest_is_named(tmp_path):
    with pytest.raises(UserError, match="manifest.jsonl: not found; name a folder of generated images"):
        contact_sheet(tmp_path)
