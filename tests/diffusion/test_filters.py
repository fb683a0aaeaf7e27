"""Filters of prompts and images: scores by hand, thresholds, what they do not judge, and their settings."""

import numpy as np
import pytest

from fmda.diffusion.filters import (
    CONSTANT,
    ImageFilter,
    NearDuplicate,
    banned_words,
    choose_prompts,
    duplicate_prompt,
    long_prompt,
    normalised,
    similar_prompt,
    textured,
    unclipped,
)
from fmda.diffusion.manifest import Prompt, Verdict
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
    verdicts = CONSTANT.judge(images, [Prompt("x")] * 5)
    assert [v.score for v in verdicts] == [0.0, 0.0, 0.0, 2.0, 30.0]
    assert reasons(verdicts)[3:] == [None, None]
    assert reasons(verdicts)[0] == "spread of levels is 0.0, below 2.0" and None not in reasons(verdicts)[:3]


def test_scores_meet_their_threshold_rounded():
    table = {"a": 0.24999, "b": 0.25004, "c": 0.2, "d": np.nan, "e": None}
    one = ImageFilter("match", "cosine", lambda images, prompts: [table[p.text] for p in prompts], 0.25, "m")
    verdicts = one.judge(flat(1, 2, 3, 4, 5), [Prompt(t) for t in table])
    assert [v.score for v in verdicts] == [0.25, 0.25, 0.2, None, None]
    assert reasons(verdicts) == [None, None, "cosine is 0.2, below 0.25", "cosine is not finite", None]
    assert one.settings == {"least": 0.25, "model": "m"}


def test_clipped_pixels_are_those_black_or_white_in_all_channels():
    images = flat(100, 100, 255, 0, 100)
    images[1, :2] = [255, 0, 255]  # half of the rows
    images[2, :, :3] = [255, 254, 255]
    images[4, 0, 0] = [0, 0, 7]
    verdicts = unclipped(0.6).judge(images, [Prompt("x")] * 5)
    assert [v.score for v in verdicts] == [1.0, 0.5, 0.5, 0.0, 1.0]
    assert reasons(verdicts)[:2] == [None, "share of pixels that are not clipped is 0.5, below 0.6"]


def test_tiles_of_one_colour_are_counted():
    noise = np.random.default_rng(0).integers(0, 256, (33, 48, 3), np.uint8)
    images = np.stack([noise, noise, noise, np.zeros_like(noise)])
    images[1, :, 24:] = 128  # half of the tiles
    images[2, :, 24:] = 128 + np.arange(24)[:, None] % 2  # spread 0.5: as good as one colour
    verdicts = textured(0.9).judge(images, [Prompt("x")] * 4)
    assert [v.score for v in verdicts] == [1.0, 0.5, 0.5, 0.0]
    assert reasons(verdicts)[:2] == [None, "share of tiles with content is 0.5, below 0.9"]


def test_only_the_rows_in_question_get_a_verdict():
    one = ImageFilter("level", "level", lambda images, prompts: images.mean((1, 2, 3)).tolist(), 20)
    assert [v.score for v in one.judge(flat(10, 20, 30), [Prompt("x")] * 3, [2, 0])] == [30.0, 10.0]


def test_similar_prompts_share_words_with_a_kept_one_of_their_class():
    texts = [
        ("a red bus at night", 0), ("A red bus, at night!", 0), ("a red bus at dawn", 0), ("a red bus at night", 1),
        ("a red car at dawn", 0), ("", 0), ("", 0),
    ]  # fmt: skip
    verdicts = similar_prompt(0.6).judge([Prompt(text, k) for text, k in texts])
    # 5 of 5 words; 4 of 6; another class; 3 of 7 with the first, as the third is not kept
    assert [v.score for v in verdicts] == [0.0, 1.0, 0.6667, 0.0, 0.4286, 0.0, 0.0]
    assert reasons(verdicts) == [None, *["similar to 'a red bus at night'"] * 2, None, None, None, None]


def test_near_duplicates_are_found_by_the_cosine():
    table = {1: [3.0, 0.0], 2: [3.0, 4.0], 3: [0.0, -2.0], 4: [0.0, 0.0], 5: [np.nan, 1.0]}
    one = NearDuplicate(lambda images: np.array([table[i[0, 0, 0]] for i in images]), most=0.6)
    rows = one.embeddings(flat(1, 2, 3, 4, 5))
    np.testing.assert_allclose(rows[:4], [[1, 0], [0.6, 0.8], [0, -1], [0, 0]])
    assert one.compare(rows[0], rows[:0]) == Verdict(None, 0.6)
    assert one.compare(rows[1], rows[:1]) == Verdict(0.6, 0.6)
    assert one.compare(rows[1], np.array([[0, 1.0], [0.8, 0.6]])).why == "cosine 0.96 to image 1 is above 0.6"
    assert one.compare(rows[3], rows[:3]).why is None
    assert one.compare(rows[4], rows[:3]).why == "embedding is not finite"


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
        prompts, [banned_words(("nude",)), duplicate_prompt(), long_prompt(lambda t: len(t.split()), 3)]
    )
    assert [index for index, _ in cycle] == [0, 3, 6]
    assert [(row.prompt_index, row.filter, row.why) for row in refused] == [
        (1, "banned_words", "contains 'nude'"),
        (2, "duplicate_prompt", "duplicate of 'A bus.'"),
        (4, "long_prompt", "4 tokens, more than 3"),
        (5, "banned_words", "contains 'nude'"),
    ]
    assert refused[2].score == 4 and refused[2].threshold == 3 and refused[2].index is None


def test_what_was_banned_is_no_earlier_prompt():
    cycle, _ = choose_prompts([Prompt("a red car"), Prompt("red car")], [banned_words(("a red",)), duplicate_prompt()])
    assert [prompt.text for _, prompt in cycle] == ["red car"]


def test_no_prompt_is_an_error():
    with pytest.raises(UserError, match=r"refuse all 2, such as 'a bad' \(banned_words: contains 'bad'\); change"):
        choose_prompts([Prompt("a bad"), Prompt("bad")], [banned_words(("bad",))])


def test_a_banned_word_of_punctuation_is_named():
    with pytest.raises(UserError, match="banned_words: '!' is no word; leave it out"):
        banned_words(("night", "!"))
