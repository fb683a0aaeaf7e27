"""Every number of every kind's configuration declares its range."""

import dataclasses
import importlib
import typing
from typing import Annotated

import pytest

from fmda.config import Bounds, from_dict
from fmda.errors import UserError
from fmda.methods.kinds import KINDS

CONFIGS = {kind: importlib.import_module(module).Config for kind, (module, _) in KINDS.items()}
# sizes where -1 takes the rest, steps that are compared with the length of the run
FREE_INTS = {"mesh", "snapshots", "export"}
# cosines, colours and guidance have no range, or may be negative
FREE_FLOATS = {
    "guidance", "clip_score", "near_duplicate", "affinity_floor", "floor", "background", "check_thresholds",
    "image_mean", "image_std",
}  # fmt: skip
DATA = {"data": {"name": "folder"}}


def numbers(hint, inside=()):
    """Yields (type, bounds or None) of each number in a type."""
    if typing.get_origin(hint) is Annotated:
        base, *marks = typing.get_args(hint)
        yield from numbers(base, tuple(marks))
    elif hint in (int, float):
        yield hint, next((mark for mark in inside if isinstance(mark, Bounds)), None)
    else:
        for part in typing.get_args(hint):
            if part is not Ellipsis and not isinstance(part, str):
                yield from numbers(part)


def dataclasses_in(hint):
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
        for inner in typing.get_type_hints(hint, include_extras=True).values():
            yield from dataclasses_in(inner)
    for part in typing.get_args(hint):
        yield from dataclasses_in(part)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_number_declares_its_range(kind):
    bare = {
        f"{cls.__name__}.{name}"
        for cls in dataclasses_in(CONFIGS[kind])
        for name, hint in typing.get_type_hints(cls, include_extras=True).items()
        for number, bounds in numbers(hint)
        if bounds is None and name not in (FREE_INTS if number is int else FREE_FLOATS)
    }
    assert not bare


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("floss", {"n": 0}, "n: expected a whole number >= 1, got 0"),
        ("floss", {"data": {"limit": 0}}, "data.limit: expected a whole number >= 1, got 0"),
        ("floss", {"guards": {"min_share": -1}}, "guards.min_share: expected a number >= 0, got -1"),
        ("floss", DATA | {"host": {"name": "maskclip", "crop": -1}}, "host: crop: expected a whole number >= 0"),
        ("personalise", {"image": "x", "noise": {"earliest": 1.0}}, "noise.earliest: expected a number >= 0 and < 1"),
        ("personalise", {"image": "x", "noise": {"offset": -0.1}}, "noise.offset: expected a number >= 0, got -0.1"),
        ("pretrain-latent-diffusion", {"data": [], "vae": "x", "check_images": 15}, "check_images: expected a whole"),
        ("pretrain-latent-diffusion", {"data": [], "vae": "x", "min_snr": 0}, "min_snr: expected a number > 0, got 0"),
        ("world", {"domains": {"photo": 0}}, "domains.photo: expected a whole number >= 1, got 0"),
        ("world", {"height": 8}, "height: expected a whole number >= 32, got 8"),
        ("pretrain-clip", {"data": [], "steps": -5}, "steps: expected a whole number >= 1, got -5"),
        ("pretrain-clip", {"data": [], "optim": {"learning_rate": float("nan")}}, "optim.learning_rate: expected a"),
        ("pretrain-clip", {"data": [], "ema": float("inf")}, "ema: expected a number >= 0 and < 1, got inf"),
        ("pretrain-dino", {"data": [], "views": {"global_side": [0, 1]}}, r"views.global_side\[0\]: expected a"),
    ],
)  # fmt: skip
def test_a_number_outside_its_range_is_one_line(kind, values, message):
    with pytest.raises(UserError, match=f"^config: {message}|^{message}"):
        from_dict(CONFIGS[kind], values)
