"""Experts' scores computed where they are needed give the same fused map as all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from floss_small import picture, small_tower, table
from scipy.ndimage import gaussian_filter

from fmda.methods.floss import fusion
from fmda.methods.floss.chain import linear_taps
from fmda.methods.floss.experts import expert_probabilities
from fmda.methods.floss.hosts import host_for
from fmda.methods.floss.predict import MANY, Chain, cropped, fused_maps


def _unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def _case(seed, classes, size, smooth, dim=12):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(*size, dim))
    if smooth:
        features = gaussian_filter(features, (1.5, 1.5, 0))
    names = rng.normal(size=(1, classes, dim))
    return _unit(features), _unit(names + 0.5 * rng.normal(size=(classes + 1, classes, dim)))


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("classes", [3, 30])
def test_the_fused_map_is_the_same(classes, smooth):
    features, experts = _case(classes, classes, (9, 8), smooth)
    rows, columns = linear_taps(9, 72), linear_taps(8, 64)

    @jax.jit
    def both(f, e):
        everything = jax.nn.softmax(10 * jnp.einsum("hwd,ekd->ehwk", f, e, precision="highest"), -1)
        needed = expert_probabilities(f, e, 10.0, rows, columns)
        return needed[0], everything, fusion.fuse(*needed), fusion.fuse_reference(everything, rows, columns)

    needed, everything, fast, literal = map(np.asarray, both(features, experts))
    np.testing.assert_array_equal(fast.argmax(-1), literal.argmax(-1))
    np.testing.assert_allclose(fast, literal, atol=1e-6)
    computed = needed.sum(-1) > 0
    np.testing.assert_allclose(needed[computed], everything[computed], atol=1e-6)
    assert computed[-1].all()
    if smooth and classes == 30:
        assert computed.mean() < 0.7


def test_many_classes_go_this_way_and_keep_their_labels():
    host = host_for({"name": "maskclip", "crop": 32, "stride": 16, "long_max": 60, "short_max": 40})
    tower, image = small_tower(host), picture(2)
    words = table(8, MANY + 2, seed=1)
    rng = np.random.default_rng(0)
    experts = np.stack([*(words[rng.choice(8, 2, replace=False)].mean(0) for _ in range(MANY + 2)), words.mean(0)])
    (seen,) = tower.patches([image])
    chain, grid = Chain(host, tuple(range(MANY + 2))), tower.patch_grid(image)
    labels, reference = (
        cropped(fused_maps(chain, seen, experts, grid, form), grid)[0] for form in ("exact", "reference")
    )
    np.testing.assert_array_equal(labels, reference)
    assert len(np.unique(labels)) > 2
