"""The stages that all trainers share."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fmda.errors import UserError
from fmda.runs.stages import Stage

Run = Callable[[Any, Path, dict[str, Path]], dict[str, Any]]
"""(configuration, folder of the stage, folders of earlier stages) -> what the stage reports."""


def trainer_stages(
    config: Any, train: Run, export: Run, check: Run, *, exported: Any, checked: Any, before: Sequence[Stage] = ()
) -> list[Stage]:
    """Returns the stages `before`, train, export and, where the configuration holds images out, check.

    `exported` and `checked` are the settings that the last two depend on besides those of the stages that they read.
    """
    names = tuple(stage.name for stage in before)
    stages = [
        *before,
        Stage("train", functools.partial(train, config), config, names),
        Stage("export", functools.partial(export, config), exported, (*names, "train"), alone=True),
    ]
    if config.held:
        stages.append(Stage("check", functools.partial(check, config), checked, ("export",), alone=True))
    return stages


def check_held(data: Sequence[Any], held: Sequence[Any]) -> None:
    """Raises UserError for sources that are both trained on and held out."""
    if overlap := set(data) & set(held):
        raise UserError(f"held: {', '.join(sorted(map(str, overlap)))} is also in data; name other folders")
