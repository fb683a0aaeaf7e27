"""Looks: the appearance of a picture as a struct of sampled numbers, one table row of ranges per domain."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from fmda.world.names import DOMAINS, STYLES, TIMES, WEATHERS


class Look(NamedTuple):
    """Appearance of one picture; float32 scalars."""

    sun: Array  # strength of the sun
    elevation: Array  # of the sun, degrees
    warmth: Array  # 0 white sun, 1 orange sun
    ambient: Array  # strength of the sky light
    blue: Array  # 0 grey sky light, 1 blue sky light
    fog: Array  # extinction per metre
    clouds: Array  # share of the sky under cloud
    sky: Array  # brightness of the sky
    texture: Array  # contrast of surface textures
    wet: Array  # mirroring of the road
    snow: Array  # cover of snow on the ground
    rainfall: Array  # streaks of rain
    snowfall: Array  # flakes in the air
    lamps: Array  # strength of head lights, street lamps, signals
    lit: Array  # share of windows with light inside
    bare: Array  # probability that a tree has lost its leaves
    autumn: Array  # shift of leaves towards yellow
    saturation: Array
    contrast: Array
    exposure: Array
    warm: Array  # white balance: red against blue
    green: Array  # white balance: green against the rest
    noise: Array  # of the sensor
    blur: Array  # of the lens, pixels at a height of 128
    vignette: Array
    bloom: Array  # glow around lights
    flat: Array  # 0 light by the sun and the sky, 1 even light
    tower: Array  # height of the houses against the usual
    narrow: Array  # width of the road against the usual


_DAY: dict[str, tuple[float, float]] = dict(
    sun=(0.6, 1.3), elevation=(22.0, 60.0), warmth=(0.1, 0.4), ambient=(0.42, 0.7), blue=(0.2, 0.7),
    fog=(0.0002, 0.0016),
    clouds=(0.0, 0.9), sky=(0.9, 1.6), texture=(0.8, 1.1), wet=(0.0, 0.0), snow=(0.0, 0.0), rainfall=(0.0, 0.0),
    snowfall=(0.0, 0.0), lamps=(0.0, 0.0), lit=(0.0, 0.02), bare=(0.0, 0.25), autumn=(0.0, 0.35),
    saturation=(0.75, 1.05),
    contrast=(0.9, 1.2), exposure=(0.85, 1.3), warm=(0.95, 1.07), green=(0.97, 1.05), noise=(0.006, 0.02),
    blur=(0.3, 0.6),
    vignette=(0.0, 0.35), bloom=(0.05, 0.15), flat=(0.0, 0.0), tower=(0.9, 1.1), narrow=(0.95, 1.05),
)  # fmt: skip

_CHANGES: dict[str, dict[str, tuple[float, float]]] = {
    "game": dict(
        sun=(0.8, 1.1), elevation=(35.0, 60.0), warmth=(0.2, 0.5), ambient=(0.5, 0.65), blue=(0.5, 0.9),
        fog=(0.0, 0.0015),
        clouds=(0.1, 0.5), sky=(0.8, 1.0), texture=(0.45, 0.65), bare=(0.0, 0.05), autumn=(0.0, 0.15),
        saturation=(1.25, 1.5),
        contrast=(1.0, 1.15), exposure=(0.95, 1.1), warm=(1.0, 1.05), green=(0.98, 1.02), noise=(0.0, 0.0),
        blur=(0.05, 0.2),
        vignette=(0.0, 0.1), bloom=(0.1, 0.2), tower=(1.0, 1.25), narrow=(1.0, 1.15),
    ),
    "photo": dict(saturation=(0.6, 1.05), sun=(0.0, 1.5), exposure=(0.7, 1.4), contrast=(0.85, 1.3), sky=(1.2, 2.8),
                  elevation=(14.0, 58.0), bare=(0.0, 0.4), green=(0.97, 1.08), clouds=(0.0, 1.0), blue=(0.1, 0.9)),
    "dusk": dict(
        sun=(0.05, 0.5), elevation=(5.0, 13.0), warmth=(0.7, 1.0), ambient=(0.16, 0.3), blue=(0.5, 1.0),
        clouds=(0.3, 0.9),
        sky=(0.4, 0.8), lamps=(0.15, 0.5), lit=(0.05, 0.25), saturation=(0.6, 0.95), exposure=(0.8, 1.6),
        warm=(0.95, 1.12),
        noise=(0.01, 0.03), blur=(0.35, 0.7), vignette=(0.2, 0.5), bloom=(0.2, 0.4), bare=(0.0, 0.45),
        tower=(0.9, 1.15),
    ),
    "night": dict(
        sun=(0.0, 0.015), elevation=(30.0, 60.0), warmth=(0.0, 0.0), ambient=(0.025, 0.06), blue=(0.3, 0.9),
        clouds=(0.2, 0.8),
        sky=(0.03, 0.08), lamps=(0.8, 1.3), lit=(0.15, 0.45), saturation=(0.7, 1.05), exposure=(1.1, 2.3),
        warm=(0.95, 1.2),
        noise=(0.015, 0.045), blur=(0.4, 0.8), vignette=(0.1, 0.5), bloom=(0.5, 0.9), wet=(0.0, 0.35), bare=(0.0, 0.5),
    ),
    "fog": dict(
        sun=(0.0, 0.15), ambient=(0.6, 0.85), blue=(0.0, 0.3), fog=(0.014, 0.05), clouds=(1.0, 1.0), sky=(0.8, 1.1),
        saturation=(0.5, 0.8), contrast=(0.8, 1.0), lamps=(0.0, 0.2), lit=(0.0, 0.1), bare=(0.1, 0.7),
        exposure=(0.8, 1.1),
    ),
    "rain": dict(
        sun=(0.0, 0.08), ambient=(0.4, 0.65), blue=(0.1, 0.4), fog=(0.004, 0.012), clouds=(0.95, 1.0), sky=(0.6, 1.0),
        wet=(0.5, 0.95), rainfall=(0.3, 1.0), lamps=(0.05, 0.35), lit=(0.02, 0.2), saturation=(0.55, 0.85),
        blur=(0.4, 0.9),
        contrast=(0.85, 1.1), bare=(0.0, 0.4), exposure=(0.75, 1.15), bloom=(0.15, 0.35),
    ),
    "snow": dict(
        sun=(0.0, 0.4), elevation=(10.0, 30.0), ambient=(0.55, 0.8), blue=(0.2, 0.6), fog=(0.003, 0.014),
        clouds=(0.7, 1.0),
        sky=(0.8, 1.1), snow=(0.45, 1.0), snowfall=(0.0, 1.0), bare=(0.5, 0.95), autumn=(0.0, 0.3),
        saturation=(0.5, 0.8),
        exposure=(0.75, 1.05), lit=(0.0, 0.15), wet=(0.0, 0.2),
    ),
    "styles": dict(
        sun=(0.0, 1.5), elevation=(10.0, 65.0), warmth=(0.0, 1.0), ambient=(0.3, 0.8), blue=(0.0, 1.0),
        fog=(0.0, 0.008),
        clouds=(0.0, 1.0), sky=(0.5, 1.8), texture=(0.1, 1.4), saturation=(0.4, 1.7), contrast=(0.7, 1.4),
        exposure=(0.7, 1.4),
        warm=(0.8, 1.2), green=(0.9, 1.1), noise=(0.0, 0.03), blur=(0.1, 0.7), bare=(0.0, 0.5), autumn=(0.0, 1.0),
        lit=(0.0, 0.1), tower=(0.7, 1.4), narrow=(0.85, 1.2), flat=(0.0, 0.3),
    ),
}  # fmt: skip

_LOW, _HIGH = (
    [[(_DAY | _CHANGES[domain])[field][end] for field in Look._fields] for domain in DOMAINS] for end in (0, 1)
)
_FIRST_STYLE = STYLES.index("painting")


class Setting(NamedTuple):
    """Names of a look as indices into `STYLES`, `WEATHERS` and `TIMES`; int32 scalars."""

    style: Array
    weather: Array
    time: Array


def sample_look(key: PRNGKeyArray, domain: Int[Array, ""]) -> tuple[Look, Setting]:
    """Returns the appearance of one picture of the domain (index into `DOMAINS`) and what it is called."""
    u = jax.random.uniform(key, (len(Look._fields) + 3,))
    low, high = jnp.asarray(_LOW, jnp.float32)[domain], jnp.asarray(_HIGH, jnp.float32)[domain]
    look = Look(*(low + (high - low) * u[: len(Look._fields)]))
    name = DOMAINS[:]
    pick, still, gate = u[-3], u[-2], u[-1]

    styled = domain == name.index("styles")
    style = jnp.where(
        styled,
        jnp.minimum(_FIRST_STYLE + (pick * (len(STYLES) - _FIRST_STYLE)).astype(jnp.int32), len(STYLES) - 1),
        jnp.where(domain == name.index("game"), STYLES.index("video game"), STYLES.index("photo")),
    )
    # under a closed sky the sun casts no shadow
    overcast = look.clouds > 0.72
    look = look._replace(
        sun=look.sun * jnp.where(overcast, 0.12, 1.0),
        ambient=look.ambient * jnp.where(overcast & (domain < 2), 1.35, 1.0),
        # flakes fall in two snow pictures of three
        snowfall=look.snowfall * (gate > 0.33),
    )
    names = {w: k for k, w in enumerate(WEATHERS)}
    weather = jnp.where(overcast, names["overcast"], jnp.where(look.clouds > 0.35, names["cloudy"], names["clear"]))
    for special in ("fog", "rain", "snow"):
        weather = jnp.where(domain == name.index(special), names[special], weather)
    time = jnp.where(domain == name.index("dusk"), TIMES.index("dusk"), TIMES.index("day"))
    time = jnp.where(domain == name.index("night"), TIMES.index("night"), time)
    # some styled pictures are quiet: half of them keep the usual palette
    half = jnp.where(styled & (still < 0.5), 0.0, 1.0)
    look = look._replace(
        warm=1.0 + (look.warm - 1.0) * half, green=1.0 + (look.green - 1.0) * half, flat=look.flat * half
    )
    return look, Setting(style.astype(jnp.int32), weather.astype(jnp.int32), time.astype(jnp.int32))


def sun_direction(look: Look, azimuth: Array) -> tuple[Array, Array, Array]:
    """Returns the unit vector (x, y, z) towards the sun; azimuth in radians from the line of sight."""
    height = jnp.deg2rad(look.elevation)
    return jnp.cos(height) * jnp.sin(azimuth), jnp.sin(height), jnp.cos(height) * jnp.cos(azimuth)
