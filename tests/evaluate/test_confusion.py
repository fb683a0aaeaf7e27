import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmda.errors import UserError
from fmda.evaluate.confusion import Scores, batch_confusion, confusion_matrix

LABELS = np.array([[0, 0, 1], [1, 2, 255]], np.uint8)
GUESS = np.array([[0, 1, 1], [1, 255, 0]], np.uint8)


def empty(*names):
    """Returns the scores of no pixel."""
    return Scores.from_confusion(np.zeros((len(names), len(names))), names)


def test_counts_by_hand():
    matrix = confusion_matrix(LABELS, GUESS, 3)
    assert matrix.dtype == np.int64
    assert matrix.tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]


def test_void_column_holds_labelled_pixels_without_prediction():
    matrix = confusion_matrix(LABELS, GUESS, 3, void=True)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1]]
    scores = Scores.from_confusion(matrix, ("a", "b", "c"))
    assert scores.iou.tolist() == [0.5, 2 / 3, 0.0]
    assert scores.accuracy == 3 / 5


def test_scores_by_hand():
    scores = Scores.from_confusion(np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]]), ("road", "sky", "train"))
    np.testing.assert_allclose(scores.iou[:2], [6 / 9, 3 / 6])
    assert np.isnan(scores.iou[2])
    assert scores.miou == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert scores.accuracy == pytest.approx(9 / 12)
    assert scores.mean_accuracy == pytest.approx((6 / 8 + 3 / 4) / 2)
    assert scores.precision[:2].tolist() == [6 / 7, 3 / 5]
    assert scores.frequency_weighted_iou == pytest.approx(8 / 12 * 6 / 9 + 4 / 12 * 3 / 6)


def test_predicted_but_unlabelled_class_counts_as_zero():
    scores = Scores.from_confusion(np.array([[1, 1], [0, 0]]), ("a", "b"))
    assert scores.iou.tolist() == [0.5, 0.0]
    assert scores.miou == 0.25


def test_no_pixels_give_nan_without_warning():
    scores = empty("a", "b")
    assert np.isnan([scores.miou, scores.accuracy, scores.mean_accuracy, scores.frequency_weighted_iou]).all()


@pytest.mark.parametrize(
    ("labels", "guess", "word"),
    [
        (np.array([37], np.uint8), np.array([0], np.uint8), "label value 37"),
        (np.array([0], np.uint8), np.array([3], np.uint8), "prediction value 3"),
        (np.array([-1]), np.array([0]), "label value -1"),
        (np.array([0]), np.array([300]), "prediction value 300"),
        (np.array([0.0]), np.array([0]), "type float64"),
        (np.array([0, 1]), np.array([0]), "shape"),
    ],
)
def test_bad_values_are_one_line_errors(labels, guess, word):
    with pytest.raises(UserError, match=word) as caught:
        confusion_matrix(labels, guess, 3)
    assert "\n" not in str(caught.value)


def test_batch_confusion_equals_numpy_under_jit_and_sharded():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, (8, 5, 7)).astype(np.uint8)
    labels[labels == 5] = 255
    guess = rng.integers(0, 6, (8, 5, 7)).astype(np.int32)
    guess[guess == 5] = 255
    for void in (False, True):
        count = jax.jit(lambda a, b, void=void: batch_confusion(a, b, 5, void=void))
        expected = confusion_matrix(labels, guess, 5, void=void)
        got = count(jnp.asarray(labels), jnp.asarray(guess))
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, expected)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        split = jax.NamedSharding(mesh, jax.P("data"))
        np.testing.assert_array_equal(count(jax.device_put(labels, split), jax.device_put(guess, split)), expected)


def test_batch_confusion_drops_strays():
    got = batch_confusion(jnp.array([0, 9, -1, 1]), jnp.array([0, 0, 1, 7]), 2)
    assert got.tolist() == [[1, 0], [0, 0]]


pairs = st.lists(st.tuples(st.sampled_from([0, 1, 2, 255]), st.sampled_from([0, 1, 2, 255])), max_size=30)


def scores_of(pixels):
    array = np.array(pixels, np.uint8).reshape(-1, 2)
    return Scores.from_confusion(confusion_matrix(array[:, 0], array[:, 1], 3, void=True), ("a", "b", "c"))


@settings(max_examples=40, deadline=None)
@given(pairs, pairs, pairs)
def test_addition_is_associative_commutative_and_equals_one_pass(x, y, z):
    a, b, c = scores_of(x), scores_of(y), scores_of(z)
    assert (a + b) + c == a + (b + c) == (c + b) + a == scores_of(x + y + z)
    assert a + empty(*a.names) == a


@settings(max_examples=40, deadline=None)
@given(pairs)
def test_json_round_trip_and_bounds(pixels):
    scores = scores_of(pixels)
    assert Scores.from_json(json.loads(json.dumps(scores.to_json()))) == scores
    values = scores.iou[~np.isnan(scores.iou)]
    assert ((values >= 0) & (values <= 1)).all()


def test_json_holds_null_for_an_absent_class():
    data = Scores.from_confusion(np.array([[1, 0], [0, 0]]), ("a", "b")).to_json()
    assert data["iou"] == {"a": 1.0, "b": None}
    with pytest.raises(UserError, match="old.json: holds no confusion"):
        Scores.from_json({"miou": 0.5}, "old.json")


def test_addition_of_different_lists_is_refused():
    with pytest.raises(UserError, match="different class lists"):
        empty("a") + empty("b")


def test_table_prints_percent_with_two_digits():
    lines = Scores.from_confusion(np.array([[2, 1, 0], [0, 1, 0], [0, 0, 0]]), ("road", "sky", "train")).table()
    rows = {line.split("  ")[0].strip(): line.split()[-4:] for line in lines.splitlines()[1:4]}
    assert rows["road"] == ["66.67", "66.67", "100.00", "75.00"]
    assert rows["train"][0] == "-"
    assert "mIoU                     58.33" in lines
