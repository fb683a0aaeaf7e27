"""What a dry run of any kind prints."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Plan:
    """What a run would do, found without touching anything.

    Attributes:
        stages: (name, what it does) in order.
        parameters: (component, count).
        flops: (operation, FLOPs per image).
        memory: (what, bytes per device).
        shardings: (network, how its parameters lie on devices).
        notes: further lines.
    """

    stages: tuple[tuple[str, str], ...] = ()
    parameters: tuple[tuple[str, int], ...] = ()
    flops: tuple[tuple[str, float], ...] = ()
    memory: tuple[tuple[str, float], ...] = ()
    shardings: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = field(default=())

    def text(self) -> str:
        """Returns the plan as aligned lines for a terminal."""
        groups = [
            ("stages", [(n, w) for n, w in self.stages]),
            ("parameters", [(n, f"{c:,}") for n, c in self.parameters]),
            ("FLOPs per image", [(n, f"{f / 1e9:,.2f} GFLOP") for n, f in self.flops]),
            ("bytes per device", [(n, f"{b / 2**20:,.1f} MiB") for n, b in self.memory]),
            ("shardings", list(self.shardings)),
        ]
        width = max((len(n) for _, rows in groups for n, _ in rows), default=0) + 2
        lines: list[str] = []
        for title, rows in groups:
            if rows:
                lines += [title, *(f"  {name:<{width}}{value}" for name, value in rows)]
        return "\n".join([*lines, *self.notes])
