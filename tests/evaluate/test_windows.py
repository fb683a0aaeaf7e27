import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_windows import resize_scores, sliding_window

from fmda.errors import UserError
from fmda.evaluate import Predictor, Protocol, windows
from fmda.evaluate.windows import Side, window_starts


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


def test_the_size_that_a_network_sees():
    def seen(**keys):
        return windows.network_size((375, 1242), Protocol(**keys))

    assert seen() == (375, 1242)
    assert seen(resize=(1024, 512)) == (309, 1024)
    assert seen(scale=1.25, multiple=32) == (480, 1568)
    assert seen(scale=0.01, multiple=16) == (16, 16)
    assert seen(size=(512, 1024), scale=0.5, multiple=10) == (260, 510)


def test_an_image_is_resized_by_the_library_that_the_protocol_names():
    image = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    opencv, pillow = (
        windows.WindowGrid.of((40, 48), Protocol(scale=0.25, resample=name)).prepare(image)
        for name in ("opencv", "pillow")
    )
    # Pillow averages where it shrinks, so that noise is smaller
    assert pillow[:10, :12].std() < 0.5 * opencv[:10, :12].std()


def test_bad_stride_is_an_error():
    with pytest.raises(UserError, match="stride 0"):
        window_starts(10, 5, 0)


def dense(side):
    """Returns the matrix of a side from its blocks."""
    sources, weights = side.resampling(side.window, 16)
    matrix = np.zeros((weights.shape[0] * 16, len(side.starts) * side.window), np.float32)
    for block, (columns, values) in enumerate(zip(sources, weights, strict=True)):
        np.add.at(matrix[block * 16 : (block + 1) * 16], (slice(None), columns), values)
    return matrix


def test_blocks_hold_the_average_of_overlapping_windows():
    matrix = dense(Side(6, 6, 4, (0, 2)))
    assert matrix.shape == (64, 8)
    assert matrix[:6].tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 0.5, 0, 0.5, 0, 0, 0],
        [0, 0, 0, 0.5, 0, 0.5, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]
    assert not matrix[6:].any()


def test_a_side_is_computed_once():
    assert Side(90, 60, 40, (0, 20)).resampling(10, 16) is Side(90, 60, 40, (0, 20)).resampling(10, 16)


def coarse(params, pixels):
    """Returns scores at a quarter of the resolution that also depend on the place in the window."""
    n, h, w, _ = pixels.shape
    cells = pixels[:, : h // 4 * 4, : w // 4 * 4].reshape(n, h // 4, 4, w // 4, 4, 3).mean((2, 4)) / 255
    ramp = jnp.linspace(0, 1, cells.shape[2])[None, None, :, None]
    return cells @ params + ramp * params[:1, None, None]


PARAMS = np.random.default_rng(5).normal(size=(3, 7)).astype(np.float32)


def assert_equal_but_for_ties(labels, scores):
    """Asserts that each label has the largest score, up to rounding."""
    chosen = np.take_along_axis(scores, labels[..., None].astype(np.int64), -1)[..., 0]
    np.testing.assert_allclose(chosen, scores.max(-1), atol=2e-5)
    assert (labels == scores.argmax(-1)).mean() > 0.995


@pytest.mark.parametrize(
    ("size", "protocol"),
    [
        ((70, 90), Protocol(crop=32, stride=20)),
        ((70, 90), Protocol(resize=(64, 48), crop=32, stride=32)),
        ((33, 150), Protocol(resize=(200, 40), crop=64, stride=40)),
        ((40, 52), Protocol()),
        ((40, 52), Protocol(resize=(80, 64), crop=24, stride=16, flip=True)),
    ],
)
def test_predictions_are_those_of_windows_in_numpy(size, protocol):
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    labels, best = Predictor(coarse, PARAMS, protocol)(image)
    scores = sliding_window(lambda windows: coarse(PARAMS, jnp.asarray(windows)), image, protocol)
    assert labels.shape == best.shape == size
    assert_equal_but_for_ties(labels, scores)
    np.testing.assert_allclose(best, scores.max(-1), atol=2e-5)


@pytest.mark.parametrize("rows", [16, 64, 128])
def test_the_size_of_blocks_changes_no_label(monkeypatch, rows):
    image = np.random.default_rng(1).integers(0, 256, (120, 90, 3), np.uint8)
    protocol = Protocol(resize=(100, 80), crop=32, stride=20)
    labels, best = Predictor(coarse, PARAMS, protocol)(image)
    monkeypatch.setattr(windows, "ROWS", rows)
    others, scores = Predictor(coarse, PARAMS, protocol)(image)
    np.testing.assert_array_equal(others, labels)
    np.testing.assert_allclose(scores, best, atol=2e-5)


def test_mirrored_windows_are_turned_back():
    image = np.random.default_rng(1).integers(0, 256, (32, 48, 3), np.uint8)
    protocol = Protocol(flip=True)
    labels, _ = Predictor(coarse, PARAMS, protocol)(image)
    mirrored, _ = Predictor(coarse, PARAMS, protocol)(np.ascontiguousarray(image[:, ::-1]))
    assert (mirrored[:, ::-1] == labels).mean() > 0.995


def test_ties_go_to_the_lowest_class():
    image = np.zeros((20, 30, 3), np.uint8)
    labels, best = Predictor(lambda params, x: jnp.full((len(x), 4, 4, 5), 2.0), (), Protocol(crop=8, stride=8))(image)
    assert labels.max() == 0 and (best == 2).all()


def test_many_classes_and_images_of_similar_size_share_a_program():
    calls = []

    def forward(params, pixels):
        calls.append(pixels.shape)
        return jnp.zeros((len(pixels), 8, 8, 200)).at[..., 150].set(1.0)

    predictor = Predictor(forward, (), Protocol(resize=(64, 32), crop=32, stride=24))
    for size in ((68, 136), (70, 140), (72, 144)):
        assert (predictor(np.zeros((*size, 3), np.uint8))[0] == 150).all()
    assert len(calls) == 2  # once for the shape of the scores, once compiled


def test_scores_of_another_form_are_refused():
    with pytest.raises(UserError, match=r"return scores \[N, h, w, K\]"):
        Predictor(lambda params, x: x.mean((1, 2)), (), Protocol())(np.zeros((8, 8, 3), np.uint8))


def test_the_numpy_reference_resizes_like_torch():
    scores = np.arange(4, dtype=np.float32).reshape(1, 2, 2)
    np.testing.assert_allclose(resize_scores(scores, (1, 4))[0, :, 0], [0, 0.5, 1.5, 2])
