"""Tests of facts and captions: true of the picture, seeded, quick, free of jax."""

import subprocess
import sys
import time

import numpy as np
import pytest

from fmda.world.captions import SYNONYMS, caption, content_phrase, crop_facts, facts_of, noun_phrase
from fmda.world.names import CLASSES, DOMAINS, STREETS, STYLES, TIMES, WEATHERS

INDICES = {
    "domain": DOMAINS.index("styles"),
    "style": STYLES.index("painting"),
    "weather": WEATHERS.index("rain"),
    "time": TIMES.index("night"),
    "street": STREETS.index("crossing"),
}


@pytest.fixture
def scene():
    """Road below, sky above, a car on the left, two persons on the right."""
    labels = np.full((60, 120), CLASSES.index("sky"), np.uint8)
    labels[30:] = CLASSES.index("road")
    instances = np.zeros((60, 120), np.int32)
    for left, name, i in ((5, "car", 3), (90, "person", 40), (110, "person", 41)):
        labels[25:40, left : left + 8], instances[25:40, left : left + 8] = CLASSES.index(name), i
    return labels, instances


def words_of(name):
    return (name, *SYNONYMS[name])


def test_facts_hold_names_counts_and_places(scene):
    facts = facts_of(*scene, INDICES)
    assert (facts["style"], facts["weather"], facts["time"], facts["street"]) == (
        "painting",
        "rain",
        "night",
        "crossing",
    )
    assert facts["classes"]["car"] == 120 and list(facts["classes"])[0] == "sky"
    assert facts["counts"] == {"car": 1, "person": 2}
    assert [(o["id"], o["place"], o["near"]) for o in facts["objects"]] == [
        (3, "left", True),
        (40, "right", True),
        (41, "right", True),
    ]


def test_crop_facts_are_those_of_the_crop(scene):
    facts = crop_facts(*scene, facts_of(*scene, INDICES), (20, 80, 50, 110))
    assert facts["size"] == [30, 30] and facts["crop"]
    assert "car" not in facts["classes"] and facts["classes"]["person"] == 120
    assert [(o["id"], o["place"]) for o in facts["objects"]] == [(40, "centre")]
    assert facts["style"] == "painting"


def test_captions_name_only_what_is_there(scene):
    facts = crop_facts(*scene, facts_of(*scene, INDICES), (20, 80, 50, 110))
    rng = np.random.default_rng(0)
    absent = [w for name in CLASSES if name not in facts["classes"] for w in words_of(name)]
    absent = [w for w in absent if w not in ("street", "sky", "plant", "man", "wall", "cycle")]
    for _ in range(300):
        tokens = f" {caption(facts, rng).replace(',', '').replace('.', '')} "
        assert not [w for w in absent if f" {w} " in tokens or f" {w}s " in tokens], tokens


def test_plain_class_names_lead(scene):
    facts = facts_of(*scene, INDICES)
    rng = np.random.default_rng(0)
    said = [content_phrase(facts, rng, most=1) for _ in range(400)]
    plain = sum(any(word in phrase for word in ("road", "sky", "car", "person", "people")) for phrase in said)
    assert 0.6 < plain / len(said) < 0.97


def test_captions_follow_style_weather_and_time(scene):
    rng = np.random.default_rng(1)
    said = [caption(facts_of(*scene, INDICES), rng) for _ in range(200)]
    assert sum("paint" in text or "art" in text for text in said) == len(said)
    assert sum("rain" in text or "wet" in text for text in said) > 10
    assert sum("night" in text or "dark" in text for text in said) > 30


def test_template_gets_a_bare_noun_after_its_article(scene):
    rng = np.random.default_rng(2)
    facts = facts_of(*scene, INDICES)
    for _ in range(100):
        text = caption(facts, rng, "a photo of a {}.")
        assert text.startswith("a photo of a ") and text.endswith(".") and " a a " not in text and " a an " not in text
    assert noun_phrase(["train"], np.random.default_rng(4)) in words_of("train")


def test_the_same_generator_gives_the_same_caption(scene):
    facts = facts_of(*scene, INDICES)
    said = [[caption(facts, np.random.default_rng(seed)) for seed in range(20)] for _ in range(2)]
    assert said[0] == said[1] and len(set(said[0])) > 10


def test_rendered_facts_agree_with_the_labels(pictures):
    found = pictures["photo"]
    for k in range(len(found.labels)):
        facts = facts_of(found.labels[k], found.instances[k], {n: v[k] for n, v in found.facts.items()})
        for name, count in facts["classes"].items():
            assert count == found.facts["pixels"][k][CLASSES.index(name)]
        assert all(o["class"] in facts["classes"] for o in facts["objects"])


def test_crop_facts_and_caption_take_less_than_a_millisecond(scene):
    whole = facts_of(*scene, INDICES)
    rng = np.random.default_rng(0)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        caption(crop_facts(*scene, whole, (5, 5, 55, 100)), rng)
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3


def test_captions_import_no_jax():
    code = "import sys, fmda.world.captions; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
