"""Surfaces of solids: what a point of each material looks like."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from fmda.world.looks import Look
from fmda.world.noise import lattice, value_noise
from fmda.world.shading import Rgb, cover, cover_cell, ramp, rgb, where
from fmda.world.solids import Material, Solids


class Surface(NamedTuple):
    """One point of a solid per pixel: the solid's fields and where the point lies on it.

    local: (x, y, z) in the solid's frame; height: above the ground; side: 0 on x faces, 1 on top or below, 2 on
    z faces; along: metres along the face; foot: size of a pixel on the surface, metres; normal in the world.
    """

    solid: Solids
    local: tuple[Array, Array, Array]
    height: Array
    side: Array
    along: Array
    foot: Array
    normal: tuple[Array, Array, Array]


class Finish(NamedTuple):
    """Albedo, light given off, and mirroring of the sky in [0, 1]."""

    albedo: Rgb
    glow: Rgb
    gloss: Array


def paint(s: Surface, look: Look) -> Finish:
    """Returns the finish of every point by its solid's material."""
    p = s.solid
    base = Rgb(p.red, p.green, p.blue)
    seed = p.seed.astype(jnp.int32)
    material = p.material
    grain = value_noise(s.along * 3.1 + 0.37 * p.seed, s.height * 3.1, seed) - 0.5
    fine = (value_noise(s.along * 14.0, s.height * 14.0, seed + 1) - 0.5) * ramp(s.foot, 0.12, 0.02)
    plain = base.times(1.0 + look.texture * (0.25 * grain + 0.2 * fine))
    dark = rgb(0.0, 0.0, 0.0)
    result = Finish(plain, Rgb(*(jnp.zeros_like(grain),) * 3), jnp.zeros_like(grain))

    def use(kind: Material, albedo: Rgb, glow: Rgb = dark, gloss: Array | float = 0.0) -> None:
        nonlocal result
        mask = material == kind
        result = Finish(
            where(mask, albedo, result.albedo), where(mask, glow, result.glow), jnp.where(mask, gloss, result.gloss)
        )

    use(Material.FACADE, *_facade(s, base, seed, grain, fine, look))
    rows = cover_cell(_fraction(s.local[1] / 0.33), 0.0, 0.25, s.foot / 0.33)
    gable = jnp.abs(s.normal[1]) < 0.15
    second = Rgb(p.red2, p.green2, p.blue2)
    tiles = base.times((1.0 - 0.3 * rows) * (1.0 + look.texture * (0.4 * grain + 0.3 * fine)))
    use(Material.ROOF, where(gable, second.times(1.0 + 0.2 * grain), tiles))
    use(Material.LEAVES, _leaves(s, base, seed, look))
    use(Material.PAINT, *_vehicle_body(s, base, second, seed, look))
    use(Material.CABIN, *_cabin(s, base))
    use(Material.COACH, *_coach(s, base, second, seed, look))
    use(Material.WHEEL, _wheel(s, base))
    use(Material.BRICK, _masonry(s, base, seed, grain, fine, look))
    use(Material.BARS, _bars(s, base, grain))
    use(Material.SIGN, _sign(s, seed))
    use(Material.SIGNAL, *_signal(s, base))
    hair = where(p.detail > 0.5, second, second)
    covered = s.local[1] > jnp.where(p.detail > 0.5, -0.2, 0.3) * p.hy
    use(Material.HEAD, where(covered, hair, base))
    lit = jnp.where(s.side == 1, 1.0, 0.5) * look.lamps
    use(Material.LAMP, plain, rgb(2.6, 2.0, 1.2).times(lit))
    folds = value_noise(s.along * 13.0, s.height * 4.0, seed) - 0.5
    use(Material.CLOTH, base.times(1.0 + 0.5 * folds))
    use(Material.BARK, base.times(1.0 + look.texture * (0.8 * fine + 0.5 * grain)))
    return result


def _fraction(x: Array) -> Array:
    return x - jnp.floor(x)


def _facade(s: Surface, base: Rgb, seed: Array, grain: Array, fine: Array, look: Look) -> tuple[Rgb, Rgb, Array]:
    """Wall with rows of windows, a ground floor with doors or shops, ledges and a cornice."""
    p = s.solid
    half = jnp.where(s.side == 0, p.hz, p.hx)
    columns = jnp.maximum(jnp.round(2.0 * half / (1.7 + 1.9 * p.detail)), 1.0)
    storeys = jnp.maximum(jnp.round((2.0 * p.hy - 0.6) / 3.1), 1.0)
    step_u, step_v = 2.0 * half / columns, 2.0 * p.hy / storeys
    u, v = (s.along + half) / step_u, s.height / step_v
    cell_u, cell_v = jnp.floor(u), jnp.floor(v)
    fu, fv = u - cell_u, v - cell_v
    wu, wv = s.foot / step_u, s.foot / step_v
    style = p.detail2
    ground = cell_v < 0.5
    shop = ground & (p.detail > 0.45) & (p.hy > 3.5)
    wide = 0.17 + 0.15 * lattice(seed, 5) + jnp.where(style > 0.6, 0.14, 0.0) + jnp.where(style > 0.88, 0.04, 0.0)
    wide = jnp.where(shop, 0.45, wide)
    low = jnp.where(shop, 0.06, jnp.where(style > 0.88, 0.10, 0.30))
    high = jnp.where(shop, 0.68, jnp.where(style > 0.88, 0.93, 0.80))
    window = cover_cell(fu, 0.5 - wide, 0.5 + wide, wu) * cover_cell(fv, low, high, wv)
    trim = cover_cell(fu, 0.46 - wide, 0.54 + wide, wu) * cover_cell(fv, low - 0.05, high + 0.04, wv)
    near = ramp(wu, 0.25, 0.08)
    bars = jnp.maximum(cover(fu, 0.485, 0.515, wu), cover(fv, 0.62, 0.64, wv)) * near
    dice = lattice(cell_u, cell_v, seed + s.side.astype(jnp.int32))
    dice2 = _fraction(dice * 37.7)
    red_brick = (base.red > 1.45 * base.blue) & (base.red < 0.45)
    course = cover_cell(_fraction(s.height / 0.22), 0.0, 0.2, s.foot / 0.22)
    courses = jnp.where(red_brick, 0.3 * course * ramp(s.foot, 0.2, 0.05), 0.0)
    stain = value_noise(s.along * 0.7, s.height * 0.22, seed + 4) - 0.5
    dirt = 1.0 - 0.22 * ramp(s.height, 1.2, 0.0) + 0.0 * grain
    tone = (1.0 + look.texture * (0.22 * grain + 0.3 * fine + 0.28 * stain)) * dirt * (1.0 - courses)
    wall = base.times(tone)
    second = Rgb(p.red2, p.green2, p.blue2)
    wall = wall.mix(second.times(tone), jnp.where(ground & (lattice(seed, 9) < 0.45), 0.8, 0.0))
    ledge = cover(fv, 0.0, 0.06, wv) * jnp.where(lattice(seed, 6) < 0.5, 0.35, 0.0) * (cell_v > 0.5)
    cornice = ramp(s.height, 2.0 * p.hy - 0.45, 2.0 * p.hy - 0.40)
    wall = wall.times(1.0 + ledge - 0.25 * cornice)
    bright = lattice(seed, 7)
    frame = rgb(0.62, 0.61, 0.58).mix(rgb(0.12, 0.11, 0.10), jnp.where(bright < 0.35, 1.0, 0.0))
    color = wall.mix(frame, trim * (1.0 - window) * jnp.where(lattice(seed, 8) < 0.7, 0.8, 0.15))
    pane = rgb(0.025, 0.030, 0.036).times(0.6 + dice)
    curtain = ramp(dice2, 0.62, 0.64) * ramp(fv, 0.2 + 0.6 * dice, 0.25 + 0.6 * dice)
    pane = pane.mix(rgb(0.36, 0.34, 0.31), 0.7 * curtain)
    pane = pane.mix(frame.times(0.9), bars * ~shop)
    goods = lattice(jnp.floor(s.along * 1.9), jnp.floor(s.height * 2.3), seed)
    pane = where(
        shop, rgb(0.05 + 0.22 * goods**3, 0.05 + 0.16 * _fraction(goods * 5.1) ** 3, 0.05 + 0.12 * goods**4), pane
    )
    color = color.mix(pane, window)
    door = ground & ~shop & (dice < 0.3) & (jnp.abs(fu - 0.5) * step_u < 0.55) & (s.height < 2.2)
    color = where(door, second.times(0.35), color)
    # the fascia above a shop: a band of colour with lettering
    fascia = shop * cover(fv, 0.74, 0.93, wv)
    letters = (lattice(jnp.floor(s.along * 3.6), 1, seed + 2) < 0.6) & (fv > 0.79) & (fv < 0.88)
    letters &= jnp.abs(_fraction(cell_u / 3.0 + fu / 3.0) - 0.5) < 0.33
    banner = rgb(lattice(seed, 11) ** 2 * 0.6, lattice(seed, 12) ** 2 * 0.5, lattice(seed, 13) ** 2 * 0.6)
    color = color.mix(where(letters & (s.foot < 0.2), rgb(0.75, 0.73, 0.68), banner.times(1.0)), fascia)
    top = s.side == 1
    color = where(top, rgb(0.2, 0.19, 0.18), color)
    lamp = (dice2 < jnp.where(shop, look.lit * 2.2, look.lit)) & ~top
    warm = rgb(1.25, 0.85, 0.42).mix(rgb(0.85, 0.95, 1.1), jnp.where(_fraction(dice * 11.3) < 0.25, 1.0, 0.0))
    glow = warm.times(window * lamp * (0.35 + 0.5 * dice) * (1.0 - 0.6 * bars))
    neon = banner.plus(rgb(0.15, 0.1, 0.05)).times(2.0 * fascia * ramp(look.lit, 0.02, 0.2) * (lattice(seed, 14) < 0.6))
    return color, glow.plus(where(top, rgb(0.0, 0.0, 0.0), neon)), window * 0.5 * (1.0 - curtain) * ~top


def _leaves(s: Surface, base: Rgb, seed: Array, look: Look) -> Rgb:
    x, y, z = s.local
    clump = value_noise(x * 2.6 + z * 1.3, y * 2.6 - z * 0.9, seed)
    leaf = value_noise(x * 8.5 + z * 3.1, y * 8.5 + z * 4.7, seed + 1)
    leaf = 0.5 + (leaf - 0.5) * ramp(s.foot, 0.25, 0.04)
    tone = 1.0 + look.texture * (1.1 * (clump - 0.5) + 1.3 * (leaf - 0.5))
    depth = 0.62 + 0.45 * jnp.clip(y / jnp.maximum(s.solid.hy, 1e-3), -1.0, 1.0)
    color = base.times(tone * depth)
    return color.mix(rgb(0.75, 0.78, 0.82), look.snow * ramp(s.normal[1] + 0.6 * (leaf - 0.5), 0.25, 0.6) * 0.85)


def _lamps_at(x: Array, y: Array, at: float, wide: float, low: float, high: float) -> Array:
    """True on a pair of lamps at |x| near `at`, y between low and high, in units of half sizes."""
    return (jnp.abs(jnp.abs(x) - at) < wide) & (y > low) & (y < high)


def _vehicle_body(s: Surface, base: Rgb, second: Rgb, seed: Array, look: Look) -> tuple[Rgb, Rgb, Array]:
    """Lower body of a car with lamps, plates and sills, or (detail 2) the box of a truck."""
    p = s.solid
    x, y, z = (a / jnp.maximum(h, 1e-3) for a, h in zip(s.local, (p.hx, p.hy, p.hz), strict=True))
    cargo = p.detail > 1.5
    end = (s.side == 2) | ((jnp.abs(z) > 0.93) & (s.side == 0) & ~cargo)
    front, rear = end & (z > 0.0), end & (z < 0.0)
    dirt = 1.0 - 0.3 * ramp(y, -0.3, -1.0)
    color = base.times(dirt)
    sill = (y < -0.62) & ~cargo
    color = where(sill, rgb(0.03, 0.03, 0.032), color)
    seam = (
        (cover(s.local[2], -0.02, 0.02, s.foot) + cover(s.local[2] + 0.95, -0.02, 0.02, s.foot))
        * (s.side == 0)
        * ~cargo
    )
    color = color.times(1.0 - 0.55 * seam)
    # wheel arches
    arch = (s.side == 0) & ~cargo & (jnp.hypot(jnp.abs(s.local[2]) - 0.62 * p.hz, s.height - 0.31) < 0.40)
    color = where(arch, rgb(0.012, 0.012, 0.012), color)
    grille = front & (jnp.abs(x) < 0.5) & (y > -0.25) & (y < 0.25) & ~cargo
    color = where(grille, rgb(0.03, 0.03, 0.03), color)
    plate = end & (jnp.abs(x) < 0.29) & (jnp.abs(y + 0.18) < 0.16) & ~cargo
    yellow = rear & (lattice(seed, 2) < 0.25)
    color = where(plate, where(yellow, rgb(0.6, 0.45, 0.05), rgb(0.65, 0.65, 0.65)), color)
    head = front & _lamps_at(x, y, 0.76, 0.19, 0.1, 0.62) & ~cargo
    tail = rear & _lamps_at(x, y, 0.82, 0.16, 0.05, 0.85) & ~cargo
    color = where(head, rgb(0.6, 0.62, 0.65), where(tail, rgb(0.35, 0.015, 0.01), color))
    stripe = cargo & (jnp.abs(y - 0.2) < 0.12 + 0.3 * p.detail2) & (s.side == 0) & (p.detail2 < 0.6)
    color = where(stripe, second, color)
    doors = cargo & (s.side == 2) & (jnp.abs(s.local[0]) < 0.03)
    color = where(doors, rgb(0.05, 0.05, 0.05), color)
    lamp = cargo & rear & _lamps_at(x, y, 0.8, 0.14, -0.98, -0.86)
    running = jnp.where(p.detail > 0.5, 1.0, 0.06)
    brake = jnp.where(p.detail2 < 0.4, 0.35, 0.0) * running
    glow = rgb(1.8, 1.75, 1.6).times(head * running * (look.lamps * 1.6))
    glow = glow.plus(rgb(1.0, 0.05, 0.03).times((tail | lamp) * (running * look.lamps * 0.9 + brake)))
    gloss = jnp.where(cargo, 0.08, jnp.where(sill | plate | arch, 0.0, 0.16))
    return color, glow, gloss


def _cabin(s: Surface, base: Rgb) -> tuple[Rgb, Rgb, Array]:
    """Windows around, pillars and roof in body colour; vans (detail 1) are closed behind."""
    p = s.solid
    y = s.local[1] / jnp.maximum(p.hy, 1e-3)
    z = s.local[2] / jnp.maximum(p.hz, 1e-3)
    x = s.local[0] / jnp.maximum(p.hx, 1e-3)
    van = p.detail > 0.5
    low, high = jnp.where(van, -0.55, -0.9), jnp.where(van, 0.45, 0.72)
    glass = (y > low) & (y < high) & (s.side != 1)
    inner = jnp.where(s.side == 0, (jnp.abs(z) < 0.86) & (jnp.abs(z + 0.08) > 0.05), jnp.abs(x) < 0.84)
    closed = van & (((s.side == 0) & (z < 0.4)) | ((s.side == 2) & (z < 0.0) & (lattice(p.seed, 4) < 0.5)))
    glass = glass & inner & ~closed
    inside = rgb(0.02, 0.023, 0.025).times(1.0 + 0.8 * (y < -0.3))
    zero = rgb(0.0, 0.0, 0.0)
    return where(glass, inside, base), zero, jnp.where(glass, 0.5, 0.16)


def _coach(s: Surface, base: Rgb, second: Rgb, seed: Array, look: Look) -> tuple[Rgb, Rgb, Array]:
    """Bus (detail 0), tram (1) or truck cab (2): window band, windscreen, stripe, destination."""
    p = s.solid
    x, y = s.local[0] / jnp.maximum(p.hx, 1e-3), s.local[1] / jnp.maximum(p.hy, 1e-3)
    cab = p.detail > 1.5
    tram = (p.detail > 0.5) & ~cab
    end, flank = s.side == 2, s.side == 0
    front = end & (s.local[2] > 0.0)
    rear = end & ~front
    pitch = jnp.where(tram, 1.9, 1.45)
    pane = cover_cell(_fraction(s.along / pitch), 0.05, 0.95, s.foot / pitch)
    band = (y > jnp.where(cab, 0.1, -0.15)) & (y < 0.62)
    side_glass = flank & band & (pane > 0.5) & (~cab | (s.local[2] > -0.1 * p.hz))
    screen = front & (y > jnp.where(cab, 0.05, -0.3)) & (y < 0.68) & (jnp.abs(x) < 0.9)
    back_glass = rear & (y > 0.1) & (y < 0.6) & (jnp.abs(x) < 0.75) & ~cab
    glass = side_glass | screen | back_glass
    door = flank & ~cab & (jnp.abs(_fraction((s.along + 1.0) / 5.2) - 0.5) < 0.11) & (y > -0.93) & (y < 0.62)
    glass |= door
    skirt = y < -0.86
    stripe = (jnp.abs(y + 0.42) < 0.2) & (p.detail2 < 0.7) & ~cab
    lower = (y < -0.15) & (p.detail2 > 0.85) & ~cab
    color = where(stripe | lower, second, base)
    color = where(skirt, rgb(0.05, 0.05, 0.05), color)
    inside = rgb(0.028, 0.032, 0.036)
    color = where(glass, inside, color)
    board = end & ~cab & (y > 0.74) & (y < 0.93) & (jnp.abs(x) < 0.62)
    text = board & (lattice(jnp.floor(s.along * 6.0), jnp.floor(s.height * 7.0), seed) < 0.45)
    color = where(board, rgb(0.02, 0.02, 0.02), color)
    plate = end & (jnp.abs(x) < 0.2) & (jnp.abs(y + 0.75) < 0.05)
    color = where(plate, rgb(0.65, 0.63, 0.5), color)
    head = front & _lamps_at(x, y, 0.74, 0.14, -0.8, -0.66)
    tail = rear & _lamps_at(x, y, 0.85, 0.09, -0.75, -0.45)
    color = where(head, rgb(0.65, 0.66, 0.68), where(tail, rgb(0.4, 0.02, 0.015), color))
    glow = rgb(0.9, 0.5, 0.08).times(text * 0.5)
    glow = glow.plus(rgb(1.8, 1.75, 1.6).times(head * look.lamps * 1.6)).plus(
        rgb(1.0, 0.05, 0.03).times(tail * look.lamps)
    )
    inner = glass & ~screen & ~cab
    glow = glow.plus(
        rgb(0.95, 0.92, 0.75).times(inner * 0.5 * jnp.minimum(look.lamps, 1.0) * ramp(look.lit, 0.0, 0.15))
    )
    return color, glow, jnp.where(glass, 0.45, 0.1)


def _wheel(s: Surface, base: Rgb) -> Rgb:
    p = s.solid
    radius = jnp.hypot(s.local[1], s.local[2]) / jnp.maximum(p.hy, 1e-3)
    angle = jnp.arctan2(s.local[1], s.local[2])
    spokes = jnp.cos(angle * 5.0) > -0.2
    rim = where(spokes, rgb(0.36, 0.36, 0.37), rgb(0.05, 0.05, 0.05))
    cycle = p.detail > 0.5
    thin = jnp.abs(_fraction(angle * 2.3) - 0.5) < 0.14
    web = where(thin & (s.foot < 0.05), rgb(0.3, 0.3, 0.3), rgb(0.15, 0.15, 0.145))
    return where(cycle, where(radius < 0.84, web, base), where(radius < 0.62, rim, base))


def _masonry(s: Surface, base: Rgb, seed: Array, grain: Array, fine: Array, look: Look) -> Rgb:
    row = jnp.floor(s.height / 0.16)
    u = s.along / 0.42 + 0.5 * _fraction(row * 0.5) * 2.0
    joint = jnp.maximum(
        cover_cell(_fraction(u), 0.0, 0.07, s.foot / 0.42),
        cover_cell(_fraction(s.height / 0.16), 0.0, 0.16, s.foot / 0.16),
    )
    panel = cover_cell(_fraction(s.along / 2.6), 0.0, 0.02, s.foot / 2.6)
    stones = lattice(jnp.floor(u), row, seed) - 0.5
    bricks = s.solid.detail2 < 0.5
    tone = jnp.where(
        bricks, (1.0 - 0.25 * joint) * (1.0 + 0.4 * look.texture * stones * ramp(s.foot, 0.3, 0.06)), 1.0 - 0.4 * panel
    )
    cap = ramp(s.height, 2.0 * s.solid.hy - 0.10, 2.0 * s.solid.hy - 0.08)
    return base.times(tone * (1.0 + look.texture * (0.35 * grain + 0.3 * fine)) * (1.0 + 0.3 * cap))


def _bars(s: Surface, base: Rgb, grain: Array) -> Rgb:
    p = s.solid
    wood = (p.red > 1.3 * p.blue) | (p.red > 0.6)
    pitch = jnp.where(wood, 0.18, 0.13)
    post = cover_cell(_fraction(s.along / 2.2), 0.0, 0.05, s.foot / 2.2)
    bars = cover_cell(_fraction(s.along / pitch), 0.0, jnp.where(wood, 0.78, 0.26), s.foot / pitch)
    top = 2.0 * p.hy
    rail = cover(s.height, top - 0.09, top, s.foot) + cover(s.height, 0.12, 0.18, s.foot)
    solid = jnp.clip(jnp.maximum(jnp.maximum(post, bars), rail), 0.0, 1.0)
    behind = rgb(0.16, 0.16, 0.12).times(0.75 + 0.5 * grain)
    return behind.mix(base.times(1.0 + 0.2 * grain), solid)


def _sign(s: Surface, seed: Array) -> Rgb:
    """Faces of traffic signs: plates (detail 0), discs (1), triangles (2)."""
    p = s.solid
    x, y = s.local[0] / jnp.maximum(p.hx, 1e-3), s.local[1] / jnp.maximum(p.hy, 1e-3)
    hue = p.detail2
    white, red, black = rgb(0.75, 0.75, 0.74), rgb(0.55, 0.025, 0.03), rgb(0.03, 0.03, 0.03)
    fields = where(hue < 0.35, rgb(0.02, 0.10, 0.42), where(hue < 0.55, rgb(0.02, 0.24, 0.10), white))
    fields = where((hue > 0.7) & (hue < 0.85), rgb(0.72, 0.50, 0.03), fields)
    ink = where(hue < 0.55, white, black)
    line = (_fraction(y * 1.6) > 0.35) & (_fraction(y * 1.6) < 0.75) & (jnp.abs(x) < 0.75)
    text = line & (lattice(jnp.floor(x * 5.0), jnp.floor(y * 1.6), seed) < 0.7)
    rim = (jnp.abs(x) > 0.9) | (jnp.abs(y) > 0.88)
    plate = where(text | rim, ink, fields)
    radius = jnp.hypot(x, y)
    bar = (jnp.abs(y) < 0.2) & (jnp.abs(x) < 0.65)
    no_entry = where(bar, white, red)
    ring = where(
        radius > 0.68, red, where((jnp.abs(x) < 0.42) & (jnp.abs(y) < 0.3) & (_fraction(x * 1.4) > 0.3), black, white)
    )
    arrow = where((jnp.abs(x) < 0.14) & (jnp.abs(y) < 0.6), white, rgb(0.02, 0.12, 0.48))
    disc = where(hue < 0.25, no_entry, where(hue < 0.7, ring, arrow))
    inner = (y > -0.62) & (jnp.abs(x) < 0.55 * (0.62 - y) * 0.72)
    glyph = (jnp.abs(x) < 0.1) & (y > -0.45) & (y < 0.2)
    triangle = where(glyph, black, where(inner, where(hue < 0.8, white, rgb(0.72, 0.55, 0.05)), red))
    face = where(p.detail < 0.5, plate, where(p.detail < 1.5, disc, triangle))
    return where(s.local[2] > 0.0, rgb(0.28, 0.28, 0.28), face)


def _signal(s: Surface, base: Rgb) -> tuple[Rgb, Rgb, Array]:
    p = s.solid
    x, y = s.local[0], s.local[1]
    lens = [jnp.hypot(x, y - at) < 0.12 for at in (0.31, 0.0, -0.31)]
    front = (s.side == 2) & (s.local[2] < 0.0)
    colors = (rgb(1.0, 0.05, 0.03), rgb(1.0, 0.55, 0.04), rgb(0.05, 0.95, 0.45))
    color, glow = base, rgb(0.0, 0.0, 0.0)
    for k in range(3):
        on = jnp.abs(p.detail - k) < 0.5
        color = where(front & lens[k], colors[k].times(jnp.where(on, 0.6, 0.05)), color)
        glow = where(front & lens[k] & on, colors[k].times(1.6), glow)
    return color, Rgb(*(jnp.broadcast_to(c, x.shape) for c in glow)), jnp.zeros_like(x)
