import jax.numpy as jnp
import numpy as np
import pytest

from fmda.nn.resize import apply_matrices, interpolation_matrix, resize


def test_bilinear_doubling_has_quarter_weights_and_clamped_edges():
    expected = [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
    np.testing.assert_allclose(interpolation_matrix(2, 4), expected)


def test_bicubic_midpoint_weights_are_those_of_a_minus_three_quarters():
    # Halving eight samples samples half-way between two of them: -3/32, 19/32, 19/32, -3/32 for a = -0.75.
    row = interpolation_matrix(8, 4, "bicubic")[1]
    np.testing.assert_allclose(row, [0, -3 / 32, 19 / 32, 19 / 32, -3 / 32, 0, 0, 0], atol=1e-7)


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize("sizes", [(7, 7), (14, 28), (14, 9), (3, 1), (1, 5)])
def test_rows_sum_to_one_and_equal_sizes_are_the_identity(kind, sizes):
    matrix = interpolation_matrix(*sizes, kind)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
    if sizes[0] == sizes[1]:
        np.testing.assert_array_equal(matrix, np.eye(sizes[0]))


def test_align_corners_keeps_both_ends():
    matrix = interpolation_matrix(3, 5, align_corners=True)
    np.testing.assert_allclose(matrix @ [0.0, 1.0, 2.0], [0, 0.5, 1, 1.5, 2])


def test_another_scale_shifts_the_places():
    plain = interpolation_matrix(14, 28) @ np.arange(14.0)
    shifted = interpolation_matrix(14, 28, scale=28.1 / 14) @ np.arange(14.0)
    assert shifted[14] == pytest.approx(14.5 * 14 / 28.1 - 0.5)
    assert plain[14] == pytest.approx(6.75)


def test_resize_of_a_ramp_stays_a_ramp_and_keeps_the_dtype():
    ramp = jnp.broadcast_to(jnp.arange(8.0)[None, None, :, None], (1, 4, 8, 2)).astype(jnp.bfloat16)
    small = resize(ramp, (2, 4))
    assert small.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(small[0, 0, :, 0], np.float32), [0.5, 2.5, 4.5, 6.5])


def test_matrices_apply_to_height_and_width():
    x = jnp.arange(6.0).reshape(1, 2, 3, 1)
    y = apply_matrices(x, jnp.array([[1.0, 1.0]]), jnp.array([[1.0, 0.0, 0.0], [0.0, 0.0, 2.0]]))
    np.testing.assert_array_equal(y[0, :, :, 0], [[3, 14]])


def test_bad_requests_raise():
    with pytest.raises(ValueError, match="bilinear"):
        interpolation_matrix(2, 4, "nearest")
    with pytest.raises(ValueError, match="0 samples"):
        interpolation_matrix(0, 4)
