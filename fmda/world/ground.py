"""The ground: road with markings and rails, kerb, sidewalk, grass; analytic, no solids."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from fmda.world.looks import Look
from fmda.world.noise import fractal, lattice, value_noise
from fmda.world.shading import Rgb, cover, cover_cell, ramp, rgb, where
from fmda.world.solids import LABEL
from fmda.world.street import Street

KERB = 0.12
GONE = 240.0


class Ground(NamedTuple):
    """Where rays meet the ground: ray parameter (1e4 where they do not), label, lateral position, kerb face."""

    t: Array
    label: Array
    lateral: Array
    kerb: Array


def ground_hits(x: Array, y: Array, z: Array, height: Array, street: Street) -> Ground:
    """Returns the ground seen by rays of directions (x, y, z) from a camera `height` metres above the road."""
    down = 1.0 / jnp.minimum(y, -1e-4)
    kerb = jnp.where(street.country(), 0.0, KERB)

    def lateral(t: Array) -> Array:
        return t * x + street.offset - 0.5 * street.bend * (t * z) ** 2

    def in_crossing(t: Array) -> Array:
        along = t * z
        return (along > street.crossing) & (along < street.crossing + street.crossing_width)

    high, low = (kerb - height) * down, -height * down
    l_high, l_low = lateral(high), lateral(low)
    raised = (jnp.abs(l_high) > street.half) & ~in_crossing(high)
    face = ~raised & (jnp.abs(l_low) > street.half) & ~in_crossing(low)
    t = jnp.where(raised, high, low)
    side = jnp.where(raised, l_high, l_low)
    walk = jnp.where(side < 0.0, street.sidewalk_left, street.sidewalk_right)
    setback = jnp.where(side < 0.0, street.setback_left, street.setback_right)
    beyond = jnp.abs(side) - street.half - walk
    paved = jnp.where(street.green > 0.5, beyond < 0.0, beyond < setback + 6.0)
    walkable = jnp.where(paved & ~street.country(), LABEL["sidewalk"], LABEL["terrain"])
    label = jnp.where(raised | face, walkable, LABEL["road"])
    seen = (y < -1e-4) & (t < GONE)
    return Ground(jnp.where(seen, t, 1e4), label, side, face)


def ground_color(
    g: Ground, x: Array, z: Array, pixel: Array, height: Array, street: Street, look: Look
) -> tuple[Rgb, Array]:
    """Returns albedo and mirroring of the ground at points (x, z); `pixel` is the angle of one pixel."""
    t = jnp.minimum(g.t, GONE)
    across = jnp.maximum(t * pixel, 1e-3)
    along = jnp.maximum(t * t * pixel / height, 1e-3)
    side, far = g.lateral, z
    seed = street.paving.astype(jnp.int32)
    hue = lattice(seed, 3), lattice(seed, 4), lattice(seed, 5)
    broad = fractal(x * 0.33, z * 0.33, seed, 2)
    fade = ramp(along, 0.5, 0.05)
    grain = (value_noise(x * 17.0, z * 17.0, seed) - 0.5) * fade + (
        value_noise(x * 4.3, z * 4.3, seed + 1) - 0.5
    ) * ramp(along, 2.5, 0.3)
    texture = look.texture

    # road: patches of repair, tyre tracks, markings, rails
    patch = lattice(jnp.floor(side / 1.9), jnp.floor(far / 6.5), seed + 2)
    asphalt = 0.105 + 0.07 * hue[0]
    tone = 1.0 + texture * (0.5 * (broad - 0.5) + 0.32 * grain - 0.22 * (patch > 0.86) + 0.12 * (patch < 0.06))
    crack = jnp.abs(value_noise(x * 0.55, z * 0.4, seed + 9) - 0.5)
    tone = tone * (1.0 - 0.22 * texture * ramp(crack, 0.008, 0.003) * (broad > 0.5) * fade)
    gutter = ramp(jnp.abs(side), street.half - 0.35, street.half)
    tone = tone * (1.0 - 0.25 * gutter)
    base = asphalt * tone
    road = rgb(1.0, 0.99 - 0.03 * hue[1], 0.99 - 0.06 * hue[1] + 0.05 * hue[2]).times(base)
    white, yellow = _markings(side, far, across, along, street)
    worn = 0.55 + 0.4 * value_noise(x * 2.1, z * 2.1, seed + 5)
    road = road.mix(rgb(0.62, 0.62, 0.60), white * worn).mix(rgb(0.60, 0.42, 0.07), yellow * worn)
    rail = jnp.abs(jnp.abs(jnp.abs(side) - 1.65) - 0.72)
    rails = street.rails * cover(rail, -0.05, 0.05, across)
    road = road.mix(rgb(0.05, 0.045, 0.04).plus(rgb(0.2, 0.2, 0.2).times(0.6 * look.sky)), rails)

    # sidewalk: slabs with joints, kerb stone at the edge
    pitch = 0.4 + 0.8 * jnp.floor(hue[1] * 3.0) * 0.5
    slab_x, slab_z = jnp.abs(side) / pitch, far / pitch
    joints = jnp.maximum(
        cover_cell(slab_x - jnp.floor(slab_x), 0.0, 0.05, across / pitch),
        cover_cell(slab_z - jnp.floor(slab_z), 0.0, 0.05, along / pitch),
    )
    slab = lattice(jnp.floor(slab_x), jnp.floor(slab_z), seed + 3) - 0.5
    stone = rgb(0.27, 0.26, 0.245).mix(rgb(0.33, 0.22, 0.18), ramp(hue[2], 0.75, 0.8)).times(0.8 + 0.5 * hue[0])
    stone = stone.times(
        (1.0 + texture * (0.4 * (broad - 0.5) + 0.25 * grain + 0.22 * slab * ramp(along, 1.5, 0.3)))
        * (1.0 - 0.4 * joints)
    )
    edge = jnp.abs(side) - street.half
    stone = where(edge < 0.16, rgb(0.40, 0.39, 0.37).times(1.0 + 0.3 * grain), stone)
    stone = where(g.kerb, stone.times(0.6), stone)

    # grass and soil
    blades = value_noise(x * 7.0, z * 7.0, seed + 6) - 0.5
    dry = ramp(fractal(x * 0.21, z * 0.21, seed + 8, 2), 0.4, 0.75)
    grass = rgb(0.10, 0.15, 0.045).mix(rgb(0.26, 0.22, 0.10), dry * (0.45 + 0.4 * look.autumn))
    grass = grass.times(1.0 + texture * (0.7 * blades * ramp(along, 1.2, 0.15) + 0.5 * (broad - 0.5) + 0.5 * grain))
    gravel = ramp(edge, 1.1, 0.5) * street.country()
    grass = grass.mix(rgb(0.28, 0.25, 0.21).times(1.0 + grain), gravel)

    color = where(g.label == LABEL["road"], road, where(g.label == LABEL["sidewalk"], stone, grass))
    return _weathered(g, color, x, z, broad, seed, look)


def _weathered(g: Ground, color: Rgb, x: Array, z: Array, broad: Array, seed: Array, look: Look) -> tuple[Rgb, Array]:
    """Water darkens and mirrors, snow covers all but the tracks; returns albedo and mirroring."""
    on_road = g.label == LABEL["road"]
    pool = ramp(broad + 0.6 * look.wet, 0.45, 0.95) * look.wet
    mirror = pool * jnp.where(on_road, 0.85, jnp.where(g.label == LABEL["sidewalk"], 0.5, 0.08))
    color = color.times(1.0 - 0.45 * look.wet)
    drift = value_noise(x * 0.8, z * 0.25, seed + 12)
    tracks = jnp.where(on_road, 0.62, 0.1)
    snow = look.snow * ramp(drift + 0.9 * look.snow, tracks + 0.35, tracks + 0.75)
    return color.mix(rgb(0.78, 0.80, 0.84).times(0.9 + 0.2 * drift), snow), mirror * (1.0 - snow)


def _markings(side: Array, far: Array, across: Array, along: Array, street: Street) -> tuple[Array, Array]:
    """Returns the cover of white and of yellow paint on the road, in [0, 1]."""
    width = 2.0 * street.half / street.lanes
    lane = (side + street.half) / width
    line = jnp.abs(lane - jnp.round(lane)) * width
    inner = jnp.abs(side) < street.half - 0.5 * width
    dash = far / jnp.where(street.country(), 12.0, 7.5)
    dashes = cover_cell(dash - jnp.floor(dash), 0.0, 0.42, along / 8.0)
    bare = (street.kind == 1) & (street.paving % 3 < 1)
    white = cover(line, -0.07, 0.07, across) * dashes * inner * jnp.where(bare, 0.0, 1.0)
    rim = street.half - jnp.abs(side)
    solid = cover(rim, 0.28, 0.42, across)
    white = jnp.maximum(white, solid * jnp.where(street.country(), 1.0, (street.paving % 5 < 1) * 1.0))
    # across the road before a crossing: stop line and zebra stripes
    before = street.crossing - far
    stop = cover(before, 4.9, 5.35, along) * (side * street.side > 0.0)
    stripe = side - jnp.floor(side)
    zebra = cover(before, 1.0, 4.2, along) * cover_cell(stripe, 0.0, 0.5, across) * street.zebra
    near = street.crossing < 100.0
    white = jnp.maximum(
        white * ~(near & (before < 5.4) & (before > -street.crossing_width - 2.0)), near * jnp.maximum(stop, zebra)
    )
    # double yellow lines where traffic keeps to the left
    double = jnp.maximum(cover(rim, 0.22, 0.32, across), cover(rim, 0.42, 0.52, across))
    yellow = double * (street.side < 0.0) * ~street.country() * (street.paving % 2 < 1)
    return white, yellow * ~(near & (jnp.abs(before + 0.5 * street.crossing_width) < 0.5 * street.crossing_width + 1.0))
