"""The frame of all trainers: stages train, export and check, the export of a network, the plan of a task."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from fmda import trees
from fmda.atomic import write_json
from fmda.config import to_dict
from fmda.data.streams import Stream
from fmda.methods.planning import Training, training_plan
from fmda.runs.plan import Plan
from fmda.runs.stages import Stage, pending
from fmda.train import Task, TrainerConfig, best_step, last_metrics, read_params, run_task
from fmda.trees import Tree
from fmda.weights.source import asset_names

MakeTask = Callable[[dict[str, Path]], Task]
"""Folders of earlier stages -> the task."""
Write = Callable[[Any, Path, dict[str, Path], Tree], Mapping[str, Any] | None]
"""(configuration, folder of the export, folders of earlier stages, parameters as NumPy arrays) -> facts to record."""
Check = Callable[[Any, Path, dict[str, Path]], dict[str, Any]]
"""(configuration, folder of the stage, folders of earlier stages) -> facts to record."""


def trainer_stages(
    config: TrainerConfig,
    task: MakeTask,
    write: Write,
    *,
    exported: Any = None,
    before: Sequence[Stage] = (),
    check: Check | None = None,
    checked: Any = None,
    check_name: str = "check",
    which: Literal["params", "teacher"] = "teacher",
    summary: str = "training.json",
) -> list[Stage]:
    """Returns the stages `before`, train, export and, where there is one, `check`.

    `export` writes the network of the newest checkpoint or, where `config.best` names a score, of the best one, and a
    summary of its training. It records the number of parameters, what `write` returns, and the "step" of the best one.

    Args:
        config: also what the last two stages receive.
        task, write, check: what the stages do.
        exported, checked: settings that the last two stages depend on besides those of the stages that they read.
        before: stages that the training reads.
        check_name: name of the last stage.
        which: the parameters that are exported, or their average.
        summary: name of the file with the summary.
    """
    names = tuple(stage.name for stage in before)

    def train(folder: Path, done: dict[str, Path]) -> dict[str, Any]:
        return {"steps": int(run_task(task(done), config.of_loop(), folder).step)}

    def export(folder: Path, done: dict[str, Path]) -> dict[str, Any]:
        step = None if config.best is None else best_step(done["train"], config.best, config.best_mode)
        params = jax.device_get(read_params(done["train"], which, step=step))
        facts = write(config, folder, done, params) or {}
        write_summary(folder / summary, config, done["train"])
        return {"parameters": trees.count(params), **({} if step is None else {"step": step}), **facts}

    stages = [*before, Stage("train", train, config, names)]
    stages.append(Stage("export", export, exported, (*names, "train"), alone=True))
    if check is not None:
        stages.append(Stage(check_name, functools.partial(check, config), checked, ("export",), alone=True))
    return stages


def write_summary(path: Path, config: TrainerConfig, trained: Path, **more: Any) -> None:
    """Writes {"config", "last", **more}, to lie beside weights: the configuration and the last training metrics."""
    write_json(path, {"config": to_dict(config), "last": last_metrics(trained), **more})


def trainer_plan(
    config: Any,
    task: Task,
    stages: Sequence[Stage],
    *,
    parts: Sequence[str] = (),
    example: str = "image",
    notes: Sequence[str] = (),
) -> Plan:
    """Returns the plan of a task whose arrays may be shapes and whose streams may hold one blank example.

    Args:
        config: a `TrainerConfig`.
        task: see `Training.of`.
        stages: of the run.
        parts: top-level names of the parameters that are counted separately, as frozen networks always are.
        example: name of one row of a batch.
        notes: further lines.
    """
    training = Training.of(task, config.steps, example=example)
    stream = task.streams if isinstance(task.streams, Stream) else next(iter(task.streams.values()))
    frozen = {f"{name}, frozen": trees.count(net) for name, net in task.frozen.items() if isinstance(net, Mapping)}
    return training_plan(
        training, stages=[(stage.name, "") for stage in stages], batch=stream.batch, steps=config.steps,
        parameters=frozen | {name: trees.count(training.state.params[name]) for name in parts}, notes=notes,
    )  # fmt: skip


def plan_without_sizes(stages: Sequence[Stage], **sources: str | Path | None) -> Plan | None:
    """Returns a plan of stages alone where a source, by option, is no file or embedded model yet; else None."""
    absent = [
        f"{name}: {source} is not on this machine yet; no sizes are known"
        for name, source in sources.items()
        if source is not None
        and (pending(source) or not (str(source) in asset_names() or Path(source).expanduser().exists()))
    ]
    return Plan(stages=tuple((stage.name, "") for stage in stages), notes=tuple(absent)) if absent else None
