import numpy as np
import pytest

from fmda.errors import UserError
from fmda.evaluate.overlay import comparison, error_map, legend, overlay, shrink

LABELS = np.array([[0, 0, 255], [2, 2, 255]], np.uint8)
GREY = np.full((2, 3, 3), 100, np.uint8)


def test_overlay_mixes_inside_and_leaves_void_alone(classes):
    result = overlay(GREY, LABELS, classes, alpha=0.5)
    assert result[0, 0].tolist() == [114, 82, 114]  # half of (128, 64, 128) and of grey 100
    assert overlay(GREY, np.full((2, 3), 255), classes).tolist() == GREY.tolist()


def test_overlay_of_another_size_is_refused(classes):
    with pytest.raises(UserError, match="image is 3x2 but its label map 4x4"):
        overlay(GREY, np.zeros((4, 4), np.uint8), classes)


def test_legend_wraps_and_shows_the_swatch(classes):
    wide, narrow = legend(classes, 600), legend(classes, 80)
    assert wide.shape[1] == 600
    assert narrow.shape[0] > wide.shape[0]
    assert (wide == classes.palette[1]).all(-1).sum() > 50
    assert not (legend(classes, 600, [0]) == classes.palette[1]).all(-1).any()


def test_errors_are_red_truth_void_white(classes):
    guess = np.array([[0, 1, 1], [2, 2, 2]], np.uint8)
    result = error_map(LABELS, guess, classes)
    assert result[0, 1].tolist() == [214, 40, 57]
    assert (result[:, 2] == 255).all()
    assert result[0, 0].tolist() == result[1, 1].tolist() != [214, 40, 57]


def test_comparison_has_a_tile_for_each_part(classes):
    image = np.zeros((20, 30, 3), np.uint8)
    labels = np.zeros((20, 30), np.uint8)
    row = comparison(image, labels, labels, classes, width=30)
    assert row.shape[1] == 4 * 30 + 3 * 4
    np.testing.assert_array_equal(row[-1, 34 + 15], classes.palette[0])


def test_shrink_averages_and_never_enlarges():
    image = np.array([[[0] * 3, [200] * 3]], np.uint8).repeat(2, 0)
    assert shrink(image, 1).tolist() == [[[100, 100, 100]]]
    assert shrink(image, 5) is image
