"""What moves: cars, vans, trucks, buses, trams, two-wheelers with and without riders, persons."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from fmda.world.looks import Look
from fmda.world.solids import LABEL, Frame, Material, Solids, pick
from fmda.world.street import Street

PARKED = 7  # cars per side
MOVING = 5
LARGE = 5
CYCLES = 7
PERSONS = 10
PARTS = dict[str, list[Solids]]

PAINTS = (
    (0.02, 0.02, 0.022), (0.03, 0.03, 0.035), (0.32, 0.33, 0.34), (0.48, 0.49, 0.50), (0.75, 0.75, 0.74),
    (0.70, 0.70, 0.70),
    (0.02, 0.04, 0.14), (0.05, 0.09, 0.25), (0.30, 0.02, 0.02), (0.40, 0.03, 0.03), (0.12, 0.12, 0.13),
    (0.03, 0.10, 0.05),
    (0.20, 0.15, 0.09), (0.06, 0.16, 0.28), (0.16, 0.17, 0.18), (0.55, 0.42, 0.08),
)  # fmt: skip
CLOTHES = (
    (0.03, 0.03, 0.035), (0.06, 0.07, 0.12), (0.12, 0.12, 0.13), (0.35, 0.05, 0.05), (0.55, 0.53, 0.50),
    (0.10, 0.16, 0.30),
    (0.20, 0.16, 0.11), (0.06, 0.14, 0.08), (0.45, 0.33, 0.12), (0.28, 0.28, 0.30), (0.42, 0.20, 0.28),
)  # fmt: skip
TROUSERS = ((0.03, 0.03, 0.04), (0.05, 0.07, 0.14), (0.09, 0.11, 0.17), (0.16, 0.14, 0.11), (0.10, 0.10, 0.10))
HAIR = ((0.02, 0.015, 0.01), (0.1, 0.06, 0.03), (0.3, 0.2, 0.09), (0.3, 0.3, 0.3))
SKIN = ((0.55, 0.36, 0.26), (0.45, 0.28, 0.19), (0.26, 0.15, 0.09), (0.60, 0.42, 0.32))


def cars(key: PRNGKeyArray, street: Street, look: Look) -> PARTS:
    """Returns parked and moving cars: body, cabin with windows, four wheels; instances 1 to 19."""
    count = 2 * PARKED + MOVING
    u = jax.random.uniform(key, (count, 12))
    index = jnp.arange(count)
    parked = index < 2 * PARKED
    side = jnp.where(index < PARKED, -1.0, 1.0)
    rows = jax.random.uniform(jax.random.fold_in(key, 1), (2,)) < jnp.where(
        street.country(), 0.0, jnp.where(street.kind == 1, 0.8, 0.62)
    )
    row = jnp.concatenate([jnp.repeat(rows, PARKED), jnp.ones(MOVING, bool)])
    start = 2.5 + 6.3 * (index % PARKED) + 5.0 * jnp.repeat(u[:3, 0], 7)[:count] + 0.8 * u[:, 1]
    start, _ = street.clear_of_crossing(start - 2.5, jnp.full(count, 5.0))
    start = start + 2.5
    # moving cars: lanes of our own direction and of the other one, never right before the camera
    own = u[:, 2] < 0.5
    lanes = jnp.maximum(street.lanes * 0.5, 1.0)
    lane = (jnp.floor(u[:, 3] * lanes) + 0.5) / lanes
    room = street.half - jnp.where(rows.any(), 1.9, 0.2)
    moving_lateral = jnp.where(own, street.side, -street.side) * jnp.clip(lane * room, 1.5, 12.0)
    # crossing traffic drives across our way
    cross = ~parked & (street.crossing < 60.0) & (u[:, 4] < 0.45)
    slot = index - 2 * PARKED
    ahead = 9.0 + 11.0 * slot + 9.0 * u[:, 5]
    along = jnp.where(
        parked, start, jnp.where(cross, street.crossing + street.crossing_width * (0.3 + 0.4 * u[:, 5]), ahead)
    )
    lateral = jnp.where(parked, side * (street.half - 1.05), jnp.where(cross, 34.0 * (u[:, 6] - 0.5), moving_lateral))
    away = jnp.where(parked, side * street.side > 0, own)
    turn = jnp.where(away, 0.0, jnp.pi) + 0.04 * (u[:, 7] - 0.5)
    turn = jnp.where(cross, jnp.pi * 0.5 * jnp.where(u[:, 7] < 0.5, 1.0, -1.0), turn)
    there = row & (u[:, 8] < jnp.where(parked, 0.72, 0.34 + 0.3 * street.density))
    # an aisle parked off the kerb blocks the camera
    there &= ~(parked & (jnp.abs(lateral - street.offset) < 1.9) & (along < 7.0))
    frame = street.frame(along, lateral, turn=turn)
    van = u[:, 9] < 0.14
    estate = u[:, 9] > 0.6
    long = jnp.where(van, 2.45, 1.85 + 0.4 * u[:, 10])
    wide = jnp.where(van, 0.95, 0.84 + 0.08 * u[:, 11])
    sill = 0.30
    waist = jnp.where(van, 1.05, 0.88 + 0.10 * u[:, 10])
    roof = jnp.where(van, 2.05 + 0.3 * u[:, 11], 1.40 + 0.25 * jnp.mod(u[:, 10] * 7.3, 1.0))
    paint = pick(jnp.mod(u[:, 11] * 9.7 + u[:, 0], 1.0), PAINTS) * (0.8 + 0.4 * u[:, 1:2])
    seed = jnp.floor(u[:, 9] * 60000.0)
    instance = 1.0 + index
    common = dict(label=LABEL["car"], instance=instance, color=paint, present=there, seed=seed)
    running = jnp.where(parked, 0.0, 1.0)
    body = frame.solids(
        0.0, 0.5 * (waist + sill), 0.0, hx=wide, hy=0.5 * (waist - sill), hz=long, taper_x=0.10, taper_z=0.04,
        material=Material.PAINT, detail=running, detail2=u[:, 6], **common,
    )  # fmt: skip
    reach = long * jnp.where(van, 0.86, jnp.where(estate, 0.70, 0.60))
    back = long * jnp.where(van, -0.10, jnp.where(estate, -0.22, -0.10))
    cabin = frame.solids(
        0.0, 0.5 * (waist + roof), back, hx=wide * 0.93, hy=0.5 * (roof - waist), hz=reach,
        taper_x=jnp.where(van, 0.1, 0.24),
        taper_z=jnp.where(van, 0.14, jnp.where(estate, 0.27, 0.42)), material=Material.CABIN,
        detail=jnp.where(van, 1.0, 0.0),
        detail2=u[:, 6], **common,
    )  # fmt: skip
    return {"frusta": [body, cabin], "ellipsoids": wheels(frame, wide, 0.62 * long, 0.31, 0.12, common)}


def wheels(frame: Frame, wide: Array, axle: Array, radius: float, thick: float, common: dict) -> list[Solids]:
    """Returns four wheels at the corners of a vehicle."""
    rubber = common | {"color": (0.018, 0.018, 0.019), "material": Material.WHEEL}
    return [
        frame.solids(x * (wide - 0.06), radius, z * axle, hx=thick, hy=radius, hz=radius, **rubber)
        for x in (-1.0, 1.0)
        for z in (-1.0, 1.0)
    ]


def large_vehicles(key: PRNGKeyArray, street: Street, look: Look) -> PARTS:
    """Returns trucks, buses and trams: trailer or coach, cab, four wheels; instances 20 to 24."""
    u = jax.random.uniform(key, (LARGE, 14))
    slot = jnp.arange(LARGE)
    # slots: oncoming truck or bus, truck ahead, bus ahead, parked truck, tram
    tram, parked = slot == 4, slot == 3
    bus = (slot == 2) | ((slot == 0) & (u[:, 0] < 0.5))
    truck = ~tram & ~bus
    chance = jnp.where(tram, 0.55 * street.rails, jnp.where(parked, 0.10, jnp.where(slot == 0, 0.16, 0.09)))
    chance = jnp.where(street.kind == 5, jnp.where(truck & ~parked, 0.4, chance), chance)
    there = (u[:, 1] < chance) & ~(parked & street.country())
    away = jnp.where(tram, u[:, 2] < 0.5, slot != 0)
    sign = jnp.where(away, street.side, -street.side)
    lateral = sign * jnp.where(parked, street.half - 1.2, jnp.where(tram, 1.65, jnp.clip(0.5 * street.half, 1.7, 6.0)))
    long = jnp.where(tram, 7.0 + 5.0 * u[:, 3], jnp.where(bus, 4.6 + 1.4 * u[:, 3], 2.8 + 2.6 * u[:, 3] ** 2))
    along = long + jnp.where(parked, 7.0, 9.0) + jnp.where(slot == 0, 12.0, 30.0) * u[:, 4] ** 1.5
    along = along + jnp.where(slot == 2, 12.0, 0.0)
    turn = jnp.where(away, 0.0, jnp.pi) + 0.03 * (u[:, 5] - 0.5)
    cross = (slot <= 2) & (street.crossing < 60.0) & (u[:, 12] < 0.4)
    along = jnp.where(cross, street.crossing + 0.5 * street.crossing_width, along)
    lateral = jnp.where(cross, 26.0 * (u[:, 13] - 0.5), lateral)
    turn = jnp.where(cross, jnp.pi * 0.5 * jnp.where(u[:, 5] < 0.5, 1.0, -1.0), turn)
    frame = street.frame(along, lateral, turn=turn)
    wide = jnp.where(tram, 1.22, 1.15 + 0.1 * u[:, 6])
    high = jnp.where(
        tram, 3.3, jnp.where(bus, 2.9 + jnp.where(u[:, 6] < 0.15, 1.2, 0.2 * u[:, 6]), 2.5 + 1.2 * u[:, 7])
    )
    low = jnp.where(truck, 0.85, 0.35)
    label = jnp.where(tram, LABEL["train"], jnp.where(bus, LABEL["bus"], LABEL["truck"]))
    paint = pick(u[:, 8], ((0.72, 0.72, 0.7), (0.55, 0.10, 0.07), (0.08, 0.16, 0.40), (0.62, 0.45, 0.06),
                           (0.10, 0.30, 0.14),
                           (0.5, 0.5, 0.5), (0.70, 0.68, 0.60), (0.30, 0.05, 0.08)))  # fmt: skip
    stripe = pick(u[:, 9], ((0.7, 0.7, 0.7), (0.05, 0.10, 0.3), (0.5, 0.05, 0.05), (0.6, 0.5, 0.1), (0.05, 0.25, 0.1)))
    common = dict(
        label=label, instance=20.0 + slot, color=paint, color2=stripe, present=there, seed=jnp.floor(u[:, 10] * 6e4)
    )
    coach = tram | bus
    cab_long = 0.95
    trunk_long = jnp.where(coach, long, long - cab_long)
    trailer = frame.solids(
        0.0, 0.5 * (low + high), jnp.where(coach, 0.0, -cab_long), hx=wide, hy=0.5 * (high - low), hz=trunk_long,
        material=jnp.where(coach, Material.COACH, Material.PAINT), detail=jnp.where(coach, tram * 1.0, 2.0),
        detail2=u[:, 11], **common,
    )  # fmt: skip
    cab_high = jnp.minimum(high, 2.5)
    cab = frame.solids(
        0.0, 0.5 * (0.45 + cab_high), long - cab_long + 0.02, hx=wide * 0.96, hy=0.5 * (cab_high - 0.45), hz=cab_long,
        taper_z=0.08, material=Material.COACH, detail=2.0, detail2=u[:, 11], **(common | {"present": there & truck}),
    )  # fmt: skip
    return {"boxes": [trailer], "frusta": [cab], "ellipsoids": wheels(frame, wide, 0.68 * long, 0.48, 0.15, common)}


def two_wheelers(key: PRNGKeyArray, street: Street, look: Look) -> PARTS:
    """Returns bicycles and motorcycles, ridden and parked; instances 25 to 31, their riders 32 to 38."""
    u = jax.random.uniform(key, (CYCLES, 14))
    slot = jnp.arange(CYCLES)
    motor = (slot == 1) | (slot == 4) | ((slot == 0) & (u[:, 0] < 0.2))
    ridden = slot < 4
    there = u[:, 1] < jnp.where(ridden, jnp.where(motor, 0.22, 0.20), 0.16) * (0.5 + 0.5 * street.density)
    there &= ~((street.kind == 5) & ~motor) & ~(street.country() & ~ridden)
    own = u[:, 2] < 0.55
    edge = jnp.where(motor, 0.5 * street.half, street.half - jnp.where(street.country(), 0.6, 1.4) - 0.6 * u[:, 3])
    lateral = jnp.where(own, street.side, -street.side) * jnp.maximum(edge, 1.3)
    parked_side = jnp.where(u[:, 3] < 0.5, -1.0, 1.0)
    walk = jnp.where(parked_side < 0, street.sidewalk_left, street.sidewalk_right)
    lateral = jnp.where(ridden, lateral, parked_side * (street.half + 0.4 + jnp.maximum(walk - 1.2, 0.0) * u[:, 4]))
    along = jnp.where(ridden, 6.0 + 18.0 * u[:, 5] ** 1.3, 4.5 + 14.0 * u[:, 5])
    turn = jnp.where(own, 0.0, jnp.pi) + jnp.where(ridden, 0.25 * (u[:, 6] - 0.5), 2.6 * (u[:, 6] - 0.5))
    cross = ridden & (u[:, 13] < 0.22)
    turn = jnp.where(cross, jnp.pi * 0.5 + 0.4 * (u[:, 6] - 0.5), turn)
    frame = street.frame(along, lateral, jnp.where(ridden, 0.0, 0.12), turn)
    label = jnp.where(motor, LABEL["motorcycle"], LABEL["bicycle"])
    paint = pick(
        u[:, 7], ((0.03, 0.03, 0.03), (0.30, 0.03, 0.03), (0.05, 0.10, 0.25), (0.4, 0.4, 0.4), (0.06, 0.2, 0.1))
    )
    common = dict(label=label, instance=25.0 + slot, present=there, color=paint)
    radius = jnp.where(motor, 0.31, 0.34)
    thick = jnp.where(motor, 0.08, 0.03)
    base = jnp.where(motor, 0.68, 0.52)
    tyre = common | {"color": (0.02, 0.02, 0.02), "material": Material.WHEEL}
    parts = [
        frame.solids(0.0, radius, z * base, hx=thick, hy=radius, hz=radius, detail=jnp.where(motor, 0.0, 1.0), **tyre)
        for z in (-1.0, 1.0)
    ]
    engine = frame.solids(
        0.0, jnp.where(motor, 0.58, 0.62), 0.0, hx=jnp.where(motor, 0.17, 0.03), hy=jnp.where(motor, 0.26, 0.14),
        hz=jnp.where(motor, 0.55, 0.33), **common,
    )  # fmt: skip
    seat = frame.solids(
        0.0, jnp.where(motor, 0.82, 0.95), -0.3, hx=jnp.where(motor, 0.14, 0.07), hy=0.05,
        hz=jnp.where(motor, 0.36, 0.13),
        **(common | {"color": (0.02, 0.02, 0.02)}),
    )  # fmt: skip
    bar = frame.solids(0.0, 1.02, 0.42, hx=0.3, hy=0.03, hz=0.03, **(common | {"color": (0.05, 0.05, 0.05)}))
    fork = frame.solids(0.0, 0.70, 0.46, hx=jnp.where(motor, 0.09, 0.025), hy=0.33, hz=0.05, **common)
    person = dict(label=LABEL["rider"], instance=32.0 + slot, present=there & ridden)
    shirt, legs = pick(u[:, 8], CLOTHES), pick(u[:, 9], TROUSERS)
    torso = frame.solids(0.0, 1.26, -0.10, hx=0.23, hy=0.36, hz=0.19, material=Material.CLOTH, color=shirt, **person)
    arms = frame.solids(0.0, 1.22, 0.2, hx=0.27, hy=0.08, hz=0.26, material=Material.CLOTH, color=shirt * 0.9, **person)
    head = frame.solids(
        0.0, 1.72, 0.02, hx=0.11, hy=0.14, hz=0.12, material=Material.HEAD, color=pick(u[:, 10], SKIN),
        color2=jnp.where((motor | (u[:, 11] < 0.5))[:, None], pick(u[:, 12], CLOTHES), jnp.full((1, 3), 0.03)),
        detail=jnp.where(motor, 1.0, 0.0), **person,
    )  # fmt: skip
    thighs = [
        frame.solids(
            x * 0.12, 0.78 + x * 0.08, 0.02, hx=0.085, hy=0.33, hz=0.16, material=Material.CLOTH, color=legs, **person
        )
        for x in (-1.0, 1.0)
    ]
    return {"boxes": [engine, seat, bar, fork], "ellipsoids": [*parts, torso, arms, head, *thighs]}


def persons(key: PRNGKeyArray, street: Street, look: Look) -> PARTS:
    """Returns people on the sidewalks and some on the road: head, torso, arms, two legs; instances 40 to 49."""
    u = jax.random.uniform(key, (PERSONS, 14))
    index = jnp.arange(PERSONS)
    side = jnp.where(u[:, 0] < 0.5, -1.0, 1.0)
    walk = jnp.where(side < 0, street.sidewalk_left, street.sidewalk_right)
    chance = jnp.where(street.kind == 3, 0.75, jnp.where(street.city(), 0.64, 0.24)) * (0.4 + 0.6 * street.density)
    there = u[:, 1] < jnp.where(street.country(), 0.03, chance)
    along = 4.5 + 24.0 * u[:, 2] ** 1.5
    on_road = (index < 3) & (u[:, 3] < 0.25)
    along = jnp.where((index < 3) & (street.crossing < 60.0) & (u[:, 3] < 0.6), street.crossing - 1.5, along)
    lateral = jnp.where(
        on_road,
        (u[:, 4] - 0.5) * 2.0 * street.half,
        side * (street.half + 0.5 + jnp.maximum(walk - 0.8, 0.2) * u[:, 4]),
    )
    # couples walk side by side
    couple = (index % 2 == 1) & (u[:, 5] < 0.35)
    along = jnp.where(couple, jnp.roll(along, 1) + 0.25, along)
    lateral = jnp.where(couple, jnp.roll(lateral, 1) + 0.6, lateral)
    across = u[:, 6] < 0.25
    turn = jnp.where(u[:, 6] < 0.6, 0.0, jnp.pi) + jnp.where(across, jnp.pi / 2, 0.6 * (u[:, 7] - 0.5))
    frame = street.frame(along, lateral, jnp.where(jnp.abs(lateral) < street.half, 0.0, 0.12), turn)
    size = jnp.where(u[:, 8] < 0.1, 0.68, 0.92 + 0.14 * u[:, 8])
    common = dict(label=LABEL["person"], instance=40.0 + index, present=there)
    shirt, trousers = pick(u[:, 9], CLOTHES), pick(u[:, 10], TROUSERS)
    coat = u[:, 11] < 0.35
    stride = 0.10 + 0.16 * u[:, 12]
    drop = jnp.where(coat, 0.1, 0.0)
    torso = frame.solids(
        0.0, (1.16 - drop) * size, 0.0, hx=0.215 * size, hy=(0.37 + drop) * size, hz=0.15 * size,
        material=Material.CLOTH,
        color=shirt, **common,
    )  # fmt: skip
    arms = [
        frame.solids(x * 0.25 * size, 1.13 * size, x * 0.5 * stride, hx=0.06 * size, hy=0.31 * size, hz=0.075 * size,
                     material=Material.CLOTH, color=shirt * 0.85, **common)
        for x in (-1.0, 1.0)
    ]  # fmt: skip
    head = frame.solids(
        0.0, 1.62 * size, 0.02, hx=0.095 * size, hy=0.13 * size, hz=0.11 * size, material=Material.HEAD,
        color=pick(u[:, 13], SKIN),
        color2=pick(jnp.mod(u[:, 13] * 7.7, 1.0), HAIR),
        **common,
    )  # fmt: skip
    legs = [
        frame.solids(x * 0.095 * size, 0.44 * size, x * stride * 0.8, hx=0.085 * size, hy=0.47 * size, hz=0.105 * size,
                     material=Material.CLOTH, color=trousers, **common)
        for x in (-1.0, 1.0)
    ]  # fmt: skip
    return {"ellipsoids": [torso, *arms, head, *legs]}
