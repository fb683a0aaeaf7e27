"""What stands beside the road: houses, walls and fences, trees, poles with signs and lights, street furniture."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from fmda.world.looks import Look
from fmda.world.solids import LABEL, Material, Solids, pick
from fmda.world.street import Street

LOTS = 9  # per side
TREES = 9  # per side
POLES = 7  # per side
PARTS = dict[str, list[Solids]]

FACADES = (
    (0.52, 0.44, 0.34), (0.60, 0.56, 0.48), (0.70, 0.67, 0.60), (0.33, 0.17, 0.12), (0.40, 0.24, 0.17),
    (0.45, 0.36, 0.22),
    (0.36, 0.36, 0.36), (0.50, 0.50, 0.50), (0.62, 0.52, 0.33), (0.25, 0.24, 0.24), (0.45, 0.32, 0.26),
    (0.55, 0.45, 0.42),
    (0.30, 0.33, 0.36), (0.74, 0.73, 0.70),
)  # fmt: skip
ROOFS = (
    (0.30, 0.13, 0.09),
    (0.24, 0.13, 0.10),
    (0.13, 0.13, 0.14),
    (0.20, 0.16, 0.14),
    (0.36, 0.18, 0.11),
    (0.17, 0.18, 0.20),
)
LEAVES = ((0.075, 0.13, 0.030), (0.10, 0.15, 0.045), (0.055, 0.10, 0.030), (0.13, 0.16, 0.05), (0.06, 0.12, 0.05))
AUTUMN = ((0.36, 0.19, 0.04), (0.42, 0.27, 0.06), (0.30, 0.11, 0.04), (0.28, 0.22, 0.08))


def _row(key: PRNGKeyArray, street: Street, count: int, columns: int) -> tuple[Array, Array, Array, Array]:
    """Returns u [2*count, columns], the side (-1, +1), and the sidewalk and setback of each of two rows."""
    u = jax.random.uniform(key, (2 * count, columns))
    side = jnp.repeat(jnp.asarray([-1.0, 1.0]), count)
    walk = jnp.where(side < 0, street.sidewalk_left, street.sidewalk_right)
    setback = jnp.where(side < 0, street.setback_left, street.setback_right)
    return u, side, walk, setback


def _starts(lengths: Array, first: float) -> Array:
    """Returns where each of two rows of consecutive stretches begins; lengths [2*n] -> [2*n]."""
    rows = lengths.reshape(2, -1)
    return (jnp.cumsum(rows, 1) - rows + first).reshape(-1)


def leaf_colors(u: Array, v: Array, autumn: Array) -> Array:
    """Returns leaf colours [n, 3] from two columns of uniform numbers, shifted to autumn by its share."""
    mixed = jnp.where(v < autumn * 0.6, 0.8, 0.15 * autumn)[:, None]
    return pick(u, LEAVES) * (0.95 + 0.7 * v[:, None]) * (1.0 - mixed) + pick(u, AUTUMN) * mixed


def houses(key: PRNGKeyArray, street: Street, look: Look) -> PARTS:
    """Returns two rows of lots with houses, or in their place walls, fences and hedges before open ground."""
    u, side, walk, setback = _row(key, street, LOTS, 20)
    home = street.kind == 1
    length = jnp.where(home, 8.0 + 6.0 * u[:, 0], 8.0 + 15.0 * u[:, 0] ** 1.3)
    gap = jnp.where(home, 3.0 + 7.0 * u[:, 1], jnp.where(u[:, 1] < 0.72, 0.0, 2.0 + 7.0 * (u[:, 1] - 0.72) / 0.28))
    gap = jnp.where(street.country(), 8.0 + 25.0 * u[:, 1], gap)
    start = _starts(length + gap, -7.0)
    start, cut = street.clear_of_crossing(start, length)
    depth = 4.0 + 3.0 * u[:, 2]
    storeys = jnp.where(home, 1.6 + 1.4 * u[:, 3], 2.6 + 4.2 * u[:, 3] ** 1.2)
    storeys = jnp.where(street.country(), 1.5 + u[:, 3], storeys)
    height = storeys * (2.9 + 0.5 * u[:, 4]) * look.tower + 0.6
    built = jnp.where(street.city(), 0.86, jnp.where(home, 0.88, jnp.where(street.kind == 4, 0.14, 0.12)))
    house = (u[:, 5] < built) & (cut > 3.0)
    edge = street.half + walk
    jut = jnp.where(street.city(), 0.6 * (u[:, 6] - 0.3), 2.0 * u[:, 6])
    lateral = side * (edge + setback + depth + jut)
    frame = street.frame(start + 0.5 * cut, lateral)
    color = pick(u[:, 7], FACADES) * (0.75 + 0.45 * u[:, 8:9]) * jnp.where(home, 1.12, 1.0)
    body = frame.solids(
        0.0, 0.5 * height, 0.0, hx=depth, hy=0.5 * height, hz=0.5 * cut, label=LABEL["building"],
        material=Material.FACADE, color=color, color2=pick(u[:, 9], FACADES) * 0.8, detail=u[:, 10], detail2=u[:, 11],
        seed=jnp.floor(u[:, 12] * 60000.0), present=house,
    )  # fmt: skip
    pitched = house & (u[:, 13] < jnp.where(home | street.country(), 0.93, 0.5))
    rise = (1.2 + 1.6 * u[:, 14]) * (0.5 + 0.1 * depth)
    along = u[:, 15] < 0.65
    roof = frame.solids(
        0.0, height + rise, 0.0, hx=depth + 0.35, hy=rise, hz=0.5 * cut + 0.3, label=LABEL["building"],
        taper_x=jnp.where(along, 0.98, 0.4 * u[:, 16]),
        taper_z=jnp.where(along, 0.5 * u[:, 16] * (u[:, 16] > 0.4), 0.98),
        material=Material.ROOF, color=pick(u[:, 17], ROOFS) * (0.8 + 0.5 * u[:, 18:19]),
        seed=jnp.floor(u[:, 12] * 60000.0), present=pitched,
    )  # fmt: skip
    return {"boxes": [body, *_fronts(u, street, look, side, start, cut, gap, edge, house)], "frusta": [roof]}


def _fronts(
    u: Array, street: Street, look: Look, side: Array, start: Array, cut: Array, gap: Array, edge: Array, house: Array
) -> list[Solids]:
    """Walls, fences and hedges along the outer edge of the sidewalk, one per lot."""
    home, country = street.kind == 1, street.country()
    v = jnp.mod(u[:, 19] * 7.31 + u[:, 5] * 3.7, 1.0)
    w = jnp.mod(u[:, 18] * 5.17 + u[:, 9] * 9.1, 1.0)
    chance = jnp.where(home, 0.8, jnp.where(country, 0.32, jnp.where(house, 0.06, 0.85)))
    there = (v < chance) & (cut > 2.0)
    kind = jnp.mod(v * 13.7 + w, 1.0)
    wall = kind < jnp.where(home, 0.22, 0.42)
    fence = ~wall & (kind < jnp.where(home, 0.6, 0.85))
    low = jnp.where(house & ~home, 0.9, 1.0)
    height = jnp.where(wall, 0.9 + 1.7 * w**1.5, jnp.where(fence, 0.9 + 0.9 * w, 0.9 + 1.2 * w)) * low
    height = jnp.where((street.kind == 5) & wall, 2.0 + 2.5 * w, height)
    thick = jnp.where(wall, 0.14, jnp.where(fence, 0.035, 0.4))
    reach = 0.5 * (cut + jnp.where(home | country, gap, 0.0))
    lateral = side * (edge + jnp.where(country, 1.5 + 2.0 * u[:, 6], 0.25 + thick))
    stone = pick(w, ((0.45, 0.43, 0.40), (0.33, 0.19, 0.14), (0.55, 0.53, 0.50), (0.38, 0.33, 0.27)))
    metal = pick(w, ((0.10, 0.11, 0.11), (0.16, 0.22, 0.16), (0.35, 0.24, 0.15), (0.5, 0.5, 0.5), (0.7, 0.7, 0.68)))
    color = jnp.where(wall[:, None], stone, jnp.where(fence[:, None], metal, leaf_colors(w, v, 0.3 * look.autumn)))
    label = jnp.where(wall, LABEL["wall"], jnp.where(fence, LABEL["fence"], LABEL["vegetation"]))
    frame = street.frame(start + reach, lateral)
    material = jnp.where(wall, Material.BRICK, jnp.where(fence, Material.BARS, Material.LEAVES))
    return [
        frame.solids(
            0.0, 0.5 * height, 0.0, hx=thick, hy=0.5 * height, hz=reach, label=label, material=material, color=color,
            detail=w, detail2=kind, seed=jnp.floor(u[:, 12] * 60000.0), present=there,
        )
    ]  # fmt: skip


def backdrop(key: PRNGKeyArray, street: Street, look: Look) -> PARTS:
    """Returns what closes the view behind the first row: far houses, groves, and a house across the street's end."""
    count = 8
    u = jax.random.uniform(key, (count, 8))
    side = jnp.where(jnp.arange(count) % 2 == 0, -1.0, 1.0)
    along = 35.0 + 130.0 * u[:, 0]
    lateral = side * (30.0 + 45.0 * u[:, 1])
    town = street.kind <= 3
    height = jnp.where(street.city(), 12.0 + 22.0 * u[:, 2] ** 2, 7.0 + 4.0 * u[:, 2]) * look.tower
    last = jnp.arange(count) == count - 1
    across = last & (u[:, 3] < 0.4) & town
    lateral = jnp.where(across, 6.0 * (u[:, 1] - 0.5), lateral)
    along = jnp.where(across, 105.0 + 60.0 * u[:, 0], along)
    frame = street.frame(along, lateral)
    body = frame.solids(
        0.0, 0.5 * height, 0.0, hx=jnp.where(across, 22.0, 8.0 + 8.0 * u[:, 4]), hy=0.5 * height,
        hz=6.0 + 6.0 * u[:, 4],
        label=LABEL["building"], material=Material.FACADE, color=pick(u[:, 5], FACADES), color2=pick(u[:, 6], FACADES),
        detail=u[:, 6], detail2=u[:, 7], seed=jnp.floor(u[:, 7] * 60000.0),
        present=jnp.where(town, u[:, 3] < 0.6, u[:, 3] < 0.12),
    )  # fmt: skip
    v = jax.random.uniform(jax.random.fold_in(key, 1), (2 * count, 6))
    side = jnp.where(jnp.arange(2 * count) % 2 == 0, -1.0, 1.0)
    radius = 4.5 + 8.0 * v[:, 1]
    near = jnp.where(street.country(), street.half + 9.0 + radius, 20.0 + street.half)
    frame = street.frame(22.0 + 110.0 * v[:, 0], side * (near + 28.0 * v[:, 2] ** 2))
    tall = radius * (0.55 + 0.4 * v[:, 3])
    grove = frame.solids(
        0.0, 0.55 * tall, 0.0, hx=radius, hy=tall, hz=radius, ragged=0.35, label=LABEL["vegetation"],
        material=Material.LEAVES, color=leaf_colors(v[:, 4], v[:, 5], look.autumn) * 0.85,
        seed=jnp.floor(v[:, 5] * 60000.0),
        present=v[:, 3] < jnp.where(street.kind == 0, 0.45, jnp.where(street.country(), 0.9, 0.65)),
    )  # fmt: skip
    return {"boxes": [body], "ellipsoids": [grove]}


def trees(key: PRNGKeyArray, street: Street, look: Look) -> PARTS:
    """Returns two rows of trees with trunks and crowns of three blobs, some of them bare or conifers, and bushes."""
    u, side, walk, setback = _row(key, street, TREES, 22)
    kind = street.kind
    planted = jax.random.uniform(jax.random.fold_in(key, 1), (2,))
    avenue = jnp.repeat(planted, TREES) < jnp.where(kind == 3, 0.8, jnp.where(kind == 1, 0.8, 0.5))
    chance = jnp.where(avenue, 0.78, 0.16)
    chance = jnp.where(street.country(), jnp.where(jnp.repeat(planted, TREES) < 0.7, 0.85, 0.2), chance)
    spacing = jnp.where(street.country(), 7.0, 8.5) * (0.7 + 0.7 * u[:, 0])
    start = _starts(spacing, 3.5)
    start, _ = street.clear_of_crossing(start, jnp.zeros_like(start))
    garden = (kind == 1) & (u[:, 1] < 0.6)
    gap = jnp.where(
        street.country(), 2.0 + 9.0 * u[:, 1], jnp.where(garden, walk + 1.0 + 3.0 * u[:, 2], 0.55 + 0.4 * u[:, 2])
    )
    gap = jnp.where(kind == 3, 0.8 + (walk - 1.5) * u[:, 1], gap)
    frame = street.frame(start, side * (street.half + gap))
    there = u[:, 3] < chance
    conifer = u[:, 4] < jnp.where(street.country() | (kind == 1), 0.22, 0.04)
    bare = ~conifer & (u[:, 5] < look.bare)
    size = 0.85 + 0.95 * u[:, 6] * jnp.where(garden, 0.6, 1.0)
    trunk = jnp.where(conifer, 0.6, 2.1 + 1.1 * u[:, 7]) * (0.6 + 0.5 * size)
    bark = pick(u[:, 8], ((0.10, 0.075, 0.055), (0.15, 0.12, 0.095), (0.075, 0.06, 0.05), (0.20, 0.18, 0.15)))
    reach = jnp.where(bare, trunk * 1.5, trunk * 1.1)
    stems = frame.solids(
        0.0, 0.5 * reach, 0.0, hx=(0.10 + 0.14 * u[:, 9]) * size, hy=0.5 * reach, label=LABEL["vegetation"],
        material=Material.BARK, color=bark, present=there,
    )  # fmt: skip
    green = leaf_colors(u[:, 10], u[:, 11], look.autumn)
    green = jnp.where(conifer[:, None], jnp.asarray([[0.048, 0.085, 0.045]]) * (0.8 + 0.6 * u[:, 11:12]), green)
    color = jnp.where(bare[:, None], bark * 1.15, green)
    crowns = []
    for k in range(3):
        a, b, c = u[:, 12 + 3 * k], u[:, 13 + 3 * k], u[:, 14 + 3 * k]
        wide = jnp.where(conifer, 1.5 - 0.4 * k, 1.15 + 0.95 * a) * size
        tall = jnp.where(conifer, 2.2, wide * (0.75 + 0.4 * b))
        right = jnp.where(conifer, 0.0, (a - 0.5) * 2.5 * size)
        ahead = jnp.where(conifer, 0.0, (b - 0.5) * 2.8 * size)
        rise = jnp.where(conifer, trunk + 0.8 + 1.9 * k * size, trunk + (0.45 + 0.85 * k + 0.6 * c) * size + 0.3)
        crowns.append(
            frame.solids(
                right, rise, ahead, hx=wide, hy=tall, hz=wide, ragged=jnp.where(conifer, 0.4, 0.3 + 0.2 * b),
                holes=jnp.where(bare, 0.80, 0.0), label=LABEL["vegetation"], material=Material.LEAVES,
                color=color, detail=bare.astype(jnp.float32), seed=jnp.floor(u[:, 8] * 60000.0), present=there,
            )
        )  # fmt: skip
    v = jax.random.uniform(jax.random.fold_in(key, 2), (10, 7))
    edge = street.half + jnp.where(v[:, 0] < 0.5, street.sidewalk_left, street.sidewalk_right)
    spread = jnp.where(street.country(), 1.5 + 6.0 * v[:, 1], 0.7 + 0.8 * v[:, 1])
    place = street.frame(4.0 + 55.0 * v[:, 2] ** 1.5, jnp.where(v[:, 0] < 0.5, -1.0, 1.0) * (edge + spread))
    wide = 0.5 + jnp.where(street.country(), 1.2, 0.5) * v[:, 3]
    bushes = place.solids(
        0.0, 0.45 * wide, 0.0, hx=wide, hy=0.75 * wide, hz=wide * (0.8 + 0.8 * v[:, 4]), ragged=0.35,
        label=LABEL["vegetation"],
        material=Material.LEAVES, color=leaf_colors(v[:, 5], v[:, 6], look.autumn), seed=jnp.floor(v[:, 6] * 60000.0),
        present=v[:, 4] < jnp.where(street.kind == 0, 0.2, 0.65),
    )  # fmt: skip
    return {"ellipsoids": [*crowns, bushes], "cylinders": [stems]}


def poles(key: PRNGKeyArray, street: Street, look: Look) -> PARTS:
    """Returns kerb-side posts: street lamps, signs (plate, disc, triangle), signals, and plain posts."""
    u, side, walk, _ = _row(key, street, POLES, 14)
    start = _starts(jnp.where(street.country(), 9.0, 6.5) + 9.0 * u[:, 0], 4.0)
    start, _ = street.clear_of_crossing(start, jnp.zeros_like(start))
    corner = (jnp.arange(2 * POLES) % POLES == 0) & (street.crossing < 100.0)
    start = jnp.where(corner, street.crossing - 0.6, start)
    there = corner | (u[:, 1] < jnp.where(street.country(), 0.5, 0.68))
    kind = jnp.where(corner & (u[:, 2] < 0.8), 0.97, u[:, 2])  # lamp, sign, plain, signal
    lamp, sign = kind < 0.36, (kind >= 0.36) & (kind < 0.78)
    plain, signal = (kind >= 0.78) & (kind < 0.86), kind >= 0.86
    signal &= ~street.country() | (street.crossing < 100.0)
    height = jnp.where(lamp, 5.5 + 3.0 * u[:, 3], jnp.where(sign, 2.5 + 0.8 * u[:, 3], 3.2 + 0.5 * u[:, 3]))
    height = jnp.where(plain, 5.0 + 3.0 * u[:, 3], height)
    radius = jnp.where(sign, 0.045, jnp.where(lamp | plain, 0.085, 0.075))
    frame = street.frame(start, side * (street.half + 0.35 + 0.3 * u[:, 4]))
    metal = pick(u[:, 5], ((0.38, 0.39, 0.40), (0.25, 0.26, 0.26), (0.10, 0.12, 0.11), (0.5, 0.5, 0.5)))
    seed = jnp.floor(u[:, 6] * 60000.0)
    pole = LABEL["pole"]
    posts = frame.solids(0.0, 0.5 * height, 0.0, hx=radius, hy=0.5 * height, label=pole, color=metal, present=there)
    mast = signal & (u[:, 7] < 0.35)
    reach = jnp.where(mast, 1.8, 0.75)
    arms = frame.solids(
        -side * reach, jnp.where(mast, height + 1.2, height - 0.05), 0.0, hx=reach, hy=0.05, hz=0.05, label=pole,
        color=metal, present=there & (lamp | mast),
    )  # fmt: skip
    stub = frame.solids(0.0, height + 0.6, 0.0, hx=0.06, hy=0.65, label=pole, color=metal, present=there & mast)
    heads = frame.solids(
        -side * 1.5, height - 0.12, 0.0, hx=0.42, hy=0.07, hz=0.16, label=pole, material=Material.LAMP,
        color=(0.5, 0.5, 0.48), present=there & lamp,
    )  # fmt: skip
    box = dict(
        hx=0.19, hy=0.5, hz=0.16, label=LABEL["traffic light"], material=Material.SIGNAL, color=(0.03, 0.035, 0.03)
    )
    state = jnp.floor(u[:, 8] * 3.0)
    lights = frame.solids(0.0, height - 0.35, -0.22, detail=state, seed=seed, present=there & signal, **box)
    over = frame.solids(
        -side * (reach * 1.9), height + 0.95, -0.1, detail=state, seed=seed, present=there & mast, **box
    )
    shape, hue = u[:, 9], u[:, 10]
    size = jnp.where(street.kind == 5, 0.75, 0.33 + 0.12 * u[:, 11])
    rise = jnp.where(sign, height + 0.15, 2.6 + 0.5 * u[:, 12])
    signed = there & (sign | (lamp & (u[:, 13] < 0.22)))
    common = dict(label=LABEL["traffic sign"], material=Material.SIGN, seed=seed, detail2=hue)
    tilt = 0.12 * (u[:, 12] - 0.5)
    plates = frame.solids(
        tilt,
        rise,
        -0.1,
        hx=size * (0.8 + 0.7 * hue),
        hy=size,
        hz=0.02,
        detail=0.0,
        present=signed & (shape < 0.42),
        **common,
    )
    discs = frame.solids(
        tilt,
        rise,
        -0.1,
        hx=size,
        hy=size,
        hz=0.03,
        detail=1.0,
        present=signed & (shape >= 0.42) & (shape < 0.76),
        **common,
    )
    triangles = frame.solids(
        tilt,
        rise,
        -0.1,
        hx=size * 1.1,
        hy=size,
        hz=0.02,
        taper_x=0.97,
        detail=2.0,
        present=signed & (shape >= 0.76),
        **common,
    )
    bridge = _gantry(jax.random.fold_in(key, 1), street)
    return {
        "boxes": [arms, heads, lights, over, plates, *bridge["boxes"]],
        "frusta": [triangles],
        "ellipsoids": [discs],
        "cylinders": [posts, stub, *bridge["cylinders"]],
    }


def _gantry(key: PRNGKeyArray, street: Street) -> PARTS:
    """Returns the sign bridge of a highway."""
    u = jax.random.uniform(key, (2, 6))
    there = (street.kind == 5) & (u[0, 0] < 0.6)
    side = jnp.asarray([-1.0, 1.0])
    along = jnp.full(2, 14.0) + 50.0 * u[0, 1]
    wide = street.half + 1.0
    frame = street.frame(along, side * wide)
    grey = (0.42, 0.43, 0.44)
    posts = frame.solids(0.0, 3.3, 0.0, hx=0.16, hy=3.3, label=LABEL["pole"], color=grey, present=there)
    beam = frame.solids(
        -side * 0.5 * wide, 6.3, 0.0, hx=0.5 * wide, hy=0.22, hz=0.15, label=LABEL["pole"], color=grey, present=there
    )
    boards = frame.solids(
        -side * wide * (0.25 + 0.35 * u[:, 2]), 6.4, -0.25, hx=1.5 + 1.3 * u[:, 3], hy=0.9 + 0.5 * u[:, 4], hz=0.05,
        label=LABEL["traffic sign"], material=Material.SIGN, detail=0.0, detail2=0.05 + 0.3 * jnp.round(u[:, 5]),
        seed=jnp.floor(u[:, 5] * 60000.0), present=there,
    )  # fmt: skip
    return {"boxes": [beam, boards], "cylinders": [posts]}


def furniture(key: PRNGKeyArray, street: Street, look: Look) -> PARTS:
    """Returns bins, cabinets, benches and posters on the sidewalk, which carry no class."""
    u = jax.random.uniform(key, (8, 9))
    side = jnp.where(u[:, 0] < 0.5, -1.0, 1.0)
    walk = jnp.where(side < 0, street.sidewalk_left, street.sidewalk_right)
    frame = street.frame(4.0 + 40.0 * u[:, 1], side * (street.half + 0.5 + jnp.maximum(walk - 1.0, 0.0) * u[:, 2]))
    frame = frame._replace(y=frame.y + 0.12)
    there = (u[:, 3] < 0.42 * street.density) & (street.kind <= 3)
    color = pick(
        u[:, 4], ((0.06, 0.09, 0.07), (0.25, 0.26, 0.27), (0.42, 0.22, 0.05), (0.35, 0.33, 0.28), (0.05, 0.10, 0.25))
    )
    tall = 0.4 + 0.25 * u[:, 5]
    round_ = u[:, 6] < 0.45
    bins = frame.solids(0.0, tall, 0.0, hx=0.22 + 0.12 * u[:, 7], hy=tall, color=color, present=there & round_)
    cases = frame.solids(
        0.0, tall * (0.6 + u[:, 8]), 0.0, hx=0.2 + 0.12 * u[:, 7], hy=tall * (0.6 + u[:, 8]), hz=0.3 + 0.7 * u[:, 8],
        color=color, present=there & ~round_,
    )  # fmt: skip
    return {"boxes": [cases], "cylinders": [bins]}
