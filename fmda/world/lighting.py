"""Light: sun with shadows, sky, head lights and street lamps, reflections, haze."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fmda.world.intersect import occlusion
from fmda.world.looks import Look, sun_direction
from fmda.world.noise import value_noise
from fmda.world.scene import Scene
from fmda.world.shading import Rgb, ramp, rgb
from fmda.world.sky import sky_gradient
from fmda.world.solids import Solids


class Point(NamedTuple):
    """What is to be lit, per pixel: position and unit normal in the world, unit view direction, finish."""

    position: tuple[Array, Array, Array]
    normal: tuple[Array, Array, Array]
    view: tuple[Array, Array, Array]
    depth: Array
    albedo: Rgb
    glow: Rgb
    gloss: Array
    leafy: Array
    ground: Array


def night_share(look: Look) -> Array:
    """Returns 1 by night, 0 by day: how far lamps rule the picture."""
    return ramp(look.sky, 0.3, 0.1)


def sun_of(scene: Scene) -> tuple[Array, Array, Array]:
    """Returns the unit vector towards the scene's sun."""
    return sun_direction(scene.look, scene.sun_azimuth)


def haze(color: Rgb, distance: Array, toward_sun: Array, look: Look) -> Rgb:
    """Returns the colour seen through `distance` metres of air."""
    through = jnp.exp(-look.fog * distance)
    air = sky_gradient(jnp.zeros_like(distance), toward_sun, look, night_share(look)).times(0.92)
    return air.mix(color, through)


def under_vehicles(x: Array, z: Array, vehicles: Solids) -> Array:
    """Returns how much of the sky the ground at (x, z) sees past the vehicles above it, in [0.2, 1]."""

    def darker(light: Array, p: Solids) -> tuple[Array, None]:
        rx, rz = x - p.x, z - p.z
        out_x = jnp.maximum(jnp.abs(p.cos * rx - p.sin * rz) - p.hx, 0.0)
        out_z = jnp.maximum(jnp.abs(p.sin * rx + p.cos * rz) - p.hz, 0.0)
        shade = jnp.maximum(1.0 - (out_x + out_z) * 1.7, 0.0)
        present = jnp.where(p.y > -100.0, 0.8, 0.0)
        return jnp.minimum(light, 1.0 - present * shade * shade), None

    return jax.lax.scan(darker, jnp.ones_like(x), vehicles, unroll=vehicles.number)[0]


def lit(point: Point, scene: Scene, boxes: Solids, crowns: Solids, vehicles: Solids) -> Rgb:
    """Returns the light that leaves each point towards the camera, through the haze."""
    look = scene.look
    px, py, pz = point.position
    nx, ny, nz = point.normal
    ux, uy, uz = point.view
    sun = sun_of(scene)
    seed = scene.seed.astype(jnp.int32)
    toward = ux * sun[0] + uy * sun[1] + uz * sun[2]
    dapple = value_noise(px * 1.9 + py, pz * 1.9 - py, seed + 5)
    dapple = 0.65 * dapple + 0.35 * value_noise(px * 6.1 + py, pz * 6.1, seed + 6)
    shade = occlusion(boxes, crowns, px + 0.03 * nx, py + 0.03 * ny, pz + 0.03 * nz, sun, dapple)
    cosine = nx * sun[0] + ny * sun[1] + nz * sun[2]
    cosine = jnp.where(point.leafy, 0.35 + 0.5 * cosine, cosine)
    direct = look.sun * jnp.maximum(cosine, 0.0) * (1.0 - shade)
    warm = look.warmth
    sunlight = rgb(1.0, 0.95 - 0.32 * warm, 0.88 - 0.58 * warm).times(2.3 * direct)
    open_sky = jnp.where(point.ground, under_vehicles(px, pz, vehicles), 0.72 + 0.28 * ramp(py, 0.0, 0.9))
    ambient = look.ambient * (0.62 + 0.38 * ny) * open_sky
    skylight = rgb(1.0 - 0.16 * look.blue, 1.0 - 0.04 * look.blue, 1.0 + 0.14 * look.blue).times(ambient)
    bounce = jnp.maximum(0.3 - 0.3 * ny, 0.0) * (0.25 * look.sun * sun[1] + 0.1 * look.ambient)
    light = sunlight.plus(skylight).plus(rgb(1.0, 0.95, 0.88).times(bounce))
    light = light.plus(_lamps(point, scene))
    even = look.flat
    light = light.mix(rgb(1.0, 1.0, 1.0), even)
    color = point.albedo.filtered(light)

    # mirror the sky: glass, paint, wet road
    facing = -(nx * ux + ny * uy + nz * uz)
    fresnel = 0.14 + 0.86 * jnp.clip(1.0 - facing, 0.0, 1.0) ** 3
    up = uy + 2.0 * facing * ny
    mirrored = sky_gradient(up, 0.5 * toward, look, night_share(look)).times(jnp.where(up < 0.06, 0.35, 0.85))
    color = color.mix(mirrored, point.gloss * fresnel).plus(point.glow)
    return haze(color, point.depth, toward, look)


def _lamps(point: Point, scene: Scene) -> Rgb:
    """Head lights of the own car and pools of light below the street lamps."""
    look, street = scene.look, scene.street
    px, py, pz = point.position
    cone = jnp.exp(-((px / (0.30 * pz + 2.0)) ** 2)) / (1.0 + (pz / 11.0) ** 2)
    cone = cone * ramp(py, 2.2 + 0.03 * pz, 0.4) * ramp(pz, 1.0, 4.0)
    beam = rgb(1.0, 0.97, 0.88).times(0.75 * look.lamps * cone)
    lateral = jnp.abs(px + street.offset - 0.5 * street.bend * pz * pz) - street.half
    post = pz / 22.0
    along = (post - jnp.round(post)) * 22.0
    pool = jnp.exp(-(along * along + lateral * lateral) / 50.0) * ramp(py, 9.0, 3.0)
    town = jnp.where(street.country(), 0.15, 1.0)
    white = ramp(street.paving, 30000.0, 31000.0)
    glow = rgb(1.0, 0.68, 0.32).mix(rgb(0.9, 0.95, 1.0), white)
    return beam.plus(glow.times(look.lamps * town * (0.42 * pool + 0.05)))
