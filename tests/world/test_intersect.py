"""Tests of the intersection tests against hand-computed hits, and of culling against none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmda.world.intersect import FAR, Rays, nearest_casters, nearest_hits, occlusion
from fmda.world.solids import Groups, solids

LIMITS = {"boxes": 8, "frusta": 8, "ellipsoids": 8, "cylinders": 8}


def rays(x, y, height=1.0):
    """Rays of directions (x, y, 1) in two strips."""
    x, y = jnp.asarray(x, jnp.float32).reshape(2, -1), jnp.asarray(y, jnp.float32).reshape(2, -1)
    one = jnp.ones_like(x)
    return Rays(x, y, one, jnp.float32(height), 0.0 * one, one)


def groups(**given):
    return Groups(**({name: solids(1) for name in Groups._fields} | given))


def test_box_is_entered_at_its_near_face():
    hits = nearest_hits(
        groups(boxes=solids(1, y=1.0, z=10.0, hx=1.0, hy=1.0, hz=2.0)), rays([0.01, 0.5], [1e-3, 1e-3]), LIMITS
    )
    assert float(hits.t[0, 0]) == pytest.approx(8.0, abs=1e-4)
    assert float(hits.t[1, 0]) == FAR and int(hits.which[1, 0]) == -1


def test_turned_box_shows_its_corner():
    turned = solids(1, y=1.0, z=10.0, hx=1.0, hy=1.0, hz=1.0, cos=np.cos(np.pi / 4), sin=np.sin(np.pi / 4))
    hits = nearest_hits(groups(boxes=turned), rays([1e-4, 1e-4], [1e-3, 1e-3]), LIMITS)
    assert float(hits.t[0, 0]) == pytest.approx(10.0 - np.sqrt(2.0), abs=2e-3)


def test_frustum_narrows_to_its_top():
    tent = groups(frusta=solids(1, y=1.0, z=10.0, hx=1.0, hy=1.0, hz=1.0, taper_z=1.0))
    hits = nearest_hits(tent, rays([1e-3, 1e-3], [-0.05, 1e-4]), LIMITS)
    # the front face leans: at height y it stands at z = 9 + y / 2, the ray is at y = 1 - 0.05 z
    assert float(hits.t[0, 0]) == pytest.approx(9.5 / 1.025, abs=2e-2)
    assert float(hits.t[1, 0]) == pytest.approx(9.5, abs=1e-2)


def test_ellipsoid_and_cylinder_hit_where_algebra_says():
    ball = nearest_hits(
        groups(ellipsoids=solids(1, y=1.0, z=10.0, hx=2.0, hy=1.0, hz=3.0)), rays([0.0, 0.0], [1e-5, 1e-5]), LIMITS
    )
    post = nearest_hits(
        groups(cylinders=solids(1, y=1.0, z=10.0, hx=0.5, hy=1.0)), rays([0.0, 0.0], [1e-5, 0.2]), LIMITS
    )
    assert float(ball.t[0, 0]) == pytest.approx(7.0, abs=1e-3)
    assert float(post.t[0, 0]) == pytest.approx(9.5, abs=1e-3)
    assert float(post.t[1, 0]) == FAR


def test_absent_solids_are_never_hit():
    nothing = groups(ellipsoids=solids(5, z=5.0, y=1.0, hx=0.0, holes=0.5, ragged=0.5))
    hits = nearest_hits(nothing, rays(np.linspace(-0.5, 0.5, 64), np.linspace(-0.5, 0.5, 64)), LIMITS)
    assert (np.asarray(hits.which) == -1).all()


def test_culling_changes_no_hit():
    u = np.random.default_rng(0).uniform(size=(40, 5)).astype(np.float32)
    many = solids(40, x=20 * u[:, 0] - 10, y=1.0, z=5 + 30 * u[:, 1], hx=0.3 + u[:, 2], hy=1.0, hz=0.3 + u[:, 3],
                  cos=np.cos(6 * u[:, 4]), sin=np.sin(6 * u[:, 4]))  # fmt: skip
    look = rays(np.linspace(-0.6, 0.6, 256), np.tile([-0.02, 0.02], 128))
    found = [nearest_hits(groups(boxes=many, ellipsoids=many), look, dict.fromkeys(LIMITS, k)) for k in (30, 40)]
    assert np.array_equal(found[0].which, found[1].which)
    assert (np.asarray(found[0].which) >= 0).mean() > 0.5


def test_shadow_falls_behind_the_box_and_nowhere_else():
    sun = tuple(jnp.float32(v) for v in (np.sqrt(0.5), np.sqrt(0.5), 0.0))
    caster = nearest_casters(solids(1, y=1.0, z=10.0, hx=0.5, hy=1.0, hz=0.5), 1)
    none = nearest_casters(solids(1), 1)
    x = jnp.asarray([-1.5, -4.0, 1.5])
    shade = occlusion(caster, none, x, jnp.zeros(3), jnp.full(3, 10.0), sun, jnp.zeros(3))
    assert shade.tolist() == [1.0, 0.0, 0.0]


def test_hits_are_the_same_under_jit():
    box = groups(boxes=solids(1, y=1.0, z=10.0, hx=1.0, hy=1.0, hz=2.0))
    eager = nearest_hits(box, rays([0.01, 0.02], [1e-3, 1e-3]), LIMITS).t
    compiled = jax.jit(lambda g, r: nearest_hits(g, r, LIMITS).t)(box, rays([0.01, 0.02], [1e-3, 1e-3]))
    assert np.allclose(eager, compiled, atol=1e-5)
