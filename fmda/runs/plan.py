"""What a dry run of any kind prints."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Plan:
    """What a run would do and cost.

    Attributes:
        stages: (name, what it does) in order.
        parameters: (component, count).
        flops: (operation, FLOPs).
        memory: (what, bytes per device).
        shardings: (network, how its parameters lie on devices).
        notes: further lines.
    """

    stages: tuple[tuple[str, str], ...] = ()
    parameters: tuple[tuple[str, int], ...] = ()
    flops: tuple[tuple[str, float], ...] = ()
    memory: tuple[tuple[str, float], ...] = ()
    shardings: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @staticmethod
    def merged(plans: Mapping[str, "Plan"]) -> "Plan":
        """Returns one plan with all rows of several, each after the name of its run."""

        def named(name: str, row: Any) -> Any:
            return f"{name}: {row}" if isinstance(row, str) else (f"{name}: {row[0]}", *row[1:])

        parts = {
            part.name: tuple(named(name, row) for name, plan in plans.items() for row in getattr(plan, part.name))
            for part in fields(Plan)
        }
        return Plan(**parts)

    def text(self) -> str:
        """Returns the plan as aligned lines for a terminal."""
        groups = [
            ("stages", [(n, w) for n, w in self.stages]),
            ("parameters", [(n, f"{c:,}") for n, c in self.parameters]),
            ("FLOPs", [(n, f"{f / 1e9:,.2f} GFLOP") for n, f in self.flops]),
            ("bytes per device", [(n, f"{b / 2**20:,.1f} MiB") for n, b in self.memory]),
            ("shardings", list(self.shardings)),
        ]
        width = max((len(n) for _, rows in groups for n, _ in rows), default=0) + 2
        lines: list[str] = []
        for title, rows in groups:
            if rows:
                lines += [title, *(f"  {name:<{width}}{value}" for name, value in rows)]
        return "\n".join([*lines, *self.notes])
