"""Self-attention of Stable Diffusion 1.4: the fused kernel against the XLA form in parts, forward and with gradients.

Three maps: 64x64 places with heads of size 40, 32x32 with 80, 16x16 with 160, eight heads each. The forms see the same
random queries, keys and values and are timed in turns in one process; their outputs and gradients are compared with
those of the XLA form in float32. A form that is off by more than rounding, or a fused one that does not compile, ends
the benchmark with an error: networks take the fused form unchecked (FMDA_FUSED_ATTENTION=0 switches it off).

    python benchmarks/attention.py --batch 8 --out benchmarks/results/attention.json

On a GPU in bfloat16, where a form that the device does not serve is left out with its reason. A CPU has no fused
kernel: there the XLA form in parts runs against all queries at once, on small maps in float32.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from sides.record import record, write_record
from sides.timing import alternate, measured_peak

from fmda.nn.attention import LONG, attention, attention_in_parts, fused_attention
from fmda.perf import compiled_memory, peak_flops

HEADS = 8
SD = ((64, 40), (32, 80), (16, 160))
"""(side of the map, size of a head)."""
SMALL = ((34, 8), (16, 16))
TOLERANCE = 0.02
"""Most that the fused form may be off by, as a share of the root mean square; bfloat16 rounds by up to 0.004."""
TINY = ((33, 8),)

Form = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
FORMS: dict[str, Form] = {"fused": fused_attention, "parts": attention_in_parts, "whole": attention}


def with_gradients(form: Form) -> Callable[..., Any]:
    """Returns (query, key, value, cotangent) -> (output, three gradients)."""

    def call(query: jax.Array, key: jax.Array, value: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(form, query, key, value)
        return out, *pull(cotangent)

    return call


def differences(found: tuple[jax.Array, ...], right: tuple[jax.Array, ...]) -> dict[str, dict[str, float]]:
    """Returns the largest difference and the root mean square one, as a share of the right values' own, by name."""
    rows = {}
    for name, x, y in zip(("output", "query", "key", "value"), found, right, strict=True):
        x, y = (np.asarray(array, np.float64) for array in (x, y))
        rows[name] = {
            "max": float(np.abs(x - y).max()),
            "relative_rms": float(np.linalg.norm(x - y) / np.linalg.norm(y)),
        }
    return rows


def available(names: list[str], dtype: str, head: int) -> tuple[list[str], str | None]:
    """Returns the forms that this device serves, and why the fused one is not among them."""
    if "fused" not in names:
        return names, None
    shape = jax.ShapeDtypeStruct((1, 256, 2, head), dtype)
    try:
        jax.jit(with_gradients(fused_attention)).lower(shape, shape, shape, shape).compile()
    except Exception as fault:  # whatever a driver, a library or the compiler comes up with
        return [name for name in names if name != "fused"], f"{type(fault).__name__}: {str(fault)[:200]}"
    return names, None


def case(options: argparse.Namespace, side: int, head: int) -> dict[str, Any]:
    """Returns times, differences and memory of all forms on one shape."""
    names, refused = available(options.forms, options.dtype, head)
    shape = (options.batch, side * side, HEADS, head)
    keys = jax.random.split(jax.random.key(0), 4)
    given = [jax.random.normal(key, shape, jnp.float32).astype(options.dtype) for key in keys]
    with jax.default_matmul_precision("highest"):
        # picture by picture: the reference may need the memory of all weights
        exact = jax.jit(with_gradients(attention_in_parts))
        rows = [exact(*(x[i : i + 1].astype(jnp.float32) for x in given)) for i in range(options.batch)]
    right = tuple(jnp.concatenate(part) for part in zip(*rows, strict=True))
    del rows
    # two products forward, four for the gradients; scores that are computed again do not count
    flops = 4 * options.batch * HEADS * head * float(side) ** 4
    peak = peak_flops(dtype=options.dtype)
    result: dict[str, Any] = {"side": side, "head": head, "shape": shape, "fused_refused": refused, "forms": {}}
    compiled: dict[str, dict[str, Any]] = {"forward": {}, "with_gradients": {}}
    for name in names:
        compiled["forward"][name] = jax.jit(FORMS[name]).lower(*given[:3]).compile()
        compiled["with_gradients"][name] = jax.jit(with_gradients(FORMS[name])).lower(*given).compile()
        result["forms"][name] = {"differences": differences(compiled["with_gradients"][name](*given), right)}
    for what, arrays, work in (("forward", given[:3], flops), ("with_gradients", given, 3 * flops)):
        calls = {name: (lambda f=call, x=arrays: f(*x)) for name, call in compiled[what].items()}
        times = alternate(calls, repeats=options.repeats)
        for name, timing in times.items():
            rate = work / timing.median
            result["forms"][name][what] = timing.to_json() | {
                "flops_per_second": rate,
                "mfu": rate / peak if peak else None,
                "temporary_bytes": compiled_memory(compiled[what][name]).get("temporaries"),
            }
        base = times["parts"].median
        result[f"{what}_ratio"] = {name: base / timing.median for name, timing in times.items() if name != "parts"}
    return result


def faults(cases: list[dict[str, Any]]) -> list[str]:
    """Returns a line for each form that differs from float32, and for the fused one where it does not compile."""
    lines = [f"heads of {one['head']}: fused form: {one['fused_refused']}" for one in cases if one["fused_refused"]]
    for one in cases:
        for name, form in one["forms"].items():
            error = max(part["relative_rms"] for part in form["differences"].values())
            if not error <= TOLERANCE:
                lines.append(f"heads of {one['head']}: {name} form: off by {error:.1%}")
    return lines


def main() -> None:
    """Runs the benchmark, prints its record, and fails where a form computes something else than the others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cpu = jax.default_backend() == "cpu"
    parser.add_argument("--batch", type=int, default=1 if cpu else 8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32" if cpu else "bfloat16")
    parser.add_argument(
        "--forms", nargs="+", choices=FORMS, default=["parts", "whole"] if cpu else ["fused", "parts", "whole"],
        help="the form in parts is what the others are held against, and always runs",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=10 if cpu else 30)
    parser.add_argument("--tiny", action="store_true", help="one map, to try the script")
    parser.add_argument("--out")
    options = parser.parse_args()
    options.forms = [name for name in FORMS if name in {"parts", *options.forms}]
    cases = [case(options, side, head) for side, head in (TINY if options.tiny else SMALL if cpu else SD)]
    result = record(
        "attention",
        batch=options.batch,
        heads=HEADS,
        dtype=options.dtype,
        longest_part=LONG,
        synthetic="random queries, keys, values and cotangents",
        ratio="time of the form in parts over the form named",
        matmul_flops_per_second=measured_peak(dtype=options.dtype) if cpu else None,
        cases=cases,
    )
    write_record(result, options.out)
    if wrong := faults(cases):
        sys.exit("; ".join(wrong))


if __name__ == "__main__":
    main()
