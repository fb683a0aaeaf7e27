"""Summary of runs in a few lines: scores beside their references, chosen values, files."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmda.evaluate.runs import Evaluation, Run, read_run


@dataclass(frozen=True)
class Group:
    """Evaluations of the same dataset and class list, side by side.

    Attributes:
        title: dataset, split and number of images.
        names: classes.
        members: the evaluations; `labels` distinguishes them.
        references: for each member the index of the one it is compared with: "host + method" with "host" of the same
            run, every other with the first; the first and hosts that come first are compared with themselves.
    """

    title: str
    names: tuple[str, ...]
    members: tuple[Evaluation, ...]
    labels: tuple[str, ...]
    references: tuple[int, ...]

    def gain(self, member: int) -> float | None:
        """Returns the difference in mIoU to the reference, as a share; None for a member without one."""
        reference = self.references[member]
        if reference == member:
            return None
        return self.members[member].scores.miou - self.members[reference].scores.miou


def groups_of(evaluations: Iterable[Evaluation]) -> list[Group]:
    """Returns evaluations gathered by dataset, split and class list, in order of first appearance."""
    gathered: dict[tuple, list[Evaluation]] = {}
    for e in evaluations:
        gathered.setdefault((e.dataset, e.split, e.images, e.scores.names), []).append(e)
    groups = []
    for (dataset, split, images, names), members in gathered.items():
        heading = f"{dataset} {split}, {images} image{'s' * (images != 1)}"
        # a host comes before the methods built on it
        folders = [(e.run, _parent(e)) for e in members]
        members = sorted(members, key=lambda e: (folders.index((e.run, _parent(e))), " + " in e.model))
        references = tuple(_reference(members, k) for k in range(len(members)))
        groups.append(Group(heading, names, tuple(members), _labels(members), references))
    return groups


def _reference(members: Sequence[Evaluation], index: int) -> int:
    """Returns the index of the host's evaluation beside this one, else of the first evaluation."""
    member = members[index]
    host = (member.run, _parent(member), member.model.partition(" + ")[0])
    hosts = [(other.run, _parent(other), other.model) for other in members]
    return hosts.index(host) if " + " in member.model and host in hosts else 0


def _parent(evaluation: Evaluation) -> Path:
    return Path(evaluation.where).parent


def _labels(members: Sequence[Evaluation]) -> tuple[str, ...]:
    """Returns labels that distinguish the members: the model, else the run (or its folder in a pipeline) and the model.

    The model is left out where it is the same for all.
    """
    models = [e.model for e in members]
    if len(set(models)) == len(models):
        return tuple(models)
    runs, parts = [e.run for e in members], [_parent(e).as_posix() for e in members]
    for places in (runs, parts):
        if len(set(models)) == 1 and len(set(places)) == len(places):
            return tuple(places)
        labels = [f"{place}: {model}" for place, model in zip(places, models, strict=True)]
        if len(set(labels)) == len(labels):
            return tuple(labels)
    return tuple(f"{e.run}/{e.where}: {e.model}" for e in members)


def outcome(folder: str | Path) -> list[str]:
    """Returns lines for a terminal: score table with gains, what each stage reported, path of the report."""
    run = read_run(folder)
    lines = [line for group in groups_of(run.evaluations) for line in _score_lines(group)]
    lines += reported(run)
    pages = dict.fromkeys(page for _, record in run.stages if (page := _outputs(record).get("page")))
    return [*lines, *(f"report: {page}" for page in pages)]


def _score_lines(group: Group) -> list[str]:
    width = max(map(len, [group.title, *(f"  {label}" for label in group.labels)]))
    lines = [f"{group.title:<{width}}    mIoU"]
    for k, (label, member) in enumerate(zip(group.labels, group.members, strict=True)):
        gain = group.gain(k)
        compared = "" if gain is None else f"  {100 * gain:+.2f} to {group.labels[group.references[k]]}"
        lines.append(f"  {label:<{width - 2}}  {100 * member.scores.miou:6.2f}{compared}")
    return lines


def reported(run: Run, prefix: str = "") -> list[str]:
    """Returns a line for each stage that reported numbers, a choice with its reason, or models."""
    lines = []
    for where, record in run.stages:
        name, outputs = prefix + (where or run.name), _outputs(record)
        if "reason" in outputs:
            choice = ", ".join(f"{k} {v}" for k, v in outputs.items() if k != "reason")
            lines.append(f"{name}: chosen {choice} ({outputs['reason']})")
            continue
        numbers = _numbers(outputs)
        if numbers:
            lines.append(f"{name}: {', '.join(numbers)}")
        lines += [f"{name}: {path}" for path in outputs.get("models", ())]
        for part, values in outputs.items():
            # scores are in the table already
            if isinstance(values, Mapping) and "miou" not in values and (inner := _numbers(values)):
                lines.append(f"{name}, {part}: {', '.join(inner)}")
    return lines


def _outputs(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return record.get("outputs") or {}


def _numbers(values: Mapping[str, Any]) -> list[str]:
    return [
        f"{name.replace('_', ' ')} {value if isinstance(value, int) else format(value, '.4g')}"
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
