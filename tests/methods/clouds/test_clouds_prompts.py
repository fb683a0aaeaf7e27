"""Prompts of street scenes: grammar, coverage of classes, the file and the kind that reads it."""

import json
from collections import Counter
from pathlib import Path

import pytest

from fmda import cli
from fmda.errors import UserError
from fmda.evaluate.sections import read_sections
from fmda.methods.clouds.grammar import NOUNS, VOCABULARIES, Vocabulary, scenes
from fmda.methods.clouds.prompts import Config, coverage, stages
from fmda.methods.generate.naming import named_classes
from fmda.methods.generate.settings import PromptConfig, make_prompts
from fmda.methods.kinds import open_run
from fmda.weights.source import assets_folder
from fmda.weights.tokenizer import Tokenizer
from fmda.world.names import CLASSES

ROOT = Path(__file__).parents[3]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("A Street Sign beside two LORRIES.", ("traffic sign", "truck")),
        ("cyclists, buses; a tram-stop and people", ("rider", "bus", "train", "person")),
        ("a carpet of wallpaper, business and carriage", ()),
        ("a traffic light over a goods vehicle, a vehicle and a stone wall", ("traffic light", "truck", "car", "wall")),
        ("eine Straße im Regen", ()),
    ],
)
def test_classes_are_named_by_whole_words_the_longest_first(text, names):
    assert named_classes(text) == names


def test_every_class_is_subject_and_companion_equally_often():
    made = scenes(38, CLASSES, VOCABULARIES["urban"], 3)
    assert Counter(one.subject for one in made) == Counter(one.companion for one in made) == dict.fromkeys(CLASSES, 2)
    assert [one.subject for one in made[:19]] == list(CLASSES)
    assert all({one.subject, one.companion} <= {*named_classes(one.text)} for one in made)
    # two as subject, two as companion, and here no place names one of these
    assert {name: coverage([one.text for one in made])[name] for name in ("fence", "pole", "train", "rider")} == {
        "fence": 4, "pole": 4, "train": 4, "rider": 4,
    }  # fmt: skip


@pytest.mark.parametrize("name", VOCABULARIES)
def test_scenes_are_seeded_distinct_and_a_larger_set_begins_with_a_smaller(name):
    made = scenes(600, CLASSES, VOCABULARIES[name], 0)
    assert len({one.text for one in made}) == 600
    assert scenes(50, CLASSES, VOCABULARIES[name], 0) == made[:50]
    assert scenes(50, CLASSES, VOCABULARIES[name], 1) != made[:50]


def test_a_grammar_of_one_scene_by_hand(monkeypatch):
    lights = {"dimly": (("at night",), ("in fog",))}
    small = Vocabulary(("on a square",), ("at night", "by day"), ("in fog",), lights, ("",))
    monkeypatch.setitem(NOUNS, "bus", ("a bus",))
    texts = {one.text.split(" on ")[1] for one in scenes(2, ("bus",), small, 0)}
    assert texts == {"a square at night in fog, dimly", "a square by day in fog"}
    with pytest.raises(UserError, match="count: 1 classes in 2 conditions give 2 prompts, not 3"):
        scenes(3, ("bus",), small, 0)
    with pytest.raises(UserError, match="'tram' is no class of Cityscapes"):
        scenes(1, ("tram",), small, 0)
    with pytest.raises(UserError, match="names no class, or one twice"):
        scenes(1, ("bus", "bus"), small, 0)


def test_prompts_of_the_street_world_fit_its_model():
    count = Tokenizer(assets_folder() / "street-diffusion" / "tokenizer", 1023, 1024).length
    assert max(count(one.text) for one in scenes(500, CLASSES, VOCABULARIES["street"], 0)) <= 32


def test_the_kind_writes_prompts_that_generation_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text("kind: prompts\ncount: 40\nseed: 5\n")
    cli.main(["run", "p.yaml", "work_dir=made"])
    rows = lines(Path("made/prompts/prompts.jsonl"))
    assert rows[0] == {"text": rows[0]["text"], "class": "road", "writer": "grammar urban", "seed": 5}
    assert [row["class"] for row in rows] == [CLASSES[k % 19] for k in range(40)]
    outputs = json.loads(Path("made/prompts/stage.json").read_text())["outputs"]
    assert outputs["prompts"] == 40 and outputs["writers"] == {"grammar urban": 40}
    (section,) = read_sections(Path("made/prompts"))
    assert section.table.rows[3] == ("wall", 2, outputs["named"]["wall"]) and outputs["named"]["wall"] >= 4
    before = Path("made/prompts/prompts.jsonl").read_bytes()
    cli.main(["run", "p.yaml", "work_dir=again"])
    assert Path("again/prompts/prompts.jsonl").read_bytes() == before

    prompts = make_prompts(PromptConfig(file=Path("made/prompts/prompts.jsonl")))
    assert [(one.text, one.class_name) for one in prompts] == [(row["text"], row["class"]) for row in rows]
    assert [one.class_index for one in prompts] == [k % 19 for k in range(40)]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"text": "a bus", "class": "bus"}\n{"text": 3, "class": "bus"}\n', "line 2: is no"),
        ('{"text": "", "class": "bus"}\n', "line 1: is no"),
        ('["a bus"]\n', "line 1: is no"),
        ('{"text": "a bus", "class": "bus"}\n{"text": "a', "line 2: cut off"),
        ("", "holds no prompt"),
        (None, "no such file"),
    ],
)
def test_a_damaged_file_of_prompts_is_one_line(tmp_path, content, fault):
    if content is not None:
        (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(UserError, match=f"prompts.file: .*p.jsonl.*{fault}"):
        make_prompts(PromptConfig(file=tmp_path / "p.jsonl"))


@pytest.mark.parametrize("name", ["prompts", "images-street"])
def test_published_configurations_plan(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = open_run(f"configs/clouds/{name}.yaml").plan().text()
    assert "100 prompts of 19 classes by the grammar" in text
    assert name == "prompts" or "images of the prompts of @prompts/prompts/prompts.jsonl by street-diffusion" in text


def test_stages_of_the_kind():
    assert [stage.name for stage in stages(Config())] == ["prompts"]
