"""Solids: the primitives of a scene as scalar arrays, one per field, and the frames they are placed in."""

from enum import IntEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmda.world.names import CLASSES, VOID

LABEL = {name: index for index, name in enumerate(CLASSES)} | {"void": VOID}


class Material(IntEnum):
    """How the surface of a solid is painted; see `materials.paint`."""

    PLAIN = 0
    FACADE = 1
    ROOF = 2
    LEAVES = 3
    PAINT = 4
    CABIN = 5
    COACH = 6
    WHEEL = 7
    BRICK = 8
    BARS = 9
    SIGN = 10
    SIGNAL = 11
    HEAD = 12
    LAMP = 13
    CLOTH = 14
    BARK = 15


class Solids(NamedTuple):
    """Fields of N primitives, float32 [N] each. Lengths in metres, x to the right, y up, z ahead of the camera.

    (x, y, z) is the centre, (hx, hy, hz) the half sizes, (cos, sin) of the heading: the local z axis points to
    (sin, cos) in (x, z). `taper_x` and `taper_z` narrow a box towards its top (1: to a ridge). `ragged` roughens
    the outline of an ellipsoid, `holes` is the share of it that lets the sky through. A solid with `hx` <= 0 is absent.
    """

    x: Array
    y: Array
    z: Array
    hx: Array
    hy: Array
    hz: Array
    cos: Array
    sin: Array
    taper_x: Array
    taper_z: Array
    ragged: Array
    holes: Array
    label: Array
    instance: Array
    material: Array
    red: Array
    green: Array
    blue: Array
    red2: Array
    green2: Array
    blue2: Array
    detail: Array
    detail2: Array
    seed: Array

    @property
    def number(self) -> int:
        """Number of primitives."""
        return int(self.x.shape[0])


_DEFAULTS = {"cos": 1.0, "label": float(VOID), "red": 0.5, "green": 0.5, "blue": 0.5}


def solids(count: int, **fields: Any) -> Solids:
    """Returns `count` primitives; fields that are not given are zero, scalars are repeated.

    `color` and `color2` take [count, 3] and fill three fields each; `present` [count] removes primitives.
    """
    for key, names in (("color", ("red", "green", "blue")), ("color2", ("red2", "green2", "blue2"))):
        if key in fields:
            value = jnp.broadcast_to(jnp.asarray(fields.pop(key), jnp.float32), (count, 3))
            fields |= {name: value[:, k] for k, name in enumerate(names)}
    present = fields.pop("present", None)
    filled = {
        name: jnp.broadcast_to(jnp.asarray(fields.get(name, _DEFAULTS.get(name, 0.0)), jnp.float32), (count,))
        for name in Solids._fields
    }
    unknown = set(fields) - set(Solids._fields)
    if unknown:
        raise TypeError(f"unknown fields of Solids: {sorted(unknown)}")
    if present is not None:
        filled["hx"] = jnp.where(jnp.asarray(present), filled["hx"], 0.0)
    return Solids(**filled)


def join(groups: list[Solids]) -> Solids:
    """Returns all primitives of the groups in one, in order."""
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *groups)


class Frame(NamedTuple):
    """N places on the ground with a heading: x, y, z in metres, cos and sin of the heading; float32 [N] each."""

    x: Array
    y: Array
    z: Array
    cos: Array
    sin: Array

    @property
    def number(self) -> int:
        """Number of places."""
        return int(self.x.shape[0])

    def solids(self, right: Array | float, up: Array | float, ahead: Array | float, **fields: Any) -> Solids:
        """Returns one primitive per place, centred at local (right, up, ahead), facing as the place does."""
        return solids(
            self.number,
            x=self.x + self.cos * right + self.sin * ahead,
            y=self.y + up,
            z=self.z - self.sin * right + self.cos * ahead,
            cos=self.cos,
            sin=self.sin,
            **fields,
        )


class Groups(NamedTuple):
    """The primitives of a scene by shape: each kind has its own intersection test."""

    boxes: Solids
    frusta: Solids
    ellipsoids: Solids
    cylinders: Solids


def join_groups(groups: list[dict[str, list[Solids]]]) -> Groups:
    """Returns the lists of several builders joined by shape; a shape nobody uses gets one absent primitive."""
    found = {name: [part for group in groups for part in group.get(name, [])] for name in Groups._fields}
    return Groups(**{name: join(parts) if parts else solids(1) for name, parts in found.items()})


def pick(u: Float[Array, " n"], colors: tuple[tuple[float, float, float], ...]) -> Float[Array, "n 3"]:
    """Returns one colour per uniform number, from the table."""
    table = jnp.asarray(colors, jnp.float32)
    index = jnp.clip((u * len(colors)).astype(jnp.int32), 0, len(colors) - 1)
    return table[index]
