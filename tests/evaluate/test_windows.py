import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmda.errors import UserError
from fmda.evaluate.windows import labels_at, resize_scores, sliding_window, window_starts


@pytest.mark.parametrize(
    ("length", "crop", "stride", "expected"),
    [
        (896, 448, 224, [0, 224, 448]),
        (448, 448, 224, [0]),
        (597, 448, 224, [0, 149]),
        (300, 448, 224, [0]),
        (480, 224, 112, [0, 112, 224, 256]),
    ],
)
def test_starts(length, crop, stride, expected):
    assert window_starts(length, crop, stride) == expected


def test_starts_of_a_street_image_at_small_windows():
    x, y = window_starts(1120, 224, 112), window_starts(560, 224, 112)
    assert (len(x), len(y), x[-1], y[-1]) == (9, 4, 896, 336)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 60), st.integers(1, 60))
def test_windows_cover_the_side_when_stride_fits(length, crop, stride):
    starts = window_starts(length, crop, stride)
    assert starts[0] == 0
    assert starts[-1] == max(length - crop, 0)
    assert starts == sorted(starts)
    if stride <= crop:
        assert all(b - a <= crop for a, b in zip(starts, starts[1:], strict=False))


def test_bad_stride_is_an_error():
    with pytest.raises(UserError, match="stride 0"):
        window_starts(10, 5, 0)


def test_pointwise_forward_is_reproduced_and_batches_are_fixed():
    image = np.random.default_rng(0).normal(size=(11, 17, 2)).astype(np.float32)
    seen = []

    def forward(windows):
        seen.append(windows.shape)
        return np.concatenate([windows, windows[..., :1] * 2], -1)

    scores = sliding_window(forward, image, 6, 4, batch_size=4)
    np.testing.assert_allclose(scores, np.concatenate([image, image[..., :1] * 2], -1), rtol=1e-6)
    assert set(seen) == {(4, 6, 6, 2)}
    assert len(seen) == 3  # 3 x 4 windows


def test_overlaps_are_averaged_by_coverage():
    def forward(windows):  # each window answers with its own first pixel
        return np.broadcast_to(windows[:, :1, :1], windows.shape)

    image = np.arange(6, dtype=np.float32)[None, :, None]
    scores = sliding_window(forward, image, (1, 4), (1, 2), batch_size=3)
    assert scores[0, :, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_coarse_scores_are_stretched_to_the_window_and_to_the_size():
    image = np.zeros((4, 8, 3), np.float32)
    patch = np.array([[0.0, 4.0]], np.float32)[None, :, :, None]
    scores = sliding_window(lambda w: np.repeat(patch, len(w), 0), image, (4, 8), 8, batch_size=2, size=(6, 8))
    assert scores.shape == (6, 8, 1)
    np.testing.assert_allclose(scores[3, :, 0], [0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4])


def test_image_smaller_than_the_crop():
    image = np.ones((3, 5, 1), np.float32)
    scores = sliding_window(lambda w: w * 3, image, 8, 4, batch_size=2)
    assert scores.shape == (3, 5, 1)
    assert (scores == 3).all()


@pytest.mark.parametrize("size", [(9, 14), (3, 4), (5, 7), (5, 20)])
def test_resize_follows_half_pixel_bilinear(size):
    scores = np.random.default_rng(1).normal(size=(5, 7, 6)).astype(np.float32)

    def matrix(n_in, n_out):
        centre = np.clip((np.arange(n_out) + 0.5) * n_in / n_out - 0.5, 0, n_in - 1)
        return np.maximum(0, 1 - np.abs(centre[:, None] - np.arange(n_in)))

    expected = np.einsum("ai,ijk,bj->abk", matrix(5, size[0]), scores, matrix(7, size[1]))
    np.testing.assert_allclose(resize_scores(scores, size), expected, atol=1e-5)
    np.testing.assert_array_equal(labels_at(scores, size, rows=2), resize_scores(scores, size).argmax(-1))


def test_more_classes_than_opencv_takes_at_once():
    scores = np.random.default_rng(2).normal(size=(2, 3, 700)).astype(np.float32)
    wide = resize_scores(scores, (2, 6))
    assert wide.shape == (2, 6, 700)
    np.testing.assert_allclose(wide[:, 0], scores[:, 0], atol=1e-6)


def test_ties_go_to_the_lowest_class():
    assert labels_at(np.ones((2, 2, 3), np.float32), (4, 4)).max() == 0
