"""The renderer: a key and a domain to a picture with labels, instances and depth."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from fmda.errors import UserError, did_you_mean
from fmda.world.film import develop
from fmda.world.ground import Ground, ground_color, ground_hits
from fmda.world.intersect import FAR, Rays, nearest_casters, nearest_hits
from fmda.world.lighting import Point, haze, lit, night_share, sun_of
from fmda.world.materials import Surface, paint
from fmda.world.names import CLASSES, DOMAINS, VOID
from fmda.world.noise import fractal, value_noise
from fmda.world.scene import Scene, sample_scene
from fmda.world.shading import Rgb, ramp, rgb, where
from fmda.world.sky import sky_color, skyline
from fmda.world.solids import LABEL, Solids, join
from fmda.world.street import Street

T = TypeVar("T")

STRIPS = 16
LIMITS = {"boxes": 48, "frusta": 24, "ellipsoids": 64, "cylinders": 20}
CASTER_BOXES, CASTER_CROWNS = 28, 28
SKY_DEPTH = 1000.0


class Rendering(NamedTuple):
    """One picture and what is known of it.

    image: RGB, uint8. labels: Cityscapes train ids, 255 without a class. instances: 0 or the id of a thing, 1 to 49.
    depth: metres along the view axis, 1000 for the sky. facts: arrays; `captions.facts_of` names them.
    """

    image: UInt8[Array, "h w 3"]
    labels: UInt8[Array, "h w"]
    instances: Int[Array, "h w"]
    depth: Float[Array, "h w"]
    facts: dict[str, Array]


def domain_index(domain: str | int | Array) -> Int[Array, ""]:
    """Returns the index of a domain given by name or index; raises UserError for an unknown name."""
    if isinstance(domain, str):
        if domain not in DOMAINS:
            raise UserError(f"domain '{domain}' is unknown{did_you_mean(domain, DOMAINS)}")
        domain = DOMAINS.index(domain)
    return jnp.asarray(domain, jnp.int32)


def render(
    key: PRNGKeyArray, domain: str | int | Array, *, height: int = 128, width: int = 256, supersample: int = 1
) -> Rendering:
    """Returns a random street picture of a domain, the same for the same key; compiled once for all domains.

    height, width: pixels. supersample: rays per pixel along each side; the image is averaged, labels are not.
    """
    return _render(key, domain_index(domain), height, width, supersample)


def render_batch(
    keys: PRNGKeyArray,
    domains: Int[Array | np.ndarray, " n"],
    *,
    height: int = 128,
    width: int = 256,
    supersample: int = 1,
) -> Rendering:
    """Returns one picture per key and domain index, every field with a leading axis; one after the other on CPUs,
    where a picture fills the caches, all at once elsewhere."""
    return _render_batch(keys, jnp.asarray(domains, jnp.int32), height, width, supersample)


def settled(stage: Callable[..., T], *values: Any, ready: Array) -> T:
    """Returns stage(*values), computed once: a branch on `ready`, which always holds, is a wall that the compiler
    does not fuse across. Fused into one program, the stages would repeat the first of them for every use."""
    shapes = jax.eval_shape(stage, *values)
    return jax.lax.cond(ready, stage, lambda *_: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes), *values)


def _draw(key: PRNGKeyArray, domain: Int[Array, ""], height: int, width: int, supersample: int) -> Rendering:
    scene = sample_scene(key, domain)
    ready = jnp.isfinite(scene.seed)
    scene = settled(lambda scene: scene, scene, ready=ready)
    color, labels, instances, depth, horizon = trace(scene, height * supersample, width * supersample)
    image = settled(partial(develop, reduce=supersample), color, labels, depth, horizon, scene, ready=ready)
    if supersample > 1:
        middle = slice(supersample // 2, None, supersample)
        labels, instances, depth = (a[middle, middle] for a in (labels, instances, depth))
    pixels = (labels[None] == jnp.arange(len(CLASSES), dtype=labels.dtype)[:, None, None]).sum((1, 2))
    facts = {
        "domain": domain,
        "style": scene.setting.style,
        "weather": scene.setting.weather,
        "time": scene.setting.time,
        "street": scene.street.kind,
        "pixels": pixels.astype(jnp.int32),
    }
    return Rendering(image, labels, instances, depth, facts)


def _draw_batch(keys: PRNGKeyArray, domains: Int[Array, " n"], height: int, width: int, supersample: int) -> Rendering:
    single = partial(_draw, height=height, width=width, supersample=supersample)
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda pair: single(*pair), (keys, domains))
    return jax.vmap(single)(keys, domains)


# sizes by position: the compilation cache tells a default apart from the same value given by name
_render = jax.jit(_draw, static_argnums=(2, 3, 4))
_render_batch = jax.jit(_draw_batch, static_argnums=(2, 3, 4))


def camera_rays(scene: Scene, height: int, width: int) -> tuple[Rays, Array, Array]:
    """Returns rays in column strips, the angle of a pixel, and the row of the horizon in the middle of the picture.

    The width is padded to a multiple of the number of strips.
    """
    camera = scene.camera
    focal = camera.focal * jnp.sqrt(float(height * width))
    full = -(-width // STRIPS) * STRIPS
    column = (jnp.arange(full, dtype=jnp.float32) + 0.5 - 0.5 * width).reshape(STRIPS, 1, -1)
    row = (0.5 * height - 0.5 - jnp.arange(height, dtype=jnp.float32)).reshape(1, -1, 1)
    shape = (STRIPS, height, full // STRIPS)
    column, row = jnp.broadcast_to(column, shape), jnp.broadcast_to(row, shape)
    cr, sr = jnp.cos(camera.roll), jnp.sin(camera.roll)
    x, y = (cr * column - sr * row) / focal, (sr * column + cr * row) / focal
    cp, sp = jnp.cos(camera.pitch), jnp.sin(camera.pitch)
    y, z = cp * y - sp, cp + sp * y
    cy, sy = jnp.cos(camera.yaw), jnp.sin(camera.yaw)
    x, z = cy * x + sy * z, cy * z - sy * x
    azimuth, slope = jnp.arctan2(x, z), y / jnp.hypot(x, z)
    seed = scene.seed.astype(jnp.int32)
    rough = fractal(azimuth * 36.0, slope * 36.0, seed, 2)
    fine = value_noise(azimuth * 160.0, slope * 160.0, seed + 1)
    rough = 0.75 * rough + 0.25 * fine
    # twigs: the lines along which two smooth noises pass their middle
    limb = jnp.abs(value_noise(azimuth * 42.0, slope * 30.0, seed + 2) - 0.5)
    twig = jnp.abs(value_noise(azimuth * 95.0 + 40.0 * slope, slope * 70.0, seed + 3) - 0.5)
    fine = 1.0 - 2.0 * jnp.minimum(limb * 1.1, twig)
    flat = (STRIPS, -1)
    rays = Rays(
        x.reshape(flat), y.reshape(flat), z.reshape(flat), camera.height, rough.reshape(flat), fine.reshape(flat)
    )
    return rays, 1.0 / focal, 0.5 * height - focal * jnp.tan(camera.pitch)


def trace(scene: Scene, height: int, width: int) -> tuple[Rgb, Array, Array, Array, Array]:
    """Returns linear light, labels (uint8), instances (int32), depth (metres), all [height, width], and the
    row of the horizon."""
    ready = jnp.isfinite(scene.seed)
    stage = partial(settled, ready=ready)
    rays, pixel, horizon = stage(lambda scene: camera_rays(scene, height, width), scene)
    hits = nearest_hits(scene.groups, rays, LIMITS)

    def picture(a: Array) -> Array:
        """Strips back to rows and columns."""
        return a.reshape(STRIPS, height, -1).transpose(1, 0, 2).reshape(height, -1)[:, :width]

    dx, dy, dz, t_solid, index = (picture(a) for a in (rays.x, rays.y, rays.z, hits.t, hits.which))
    eye = scene.camera.height
    ground, on_solid, on_sky, near, position, view = stage(
        partial(_seen, eye=eye, street=scene.street), dx, dy, dz, t_solid, index
    )
    px, _, pz = position
    surface = stage(partial(hit_surface, scene), index, position, view, near * pixel)
    finish = stage(paint, surface, scene.look)
    below, mirror = stage(partial(ground_color, street=scene.street, look=scene.look), ground, px, pz, pixel, eye)
    point = Point(
        position=position,
        normal=(
            jnp.where(on_solid, surface.normal[0], 0.0),
            jnp.where(on_solid, surface.normal[1], 1.0),
            jnp.where(on_solid, surface.normal[2], 0.0),
        ),
        view=view,
        depth=near,
        albedo=where(on_solid, finish.albedo, below),
        glow=Rgb(*(jnp.where(on_solid, c, 0.0) for c in finish.glow)),
        gloss=jnp.where(on_solid, finish.gloss, mirror),
        leafy=on_solid & (surface.solid.ragged > 0.0),
        ground=~on_solid,
    )
    color = stage(lambda point, scene: lit(point, scene, *_casters(scene)), point, scene)
    color, labels, depth, instances = stage(
        partial(_finished, height=height, width=width),
        scene,
        color,
        (dx, dz),
        position,
        view,
        near,
        on_solid,
        on_sky,
        ground,
        surface,
    )
    return color, labels, instances, depth, horizon


def _seen(dx: Array, dy: Array, dz: Array, t_solid: Array, index: Array, *, eye: Array, street: Street) -> tuple:
    """What each ray meets: the ground, whether a solid or the sky, the depth, the position, the unit view direction."""
    ground = ground_hits(dx, dy, dz, eye, street)
    on_solid = (t_solid < ground.t) & (index >= 0)
    t = jnp.where(on_solid, t_solid, ground.t)
    on_sky = ~on_solid & (ground.t >= FAR)
    near = jnp.minimum(t, 400.0)
    norm = jax.lax.rsqrt(dx * dx + dy * dy + dz * dz)
    return ground, on_solid, on_sky, near, (near * dx, eye + near * dy, near * dz), (dx * norm, dy * norm, dz * norm)


def _finished(
    scene: Scene, color: Rgb, heading: tuple[Array, Array], position: tuple, view: tuple, near: Array, on_solid: Array,
    on_sky: Array, ground: Ground, surface: Surface, height: int, width: int,
) -> tuple[Rgb, Array, Array, Array]:  # fmt: skip
    """Adds sky, skyline and bonnet; returns light, labels, depth and instances."""
    ux, uy, uz = view
    azimuth = jnp.arctan2(*heading)
    rise, houses = skyline(azimuth, scene.street.kind <= 3, scene.seed.astype(jnp.int32))
    far_away = on_sky & (uy / jnp.sqrt(ux * ux + uz * uz) < rise)
    color, labels = _background(scene, color, view, on_sky, far_away, houses)
    labels = jnp.where(on_solid, surface.solid.label, jnp.where(on_sky, labels, ground.label)).astype(jnp.uint8)
    instances = jnp.where(on_solid, surface.solid.instance, 0.0).astype(jnp.int32)
    depth = jnp.where(on_sky, jnp.where(far_away, 300.0, SKY_DEPTH), near)

    # the bonnet of the own car
    v = (jnp.arange(height, dtype=jnp.float32)[:, None] + 0.5) / height
    u = (jnp.arange(width, dtype=jnp.float32)[None] + 0.5) / width * 2.0 - 1.0
    bonnet = v - 1.0 + scene.camera.bonnet * (1.0 - 0.55 * u * u) > 0.0
    hood = rgb(0.05, 0.055, 0.06).times(scene.look.ambient * (0.5 + 2.0 * jnp.abs(u)) + jnp.zeros_like(near))
    color = where(bonnet, hood, color)
    labels = jnp.where(bonnet, jnp.uint8(VOID), labels)
    return color, labels, jnp.where(bonnet, 1.0, depth), jnp.where(bonnet, 0, instances)


def hit_surface(
    scene: Scene, index: Array, position: tuple[Array, Array, Array], view: tuple[Array, Array, Array], foot: Array
) -> Surface:
    """Returns the solid, local position and normal at each pixel's nearest hit; pixels without one get the first."""
    groups = scene.groups
    everything = join(list(groups))
    table = jnp.stack(everything, 1)
    rows = table[jnp.maximum(index, 0)]
    p = Solids(*(rows[..., k] for k in range(table.shape[1])))
    first_ellipsoid = groups.boxes.number + groups.frusta.number
    first_cylinder = first_ellipsoid + groups.ellipsoids.number
    px, py, pz = position
    rx, ry, rz = px - p.x, py - p.y, pz - p.z
    lx, lz = p.cos * rx - p.sin * rz, p.sin * rx + p.cos * rz
    level = 0.5 * (ry / jnp.maximum(p.hy, 1e-4) + 1.0)
    gap_x = jnp.abs(jnp.abs(lx) - p.hx * (1.0 - p.taper_x * level))
    gap_z = jnp.abs(jnp.abs(lz) - p.hz * (1.0 - p.taper_z * level))
    gap_y = jnp.abs(jnp.abs(ry) - p.hy)
    side = jnp.where((gap_x < gap_y) & (gap_x < gap_z), 0, jnp.where(gap_y < gap_z, 1, 2))
    slope = jnp.where(side == 0, p.taper_x * p.hx, p.taper_z * p.hz) * 0.5 / jnp.maximum(p.hy, 1e-4)
    nx = jnp.where(side == 0, jnp.sign(lx), 0.0)
    ny = jnp.where(side == 1, jnp.sign(ry), slope)
    nz = jnp.where(side == 2, jnp.sign(lz), 0.0)
    blob = (index >= first_ellipsoid) & (index < first_cylinder)
    tube = index >= first_cylinder
    wx, wy, wz = (1.0 / jnp.maximum(h * h, 1e-8) for h in (p.hx, p.hy, p.hz))
    cap = ry > 0.999 * p.hy
    nx = jnp.where(blob, lx * wx, jnp.where(tube, jnp.where(cap, 0.0, lx), nx))
    ny = jnp.where(blob, ry * wy, jnp.where(tube, jnp.where(cap, 1.0, 0.0), ny))
    nz = jnp.where(blob, lz * wz, jnp.where(tube, jnp.where(cap, 0.0, lz), nz))
    scale = jax.lax.rsqrt(nx * nx + ny * ny + nz * nz + 1e-12)
    nx, ny, nz = nx * scale, ny * scale, nz * scale
    normal = p.cos * nx + p.sin * nz, ny, p.cos * nz - p.sin * nx
    along = jnp.where(blob | tube, lx + 0.7 * lz, jnp.where(side == 0, lz, lx))
    facing = jnp.abs(normal[0] * view[0] + normal[1] * view[1] + normal[2] * view[2])
    foot = foot / jnp.sqrt(jnp.maximum(facing, 0.05))
    return Surface(p, (lx, ry, lz), py, jnp.where(tube & cap, 1, side), along, foot, normal)


def _casters(scene: Scene) -> tuple[Solids, Solids, Solids]:
    """Boxes and ellipsoids that throw shadows, and the vehicles, under which it is dark."""
    boxes, frusta, ellipsoids, cylinders = scene.groups
    vehicle = (frusta.label == LABEL["car"]) | (frusta.label == LABEL["truck"])
    solid = (boxes.label == LABEL["building"]) | (boxes.instance >= 20.0) & (boxes.instance < 25.0)
    solid |= (boxes.label == LABEL["wall"]) | (boxes.label == LABEL["vegetation"])
    thin = cylinders.hx > 0.04
    tall = join(
        [
            boxes._replace(hx=jnp.where(solid, boxes.hx, 0.0)),
            frusta._replace(hx=jnp.where(vehicle, frusta.hx, 0.0)),
            cylinders._replace(hx=jnp.where(thin, cylinders.hx, 0.0), hz=cylinders.hx),
        ]
    )
    large = (ellipsoids.label == LABEL["vegetation"]) | (ellipsoids.hy > 0.3) & (ellipsoids.hx > 0.08)
    crowns = ellipsoids._replace(hx=jnp.where(large, ellipsoids.hx, 0.0))
    under = join(
        [
            frusta._replace(hx=jnp.where(vehicle & (frusta.y < 1.2), frusta.hx, 0.0)),
            boxes._replace(hx=jnp.where((boxes.instance >= 20.0) & (boxes.instance < 25.0), boxes.hx, 0.0)),
        ]
    )
    return nearest_casters(tall, CASTER_BOXES), nearest_casters(crowns, CASTER_CROWNS), nearest_casters(under, 12)


def _background(
    scene: Scene, color: Rgb, view: tuple[Array, Array, Array], on_sky: Array, far_away: Array, houses: Array
) -> tuple[Rgb, Array]:
    """Fills the sky and the far skyline; returns the picture and the labels of these pixels."""
    look = scene.look
    sun = sun_of(scene)
    toward = view[0] * sun[0] + view[1] * sun[1] + view[2] * sun[2]
    sky = sky_color(*view, toward, look, night_share(look), scene.seed.astype(jnp.int32))
    sky = haze(sky, jnp.full_like(toward, 220.0) * ramp(view[1], 0.5, 0.0), toward, look)
    tint = where(houses, rgb(0.30, 0.29, 0.28), rgb(0.07, 0.09, 0.055)).times(0.3 * look.sun + 0.75 * look.ambient)
    distant = haze(tint, jnp.full_like(toward, 240.0), toward, look)
    color = where(on_sky, where(far_away, distant, sky), color)
    land = jnp.where(houses, LABEL["building"], LABEL["vegetation"])
    return color, jnp.where(far_away, land, LABEL["sky"])
