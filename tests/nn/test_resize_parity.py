"""Values are of unit size; torch computes places in float32, which moves samples by about 1e-6 of their distance."""

import jax.numpy as jnp
import numpy as np
import pytest

from fmda.nn.resize import apply_matrices, interpolation_matrix, resize

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(14, 14), (28, 28), (7, 33), (5, 3), (1, 2), (45, 13)])
@pytest.mark.parametrize("align_corners", [False, True])
def test_resize_equals_torch(kind, size, align_corners):
    import torch

    x = np.random.default_rng(0).normal(size=(2, 14, 13, 3)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(x).permute(0, 3, 1, 2), size=size, mode=kind, align_corners=align_corners
    )
    ours = resize(jnp.asarray(x), size, kind, align_corners=align_corners)
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=1e-5)


def test_scale_factor_equals_torch_when_it_is_not_recomputed():
    import torch

    x = np.random.default_rng(0).normal(size=(1, 14, 14, 2)).astype(np.float32)
    scales = (28.1 / 14, 21.1 / 14)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(x).permute(0, 3, 1, 2), scale_factor=scales, mode="bicubic", recompute_scale_factor=False
    )
    rows = interpolation_matrix(14, 28, "bicubic", scale=scales[0])
    columns = interpolation_matrix(14, 21, "bicubic", scale=scales[1])
    ours = apply_matrices(jnp.asarray(x), jnp.asarray(rows), jnp.asarray(columns))
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=1e-5)
