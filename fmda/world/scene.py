"""The scene: one street with everything on it, from one key."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from fmda.world import roadside, traffic
from fmda.world.looks import Look, Setting, sample_look
from fmda.world.solids import Groups, join_groups
from fmda.world.street import Camera, Street, sample_street

INSTANCES = 50
"""Instance ids of a scene run from 1 to INSTANCES - 1."""


class Scene(NamedTuple):
    """Everything that a picture is made from; fixed shapes."""

    groups: Groups
    street: Street
    camera: Camera
    look: Look
    setting: Setting
    sun_azimuth: Array
    seed: Array


def sample_scene(key: PRNGKeyArray, domain: Int[Array, ""]) -> Scene:
    """Returns a random scene of the domain (index into `DOMAINS`)."""
    keys = jax.random.split(key, 11)
    look, setting = sample_look(keys[0], domain)
    street, camera = sample_street(keys[1], look)
    builders = (
        roadside.houses,
        roadside.backdrop,
        roadside.trees,
        roadside.poles,
        roadside.furniture,
        traffic.cars,
        traffic.large_vehicles,
        traffic.two_wheelers,
        traffic.persons,
    )
    groups = join_groups([build(k, street, look) for build, k in zip(builders, keys[2:], strict=True)])
    u = jax.random.uniform(jax.random.fold_in(key, 99), (2,))
    return Scene(groups, street, camera, look, setting, 2.0 * jnp.pi * u[0], jnp.floor(u[1] * 30000.0))
