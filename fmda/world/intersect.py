"""Rays against solids: nearest hit with culling by column, and occlusion towards the sun.

Every test works on scalar arrays: the coordinates of a ray lie in three arrays, each solid contributes a few
numbers per column strip, and a scan walks over the solids of one shape, unrolled so that the tests fuse.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fmda.world.solids import Groups, Solids

FAR = 1e4
UNROLL = 8


class Rays(NamedTuple):
    """Directions of unit forward component, float32 [S, P]: S column strips of P pixels. Origin (0, height, 0)."""

    x: Array
    y: Array
    z: Array
    height: Array
    rough: Array
    fine: Array


class Hits(NamedTuple):
    """Ray parameter and index of the nearest solid, -1 where there is none; [S, P] each."""

    t: Float[Array, "s p"]
    which: Int[Array, "s p"]


def azimuth_interval(shape: str, g: Solids) -> tuple[Array, Array, Array]:
    """Returns middle and half width of the azimuths a solid covers, and its distance; [N] each, radians, metres."""
    middle = jnp.arctan2(g.x, g.z)
    distance = jnp.hypot(g.x, g.z)
    if shape in ("boxes", "frusta"):
        spans = []
        for side_x, side_z in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            x = g.x + g.cos * g.hx * side_x + g.sin * g.hz * side_z
            z = g.z - g.sin * g.hx * side_x + g.cos * g.hz * side_z
            spans.append(wrap(jnp.arctan2(x, z) - middle))
        low = jnp.stack(spans).min(0)
        high = jnp.stack(spans).max(0)
        # the nearest point of the box, for the order in which full strips drop solids
        local_x = g.cos * g.x - g.sin * g.z
        local_z = g.sin * g.x + g.cos * g.z
        near = jnp.hypot(jnp.maximum(jnp.abs(local_x) - g.hx, 0.0), jnp.maximum(jnp.abs(local_z) - g.hz, 0.0))
        return middle + 0.5 * (low + high), 0.5 * (high - low), near
    radius = jnp.maximum(g.hx, g.hz)
    half = jnp.where(distance > radius, jnp.arcsin(jnp.clip(radius / jnp.maximum(distance, 1e-3), 0.0, 1.0)), jnp.pi)
    return middle, half, distance


def wrap(angle: Array) -> Array:
    """Returns the same angle in [-pi, pi)."""
    return jnp.mod(angle + jnp.pi, 2.0 * jnp.pi) - jnp.pi


def cull(shape: str, g: Solids, low: Array, high: Array, limit: int) -> tuple[Solids, Array]:
    """Returns for each strip the `limit` nearest solids it may see, fields [K, S], and their indices [K, S].

    low, high: [S], azimuth range of the strip's rays. Solids beyond the limit are dropped, farthest first.
    """
    middle, half, distance = azimuth_interval(shape, g)
    strip = 0.5 * (low + high)[:, None]
    reach = 0.5 * (high - low)[:, None] + half[None] + 1e-3
    seen = (jnp.abs(wrap(middle[None] - strip)) <= reach) & (g.hx > 0.0)[None]
    order = jnp.where(seen, -distance[None], -FAR)
    best, index = jax.lax.top_k(order, min(limit, g.number))
    return _without(jax.tree.map(lambda a: a[index].T, g), best.T <= -FAR), index.T


def _without(g: Solids, absent: Array) -> Solids:
    """Returns the solids with the absent ones as unit balls far behind, where every test is well conditioned."""
    moved = {name: jnp.where(absent, 1.0, getattr(g, name)) for name in ("hx", "hy", "hz")}
    return g._replace(z=jnp.where(absent, -FAR, g.z), y=jnp.where(absent, -FAR, g.y), **moved)


def _box(p: Solids, rays: Rays, t: Array) -> Array:
    """Entry of each ray into the box, FAR when it misses."""
    ox, oz, oy = -p.cos * p.x + p.sin * p.z, -p.sin * p.x - p.cos * p.z, rays.height - p.y
    ix = 1.0 / (p.cos * rays.x - p.sin * rays.z)
    iy = 1.0 / rays.y
    iz = 1.0 / (p.sin * rays.x + p.cos * rays.z)
    nx, ny, nz = -ox * ix, -oy * iy, -oz * iz
    kx, ky, kz = jnp.abs(ix) * p.hx, jnp.abs(iy) * p.hy, jnp.abs(iz) * p.hz
    near = jnp.maximum(jnp.maximum(nx - kx, ny - ky), nz - kz)
    far = jnp.minimum(jnp.minimum(nx + kx, ny + ky), nz + kz)
    return jnp.where((near < far) & (near > 0.0), near, FAR)


def _frustum(p: Solids, rays: Rays, t: Array) -> Array:
    """Entry of each ray into the box with slanted sides."""
    ox, oz = -p.cos * p.x + p.sin * p.z, -p.sin * p.x - p.cos * p.z
    oy = rays.height - p.y
    ex, ez = p.cos * rays.x - p.sin * rays.z, p.sin * rays.x + p.cos * rays.z
    iy = 1.0 / rays.y
    ky = jnp.abs(iy) * p.hy
    near, far = -oy * iy - ky, -oy * iy + ky
    for e, o, h, taper in ((ex, ox, p.hx, p.taper_x), (ez, oz, p.hz, p.taper_z)):
        slope = 0.5 * taper * h / jnp.maximum(p.hy, 1e-6)
        lean, room = slope * rays.y, h - slope * (oy + p.hy)
        for sign in (1.0, -1.0):
            toward = sign * e + lean
            at = (room - sign * o) / toward
            near = jnp.where(toward < 0.0, jnp.maximum(near, at), near)
            far = jnp.where(toward < 0.0, far, jnp.minimum(far, at))
    return jnp.where((near < far) & (near > 0.0), near, FAR)


def _ellipsoid(p: Solids, rays: Rays, t: Array) -> Array:
    """Entry of each ray into the ellipsoid, whose radius shrinks by the ray's noise where it is ragged."""
    wx, wy, wz = (1.0 / jnp.maximum(h, 1e-6) for h in (p.hx, p.hy, p.hz))
    ox, oz = (-p.cos * p.x + p.sin * p.z) * wx, (-p.sin * p.x - p.cos * p.z) * wz
    oy = (rays.height - p.y) * wy
    ex, ez = (p.cos * wx) * rays.x - (p.sin * wx) * rays.z, (p.sin * wz) * rays.x + (p.cos * wz) * rays.z
    ey = rays.y * wy
    radius = 1.0 - p.ragged * rays.rough
    a = ex * ex + ey * ey + ez * ez
    b = ex * ox + ey * oy + ez * oz
    disc = b * b - a * (ox * ox + oy * oy + oz * oz - radius * radius)
    near = (-b - jnp.sqrt(jnp.maximum(disc, 0.0))) / a
    return jnp.where((disc > 0.0) & (near > 0.0) & (rays.fine >= p.holes), near, FAR)


def _cylinder(p: Solids, rays: Rays, t: Array) -> Array:
    """Entry of each ray through the side or the top of the upright cylinder of radius hx."""
    ox, oy, oz = -p.x, rays.height - p.y, -p.z
    a = rays.x * rays.x + rays.z * rays.z
    b = rays.x * ox + rays.z * oz
    disc = b * b - a * (ox * ox + oz * oz - p.hx * p.hx)
    root = jnp.sqrt(jnp.maximum(disc, 0.0))
    near, far = (-b - root) / a, (-b + root) / a
    top = (p.hy - oy) / rays.y
    at = jnp.where((oy + near * rays.y > p.hy) & (rays.y < 0.0), top, near)
    inside = (disc > 0.0) & (at > 0.0) & (at <= far) & (jnp.abs(oy + at * rays.y) <= p.hy * 1.0001)
    return jnp.where(inside, at, FAR)


_TESTS = {"boxes": _box, "frusta": _frustum, "ellipsoids": _ellipsoid, "cylinders": _cylinder}


def nearest_hits(groups: Groups, rays: Rays, limits: dict[str, int]) -> Hits:
    """Returns the nearest hit of each ray; the index counts through boxes, frusta, ellipsoids, cylinders."""
    azimuth = jnp.arctan2(rays.x, rays.z)
    low, high = azimuth.min(1), azimuth.max(1)
    t = jnp.full_like(rays.x, FAR)
    index = jnp.full(rays.x.shape, -1, jnp.int32)
    offset = 0
    for shape, group in zip(Groups._fields, groups, strict=True):
        kept, where = cull(shape, group, low, high, limits[shape])
        test = _TESTS[shape]

        def nearer(carry: tuple, item: tuple, test=test) -> tuple:  # noqa: ANN001
            (t, index), (p, k) = carry, item
            at = test(p, rays, t)
            closer = at < t
            return (jnp.where(closer, at, t), jnp.where(closer, k, index)), None

        items = jax.tree.map(lambda a: a[:, :, None], (kept, where + offset))
        (t, index), _ = jax.lax.scan(nearer, (t, index), items, unroll=min(UNROLL, where.shape[0]))
        offset += group.number
    return Hits(t, index)


def nearest_casters(g: Solids, limit: int) -> Solids:
    """Returns the `limit` solids nearest to the camera that stand ahead of z = -25 m; others become absent."""
    distance = jnp.hypot(g.x, g.z)
    order = jnp.where((g.hx > 0.0) & (g.z > -25.0), -distance, -FAR)
    best, index = jax.lax.top_k(order, min(limit, g.number))
    return _without(jax.tree.map(lambda a: a[index], g), best <= -FAR)


def occlusion(
    boxes: Solids, crowns: Solids, x: Array, y: Array, z: Array, sun: tuple[Array, Array, Array], dapple: Array
) -> Float[Array, "..."]:
    """Returns the share of sunlight that is cut off at points (x, y, z), in [0, 1].

    boxes: solid casters, tapered ones are shrunk to their top. crowns: ellipsoids, which let light through
    where `dapple` (noise in [0, 1], one number per point) is high, in the measure of their raggedness.
    sun: unit vector towards the sun.
    """
    sx, sy, sz = sun
    shape = x.shape

    def box(shade: Array, p: Solids) -> tuple[Array, None]:
        rx, rz = x - p.x, z - p.z
        ox, oy, oz = p.cos * rx - p.sin * rz, y - p.y, p.sin * rx + p.cos * rz
        ix, iy, iz = 1.0 / (p.cos * sx - p.sin * sz + 1e-7), 1.0 / sy, 1.0 / (p.sin * sx + p.cos * sz + 1e-7)
        kx = jnp.abs(ix) * p.hx * (1.0 - p.taper_x)
        ky = jnp.abs(iy) * p.hy
        kz = jnp.abs(iz) * p.hz * (1.0 - p.taper_z)
        nx, ny, nz = -ox * ix, -oy * iy, -oz * iz
        near = jnp.maximum(jnp.maximum(nx - kx, ny - ky), nz - kz)
        far = jnp.minimum(jnp.minimum(nx + kx, ny + ky), nz + kz)
        return jnp.maximum(shade, jnp.where((near < far) & (far > 1e-3), 1.0, 0.0)), None

    def crown(shade: Array, p: Solids) -> tuple[Array, None]:
        shrink = 1.0 - 0.5 * p.ragged
        wx, wy, wz = (1.0 / jnp.maximum(h * shrink, 1e-6) for h in (p.hx, p.hy, p.hz))
        rx, rz = x - p.x, z - p.z
        ox, oy, oz = (p.cos * rx - p.sin * rz) * wx, (y - p.y) * wy, (p.sin * rx + p.cos * rz) * wz
        ex, ey, ez = (p.cos * sx - p.sin * sz) * wx, sy * wy, (p.sin * sx + p.cos * sz) * wz
        a = ex * ex + ey * ey + ez * ez
        b = ex * ox + ey * oy + ez * oz
        c = ox * ox + oy * oy + oz * oz - 1.0
        solid = jnp.where((b * b - a * c > 0.0) & (b < 0.0) & (c > 0.0), 1.0, 0.0)
        through = jnp.where(p.ragged > 0.0, jnp.clip(1.6 - 2.2 * dapple, 0.25, 1.0), 1.0) * (1.0 - p.holes)
        return jnp.maximum(shade, solid * through), None

    shade = jnp.zeros(shape, jnp.float32)
    shade, _ = jax.lax.scan(box, shade, boxes, unroll=min(UNROLL, boxes.number))
    shade, _ = jax.lax.scan(crown, shade, crowns, unroll=min(UNROLL, crowns.number))
    return shade
