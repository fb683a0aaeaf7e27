"""The stage that writes one HTML page over several runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmda.errors import UserError
from fmda.runs.plan import Plan
from fmda.runs.stages import Stage, pending


@dataclass(frozen=True)
class Config:
    """What the page shows.

    Attributes:
        runs: run folders; the first is the one the others are compared with.
    """

    runs: tuple[Path, ...]


def check(config: Config) -> None:
    """Raises UserError for run folders that do not exist, but for those that earlier runs of a pipeline make."""
    if not config.runs:
        raise UserError("report: `runs` is empty; name at least one run folder")
    for run in config.runs:
        if not pending(run) and not run.is_dir():
            raise UserError(f"runs: {run} does not exist; give the work_dir of a run")


def stages(config: Config) -> list[Stage]:
    """Returns the one stage, which writes `report.html`."""

    def write(folder: Path, done: dict[str, Path]) -> dict[str, Any]:
        from fmda.evaluate.report import report

        return {"page": str(report(list(config.runs), folder / "report.html"))}

    return [Stage("page", write, config, always=True, alone=True)]


def plan(config: Config) -> Plan:
    """Returns the page's place in the run."""
    return Plan(stages=(("page", f"one HTML page over {len(config.runs)} runs"),))
