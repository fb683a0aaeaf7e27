"""Multi-scale deformable attention of one pixel decoder layer: one packed gather per sample against four.

The forms see the same random values, places and weights and are timed in turns in one process, forward and with
gradients; results are compared with those of four gathers.

    python benchmarks/deformable_attention.py --side 512 --out benchmarks/results/deformable-attention.json

- `four`: one gather per corner of a sample, all maps at once: the plain form, and the one that ratios refer to.
- `packed`: one gather per sample from cells that hold four neighbours, all maps at once, gradients by jax.
- `packed_vjp`: the same with gradients that gather again instead of keeping the samples.
- `packed_map`: the same, one map (an image's head) after another.
- `library`: what `fmda.nn.deformable` takes on this device.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sides.record import record, write_record
from sides.timing import alternate

from fmda.nn import deformable
from fmda.nn.deformable import bilinear_corners, deformable_attention, gather_sum, packed
from fmda.perf import compiled_memory

HEADS, WIDTH, POINTS = 8, 32, 4
STRIDES = (32, 16, 8)
Form = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def levels(sample: Callable[..., jax.Array], sizes: list[tuple[int, int]]) -> Form:
    """Returns the attention whose sum over one level is `sample(maps, places, factors)`."""

    def form(value: jax.Array, locations: jax.Array, weights: jax.Array) -> jax.Array:
        b, _, heads, d = value.shape
        table, places, factors = (
            jnp.moveaxis(x, 2, 1).reshape(b * heads, -1, *x.shape[3:]) for x in (value, locations, weights)
        )
        total, start = jnp.zeros(()), 0
        for level, (h, w) in enumerate(sizes):
            maps = table[:, start : start + h * w].reshape(-1, h, w, d)
            total, start = total + sample(maps, places[:, :, level], factors[:, :, level]), start + h * w
        return jnp.moveaxis(total.reshape(b, heads, -1, d), 1, 2).astype(value.dtype)

    return form


def four(maps: jax.Array, places: jax.Array, factors: jax.Array) -> jax.Array:
    """Four gathers: each corner of a sample by itself."""
    n, h, w, d = maps.shape
    table, total = maps.reshape(n, h * w, d), jnp.zeros(())
    x, y = places[..., 0] * w - 0.5, places[..., 1] * h - 0.5
    for dy in (0, 1):
        for dx in (0, 1):
            row, column = jnp.floor(y) + dy, jnp.floor(x) + dx
            share = (1 - abs(y - row)) * (1 - abs(x - column)) * factors
            share = jnp.where((row >= 0) & (row < h) & (column >= 0) & (column < w), share, 0)
            index = (jnp.clip(row, 0, h - 1) * w + jnp.clip(column, 0, w - 1)).astype(jnp.int32)
            corner = jax.vmap(lambda rows, i: rows[i])(table, index)
            total = total + (corner * share[..., None]).sum(2)
    return total


def one(total: Callable[..., jax.Array], maps: jax.Array, places: jax.Array, factors: jax.Array) -> jax.Array:
    """One gather of a packed cell per sample; `total(cells, index, factors)` sums over the samples."""
    index, corners = bilinear_corners(places, maps.shape[1:3])
    return total(packed(maps), index, corners * factors[..., None])


def at_once(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """All maps at once, as the library does it on a GPU."""
    return jax.vmap(function)(*arrays)


def one_by_one(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """One map after another, as the library does it on a CPU."""
    return jax.lax.map(lambda given: function(*given), arrays)


def compiled(function: Callable[..., Any], each: Callable[..., Any], arrays: tuple[jax.Array, ...]) -> Any:
    """Returns the compiled function, the library's own choice between the two above replaced."""
    kept, deformable._each = deformable._each, each
    try:
        return jax.jit(function).lower(*arrays).compile()
    finally:
        deformable._each = kept


def with_gradients(form: Form) -> Callable[..., Any]:
    """Returns (value, locations, weights) -> their gradients of a sum of squares."""
    return jax.grad(lambda *given: jnp.square(form(*given).astype(jnp.float32)).sum(), (0, 1, 2))


def main() -> None:
    """Runs the benchmark and prints its record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cpu = jax.default_backend() == "cpu"
    parser.add_argument("--batch", type=int, default=1 if cpu else 8)
    parser.add_argument("--side", type=int, default=512, help="of the square images, pixels")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the values")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out")
    options = parser.parse_args()
    sizes = [(options.side // stride,) * 2 for stride in STRIDES]
    places, rng = sum(h * w for h, w in sizes), np.random.default_rng(0)
    shape = (options.batch, places, HEADS, len(STRIDES), POINTS)
    around = deformable.centres(sizes).reshape(1, places, 1, 1, 1, 2)
    arrays = (
        jnp.asarray(rng.normal(size=(options.batch, places, HEADS, WIDTH)), options.dtype),
        jnp.asarray(around + rng.normal(scale=0.05, size=(*shape, 2)), jnp.float32),
        jnp.asarray(rng.dirichlet(np.ones(POINTS * len(STRIDES)), shape[:3]).reshape(shape), jnp.float32),
    )
    packed_form = levels(partial(one, gather_sum), sizes)
    forms: dict[str, tuple[Form, Callable[..., Any]]] = {
        "four": (levels(four, sizes), at_once),
        "packed": (levels(partial(one, jax.vmap(deformable._sum)), sizes), at_once),
        "packed_vjp": (packed_form, at_once),
        "packed_map": (packed_form, one_by_one),
        "library": (lambda *given: deformable_attention(given[0], sizes, *given[1:]), deformable._each),
    }
    result: dict[str, Any] = {name: {} for name in forms}
    for what, wrap in (("forward", lambda form: form), ("with_gradients", with_gradients)):
        programs = {name: compiled(wrap(form), each, arrays) for name, (form, each) in forms.items()}
        right = jax.tree.leaves(programs["four"](*arrays))
        for name, program in programs.items():
            pairs = zip(jax.tree.leaves(program(*arrays)), right, strict=True)
            result[name][what] = {"relative_difference": max(relative(x, y) for x, y in pairs)}
        times = alternate(
            {name: partial(program, *arrays) for name, program in programs.items()}, repeats=options.repeats
        )
        for name, timing in times.items():
            result[name][what] |= timing.to_json() | {
                "speedup": times["four"].median / timing.median,
                "temporary_bytes": compiled_memory(programs[name]).get("temporaries"),
            }
    values = {name: value for name, value in vars(options).items() if name != "out"}
    values |= {"heads": HEADS, "head": WIDTH, "points": POINTS, "sizes": sizes}
    write_record(record("deformable-attention", synthetic="random values", **values, forms=result), options.out)


def relative(x: jax.Array, y: jax.Array) -> float:
    """Returns the distance of x from y as a share of y's length."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))


if __name__ == "__main__":
    main()
