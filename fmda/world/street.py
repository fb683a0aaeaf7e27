"""The street: its kind, widths, bend and crossing, and where things stand along it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from fmda.world.looks import Look
from fmda.world.names import STREETS
from fmda.world.solids import Frame

_SHARES = (0.44, 0.17, 0.16, 0.08, 0.10, 0.05)


class Street(NamedTuple):
    """One street; float32 scalars, metres, but `kind`, int32, an index into `STREETS`."""

    kind: Array
    half: Array  # half width of the road
    sidewalk_left: Array
    sidewalk_right: Array
    setback_left: Array  # from the outer edge of the sidewalk to the houses
    setback_right: Array
    bend: Array  # curvature, 1/m
    offset: Array  # lateral position of the camera on the road
    side: Array  # +1: traffic keeps to the right, -1: to the left
    crossing: Array  # where a cross road begins ahead, far away if there is none
    crossing_width: Array
    rails: Array  # 1 where tram rails lie in the road
    lanes: Array  # lanes in all
    paving: Array  # seed of colours and textures of the ground
    green: Array  # 1 where the ground beside the sidewalk is grass, 0 where it is paved
    zebra: Array  # 1 where the crossing has zebra stripes
    density: Array  # of traffic and people, about 1

    def city(self) -> Array:
        """True in streets with closed rows of houses."""
        return (self.kind == 0) | (self.kind == 2) | (self.kind == 3)

    def country(self) -> Array:
        """True on country roads and highways."""
        return self.kind >= 4

    def frame(self, along: Array, lateral: Array, up: Array | float = 0.0, turn: Array | float = 0.0) -> Frame:
        """Returns places by distance along the road and lateral position from its middle; shapes [N]."""
        heading = jnp.arctan(self.bend * along) + turn
        return Frame(
            lateral - self.offset + 0.5 * self.bend * along * along,
            jnp.broadcast_to(jnp.asarray(up, jnp.float32), along.shape),
            along,
            jnp.cos(heading),
            jnp.sin(heading),
        )

    def clear_of_crossing(self, start: Array, length: Array) -> tuple[Array, Array]:
        """Returns start and length of stretches [N] moved or cut so that none lies in the cross road."""
        gap, end = self.crossing, self.crossing + self.crossing_width
        after = start >= gap - 2.0
        start = jnp.where(after, start + self.crossing_width + 2.0, start)
        length = jnp.where(~after & (start + length > gap - 1.0), gap - 1.0 - start, length)
        return jnp.where((start > gap) & (start < end), end, start), length


class Camera(NamedTuple):
    """Pose and lens; float32 scalars: metres, radians, focal length over the root of the picture's area."""

    height: Array
    yaw: Array
    pitch: Array
    roll: Array
    focal: Array
    bonnet: Array  # share of the picture height that the own bonnet covers


def sample_street(key: PRNGKeyArray, look: Look) -> tuple[Street, Camera]:
    """Returns a street and a camera on it."""
    key_kind, key_u, key_n = jax.random.split(key, 3)
    u = jax.random.uniform(key_u, (24,))
    n = jnp.clip(jax.random.normal(key_n, (6,)), -2.5, 2.5)
    kind = jax.random.choice(key_kind, len(STREETS), p=jnp.asarray(_SHARES))
    table = jnp.asarray(
        # half width low/high, sidewalk low/high, setback low/high, lanes, crossing chance, rails, green
        [
            (3.6, 7.0, 2.0, 4.5, 0.0, 1.5, 2, 0.25, 0.22, 0.15),
            (3.0, 4.6, 1.5, 2.8, 2.5, 8.0, 2, 0.25, 0.0, 0.9),
            (4.2, 8.0, 2.2, 4.5, 0.0, 3.0, 3, 1.0, 0.22, 0.25),
            (4.2, 7.5, 7.0, 16.0, 0.0, 4.0, 2, 0.35, 0.3, 0.1),
            (2.8, 4.2, 0.0, 0.0, 6.0, 16.0, 2, 0.1, 0.0, 1.0),
            (7.0, 11.0, 0.0, 0.0, 12.0, 30.0, 4, 0.0, 0.0, 1.0),
        ],
        jnp.float32,
    )
    row = table[kind]
    half = (row[0] + (row[1] - row[0]) * u[0]) * look.narrow
    side = jnp.where(u[1] < 0.72, 1.0, -1.0)
    lane = jnp.where(u[2] < 0.8, jnp.where(kind == 5, 0.42, 0.45), 0.1)
    lateral = side * half * lane + 0.4 * n[0]
    has_crossing = u[3] < row[7]
    turn = jnp.where((kind == 2) & (u[4] < 0.45), 0.22 * n[1], 0.05 * n[1])
    street = Street(
        kind=kind,
        half=half,
        sidewalk_left=row[2] + (row[3] - row[2]) * u[5],
        sidewalk_right=row[2] + (row[3] - row[2]) * u[6],
        setback_left=row[4] + (row[5] - row[4]) * u[7],
        setback_right=row[4] + (row[5] - row[4]) * u[8],
        bend=jnp.where(u[9] < 0.5, 0.0, 1.0) * 0.0022 * n[2],
        offset=lateral,
        side=side,
        crossing=jnp.where(has_crossing, 7.0 + 30.0 * u[10], 1e4),
        crossing_width=6.0 + 9.0 * u[11],
        rails=(u[12] < row[8]).astype(jnp.float32),
        lanes=jnp.where((half > 5.6) & (row[6] < 3), 4.0, jnp.where(row[6] == 3, 2.0, row[6])),
        paving=jnp.floor(u[13] * 65536.0),
        green=(u[14] < row[9]).astype(jnp.float32),
        zebra=(u[15] < 0.5).astype(jnp.float32),
        density=0.4 + 1.2 * u[16],
    )
    camera = Camera(
        height=1.2 + 0.5 * u[17],
        yaw=turn + jnp.arctan(0.0),
        pitch=0.067 + 0.028 * n[3],
        roll=0.008 * n[4],
        focal=0.72 + 0.5 * u[18],
        bonnet=jnp.where(u[19] < 0.15, 0.03 + 0.05 * u[20], -1.0),
    )
    return street, camera
