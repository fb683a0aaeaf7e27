"""Parameter counts by component, for plans and tables."""

from collections.abc import Mapping
from typing import Any

from fmda.trees import count, flatten, size_bytes


def parameter_rows(tree: Mapping[Any, Any], depth: int = 1) -> tuple[tuple[str, int], ...]:
    """Returns (component, number of parameters) in the tree's order, grouped by the first `depth` parts of the path.

    Leaves need only a shape, so the tree of `jax.eval_shape` will do.
    """
    rows: dict[str, int] = {}
    for path, leaf in flatten(tree).items():
        name = "/".join(path.split("/")[:depth])
        rows[name] = rows.get(name, 0) + count(leaf)
    return tuple(rows.items())


def parameter_table(tree: Mapping[Any, Any], depth: int = 1) -> str:
    """Returns a text table: component, parameters, share of all; then the total with its bytes."""
    rows = parameter_rows(tree, depth)
    total = count(tree)
    width = max([len(name) for name, _ in rows] + [len("component")])
    lines = [f"{'component':<{width}}  {'parameters':>14}  {'share':>6}"]
    lines += [f"{name:<{width}}  {number:>14,}  {100 * number / max(total, 1):>5.1f}%" for name, number in rows]
    lines.append(f"{'total':<{width}}  {total:>14,}  {size_bytes(tree) / 2**20:,.1f} MiB")
    return "\n".join(lines)
