"""Filters of prompts and images: scores by hand, thresholds, what they refuse to judge, and their settings."""

import json

import numpy as np
import pytest

from fmda.diffusion.filters import (
    BannedWords,
    ClassPresence,
    ClipScore,
    ComparingFilter,
    ConstantImage,
    DuplicatePrompt,
    ImageFilter,
    LongPrompt,
    NearDuplicate,
    choose_prompts,
    normalised,
)
from fmda.diffusion.manifest import Prompt
from fmda.errors import UserError


def flat(*levels):
    """Returns one constant image for each level."""
    return np.stack([np.full((4, 6, 3), level, np.uint8) for level in levels])


def reasons(verdicts):
    return [verdict.why for verdict in verdicts]


def test_constant_images_are_refused_whatever_their_colour():
    images = np.concatenate([flat(0, 255, 128), flat(90, 90)])
    images[2, ..., 0] = 7  # a plain colour
    images[3, ..., 1] += np.uint8(4) * (np.arange(6) % 2 == 0).astype(np.uint8)  # 90 and 94 by turns: spread 2
    images[4, :2] = 30
    verdicts = ConstantImage(least=2.0).judge(images, [Prompt("x")] * 5)
    assert [v.score for v in verdicts] == [0.0, 0.0, 0.0, 2.0, 30.0]
    assert reasons(verdicts)[3:] == [None, None]
    assert reasons(verdicts)[0] == "spread of levels is 0.0, below 2.0" and None not in reasons(verdicts)[:3]


def test_clip_score_meets_its_threshold_rounded():
    table = {"a": 0.24999, "b": 0.25004, "c": 0.2, "d": np.nan}
    judged = ClipScore(lambda images, texts: [table[t] for t in texts], least=0.25, model="m")
    verdicts = judged.judge(flat(1, 2, 3, 4), [Prompt(t) for t in table])
    assert [v.score for v in verdicts] == [0.25, 0.25, 0.2, None]
    assert reasons(verdicts)[:2] == [None, None]
    assert reasons(verdicts)[2:] == [
        "score of image and prompt is 0.2, below 0.25",
        "score of image and prompt is no number, below 0.25",
    ]
    assert judged.settings == {"least": 0.25, "model": "m"}


@pytest.mark.parametrize("shares", [[[0.3, 0.0, 0.7]] * 4, [[True, False, True]] * 4])
def test_class_presence_asks_for_the_prompts_class_alone(shares):
    prompts = [Prompt("car", 0, "car"), Prompt("bus", 1, "bus"), Prompt("street"), Prompt("train", 2)]
    verdicts = ClassPresence(lambda images: np.asarray(shares), least=0.2).judge(flat(1, 2, 3, 4), prompts)
    assert reasons(verdicts) == [None, "share of class bus is 0.0, below 0.2", None, None]
    assert [v.score for v in verdicts] == [float(shares[0][0]), 0.0, None, float(shares[0][2])]


def test_class_presence_does_not_know_a_class():
    judged = ClassPresence(lambda images: np.ones((1, 3)), least=0.2)
    with pytest.raises(UserError, match="prompt 'kite' asks for class 3 of 3; give prompts the class indices"):
        judged.judge(flat(1), [Prompt("kite", 3)])


def test_near_duplicates_are_found_by_the_cosine():
    table = {1: [3.0, 0.0], 2: [3.0, 4.0], 3: [0.0, -2.0], 4: [0.0, 0.0], 5: [np.nan, 1.0]}
    one = NearDuplicate(lambda images: np.array([table[i[0, 0, 0]] for i in images]), most=0.6)
    rows = one.features(flat(1, 2, 3, 4, 5))
    np.testing.assert_allclose(rows[:4], [[1, 0], [0.6, 0.8], [0, -1], [0, 0]])
    assert one.compare(rows[0], rows[:0]) == (None, 0.6, None)
    assert one.compare(rows[1], rows[:1]) == (0.6, 0.6, None)
    assert one.compare(rows[1], np.array([[0, 1.0], [0.8, 0.6]])).why == "cosine 0.96 to image 1 is above 0.6"
    assert one.compare(rows[3], rows[:3]).why is None
    assert one.compare(rows[4], rows[:3]).why == "embedding is no number"


def test_a_function_of_another_shape_is_a_fault_of_the_program():
    with pytest.raises(ValueError, match=r"clip_score: the function returned shape \(1,\), expected \(2,\)"):
        ClipScore(lambda images, texts: [0.1], least=0).judge(flat(1, 2), [Prompt("a")] * 2)


def test_kinds_of_filters_are_told_apart():
    images = [ConstantImage(), ClipScore(len, 0.1), ClassPresence(len, 0.1)]
    assert all(isinstance(one, ImageFilter) and not isinstance(one, ComparingFilter) for one in images)
    duplicate = NearDuplicate(len, 0.9)
    assert isinstance(duplicate, ComparingFilter) and not isinstance(duplicate, ImageFilter)


def test_settings_are_plain_and_names_differ():
    filters = [ConstantImage(), ClipScore(len, 0.1), ClassPresence(len, 0.1), NearDuplicate(len, 0.9)]
    filters += [DuplicatePrompt(), BannedWords(("b", "A")), LongPrompt(len)]
    plain = [json.loads(json.dumps(one.settings)) for one in filters]
    assert plain == [one.settings for one in filters] and plain[5] == {"words": ["a", "b"]}
    assert len({one.name for one in filters}) == len(filters)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("A photo of  a Street.", "a photo of a street"),
        ("STRASSE, straße!", "strasse strasse"),
        ("rain\u2014night\u2028fog", "rain night fog"),
        ("ＣＡＲ №5", "car no5"),
        ("हिन्दी", "हिन्दी"),
        ("...", ""),
    ],
)
def test_texts_are_compared_without_case_and_punctuation(text, plain):
    assert normalised(text) == plain


def test_prompts_are_filtered_in_order_and_keep_their_numbers():
    prompts = [
        Prompt("A bus."), Prompt("a nude bus"), Prompt("a  BUS"), Prompt("a bus", 7, "bus"),
        Prompt("one two three four"), Prompt("NUDE, indeed"), Prompt("a denuded hill"),
    ]  # fmt: skip
    cycle, refused = choose_prompts(
        prompts, [BannedWords(("nude",)), DuplicatePrompt(), LongPrompt(lambda t: len(t.split()), 3)]
    )
    assert [index for index, _ in cycle] == [0, 3, 6]
    assert [(row["prompt_index"], row["filter"], row["why"]) for row in refused] == [
        (1, "banned_words", "holds 'nude'"),
        (2, "duplicate_prompt", "says the same as 'A bus.'"),
        (4, "long_prompt", "4 tokens, more than 3"),
        (5, "banned_words", "holds 'nude'"),
    ]
    assert refused[2]["score"] == 4 and refused[2]["threshold"] == 3 and refused[2]["index"] is None


def test_what_was_banned_is_no_earlier_prompt():
    cycle, _ = choose_prompts([Prompt("a red car"), Prompt("red car")], [BannedWords(("a red",)), DuplicatePrompt()])
    assert [prompt.text for _, prompt in cycle] == ["red car"]


@pytest.mark.parametrize(
    ("prompts", "filters", "message"),
    [
        ([], [], "prompts: none given; give at least one"),
        (["a bad", "bad"], [BannedWords(("bad",))], r"refuse all 2, such as 'a bad' \(banned_words: holds 'bad'\); ch"),
    ],
)
def test_no_prompt_is_an_error(prompts, filters, message):
    with pytest.raises(UserError, match=message):
        choose_prompts([Prompt(text) for text in prompts], filters)


def test_a_banned_word_of_punctuation_is_named():
    with pytest.raises(UserError, match="banned_words: '!' is no word; leave it out"):
        BannedWords(("night", "!"))
