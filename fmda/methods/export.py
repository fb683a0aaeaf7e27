"""Export of a trained network: the newest checkpoint's parameters, written as a folder that others open."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from fmda import trees
from fmda.atomic import write_json
from fmda.config import to_dict
from fmda.train import TrainerConfig, best_step, last_metrics, read_params
from fmda.trees import Tree


def export(
    config: TrainerConfig,
    folder: Path,
    trained: Path,
    write: Callable[[Tree], Mapping[str, Any] | None],
    *,
    which: Literal["params", "teacher"] = "teacher",
    part: str = "",
    summary: str = "training.json",
) -> dict[str, Any]:
    """Writes a trained network and a summary of its training. Returns {"parameters": count, **facts}.

    Where `config.best` names a score, the network of the best checkpoint is written and its "step" returned too.

    Belongs into a stage with `alone=True`: of several processes the first one reads, gathers and writes, the others
    wait at the end of the stage.

    Args:
        config: of the training run; goes into the summary.
        folder: where the export and its summary lie.
        trained: the folder of the training stage.
        write: receives the parameters as NumPy arrays, writes them, and returns facts of its own, or None.
        which: the parameters or the teacher's.
        part: slash path of the exported part of the tree; "" exports the whole.
        summary: file name of the summary.

    Raises UserError where `trained` holds no checkpoint, or the folder cannot be written.
    """
    step = None if config.best is None else best_step(trained, config.best, config.best_mode)
    params = jax.device_get(read_params(trained, which, step=step))
    for key in filter(None, part.split("/")):
        params = params[key]
    facts = write(params) or {}
    write_summary(folder / summary, config, trained)
    chosen = {} if step is None else {"step": step}
    return {**facts, **chosen, "parameters": trees.count(params)}


def write_summary(path: Path, config: TrainerConfig, trained: Path, **more: Any) -> None:
    """Writes {"config", "last", **more}, to lie beside weights: the configuration and the last training metrics."""
    summary = {"config": to_dict(config), "last": last_metrics(trained), **more}
    write_json(path, summary)
