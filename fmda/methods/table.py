"""Kind `table`: methods (rows) trained for several targets (columns) and seeds, scored on the targets' test parts.

A row is a set of changes to a common configuration, usually of kind `uda`. A column is another set: the images of a
target and how it is validated. It also names the labelled test part on which each cell is scored once, at its end.
Cells run in the order of seeds, then rows, then columns, so that an interrupted table has whole seeds. In a row the
text `@row/...` means the folder of that row's run of the same column and seed, such as a network to start from, and
`{image}` is the name of the one image of the target that a cell of this column and seed may see.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from fmda.atomic import write_atomic, write_json
from fmda.config import FREE, NonNegativeInt, Raw, from_dict, merge, resolved
from fmda.data.config import DataConfig
from fmda.errors import UserError, did_you_mean
from fmda.methods.kinds import Job, Runs, absent, referred, resolve
from fmda.progress import duration, process_index
from fmda.runs.journal import read_rows
from fmda.runs.plan import Plan
from fmda.runs.stages import STAGE, Stage, pending

CELLS = "cells"
"""Folder of the cells in a table's folder: `cells/<row>/<column>/<seed>`, `cells/<row>/<seed>` of rows trained once."""
IMAGE = "{image}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method.

    Attributes:
        config: what differs from the common configuration; wins over the column's.
        take: keys of the common and of the column's configuration that count, as for a row of another kind; None takes
            all.
        once: it does not depend on the target: trained once per seed, without the column's configuration, and scored on
            every column.
        scored: a row that is not scored only makes what later rows read.
    """

    config: Raw = field(default_factory=dict)
    take: tuple[str, ...] | None = None
    once: bool = False
    scored: bool = True


@dataclass(frozen=True, kw_only=True)
class Column:
    """A target.

    Attributes:
        config: what differs from the common configuration.
        test: labelled images that finished cells are scored on; its class map leads from the source's classes.
        only_with: a dataset, or an extra of the package, without which the column is left out.
        images: names of single target images: what `{image}` means for the seeds 0, 1, ...; then from the first again.
        rows: by name, what differs further in the configuration of a row; null leaves the row out.
    """

    config: Raw
    test: DataConfig
    only_with: str | None = None
    images: tuple[str, ...] = ()
    rows: dict[str, Raw | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A table. Rows, columns and seeds may be added later; each finished cell knows its own configuration.

    Attributes:
        runs: runs before the cells, by name, as of kind `pipeline`; `@name/...` means the folder of one.
        common: the configuration that all cells share.
        rows, columns: by name.
        seeds: of the cells.
        baseline: the row that gains are measured from; None is the first one that is scored.
    """

    runs: dict[str, Raw] = field(default_factory=dict, metadata=FREE)
    common: Raw = field(metadata=FREE)
    rows: dict[str, Row] = field(metadata=FREE)
    columns: dict[str, Column] = field(metadata=FREE)
    seeds: tuple[NonNegativeInt, ...] = field(default=(0, 1, 2), metadata=FREE)
    baseline: str | None = field(default=None, metadata=FREE)

    @property
    def scored(self) -> list[str]:
        """The rows of the table."""
        return [name for name, row in self.rows.items() if row.scored]


class Cell(NamedTuple):
    """A training; `column` is None where it serves all."""

    row: str
    column: str | None
    seed: int

    @property
    def name(self) -> str:
        """The folder of its run."""
        return "/".join([CELLS, self.row, *([self.column] if self.column else []), str(self.seed)])

    def test(self, column: str) -> str:
        """Returns the folder of its score on a column."""
        return f"{self.name}/test-{column}"


def table_job(values: Mapping[str, Any], where: str, work_dir: Path, here: Path) -> Job:
    """Returns the job of a table; runs, rows (with what columns say of them) and columns that are null are left out.

    Raises UserError for invalid values.
    """
    values = {key: value for key, value in values.items() if key != "kind"}
    groups = {name: values[name] for name in ("runs", "rows", "columns") if isinstance(values.get(name), Mapping)}
    gone = {name for name, one in groups.get("rows", {}).items() if resolved(one) is None}
    for group, ones in groups.items():
        values[group] = {name: one for name, one in ones.items() if resolved(one) is not None}
    for name, column in values["columns"].items() if "columns" in groups else ():
        if isinstance(column, Mapping) and isinstance(column.get("rows"), Mapping):
            rows = {row: one for row, one in column["rows"].items() if row not in gone}
            values["columns"][name] = {**column, "rows": rows}
    config = from_dict(Config, values, where)
    return _Table(config, where, work_dir, here).job()


def cell_values(config: Config, cell: Cell, where: str) -> dict[str, Any]:
    """Returns the configuration of a cell. Raises UserError where its row reads a row that has no run for it."""
    row, column = config.rows[cell.row], config.columns[cell.column] if cell.column else None
    below = merge(config.common, {"seed": cell.seed})
    below = merge(below, column.config) if column else below
    if row.take is not None:
        below = {key: value for key, value in below.items() if key in row.take}
    values = merge(merge(below, row.config), (column.rows.get(cell.row) or {}) if column else {})
    return _expanded(values, config, cell, f"{where}: rows.{cell.row}")


def _expanded(value: Any, config: Config, cell: Cell, where: str) -> Any:
    """Returns the values with references to rows replaced by references to their runs, and with the image's name."""
    if isinstance(value, Mapping):
        return {key: _expanded(one, config, cell, where) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_expanded(one, config, cell, where) for one in value]
    if isinstance(value, str) and IMAGE in value:
        images = config.columns[cell.column].images if cell.column else ()
        if not images:
            fault = f"columns.{cell.column}.images names none" if cell.column else "a row trained once has no target"
            raise UserError(f"{where}: '{value}' needs an image, but {fault}; fix either")
        value = value.replace(IMAGE, images[cell.seed % len(images)])
    if not pending(value):
        return value
    name = referred(value, config.rows)
    if name not in config.rows:
        return value
    once = config.rows[name].once
    if cell.column is None and not once:
        raise UserError(f"{where}: is trained once, but '{value}' differs by column; remove once, or read another row")
    return f"@{Cell(name, None if once else cell.column, cell.seed).name}{value[len(name) + 1 :]}"


class _Table:
    """The runs of a table and the stages that score them."""

    def __init__(self, config: Config, where: str, work_dir: Path, here: Path) -> None:
        _check_names(config, where)
        self.config, self.where, self.work_dir, self.here = config, where, work_dir, here
        self.baseline = config.baseline or config.scored[0]
        self.missing = {name: reason for name, one in config.columns.items() if (reason := absent(one.only_with))}
        self.columns = [name for name in config.columns if name not in self.missing]
        if not self.columns:
            raise UserError(f"{where}: columns: all are left out: {'; '.join(dict.fromkeys(self.missing.values()))}")
        self.cells = [
            Cell(name, column, seed)
            for seed in config.seeds
            for name, row in config.rows.items()
            for column in ([None] if row.once else self.columns)
            if column is None or config.columns[column].rows.get(name, {}) is not None
        ]
        cells = {cell.name: cell_values(config, cell, where) for cell in self.cells}
        self.runs = Runs({**config.runs, **cells}, where, work_dir, here)

    def job(self) -> Job:
        """Returns the table as a job."""
        return Job("table", self.config, self.work_dir, self.stages, self.plan, self.check)

    def stages(self, say: Callable[[str], None]) -> list[Stage]:
        """Returns the runs before the cells, the cells with their scores, and the table."""
        for name, reason in self.missing.items():
            say(f"column {name}: left out, {reason}")
        self.runs.say_missing(say)
        stages = [self.runs.stage(name, say) for name in self.runs.order if name in self.config.runs]
        clock = _Clock([self._last(cell) for cell in self.cells], say)
        for cell in self.cells:
            parts = [self.runs.stage(cell.name, say), *(self._test(cell, column) for column in self._scored_on(cell))]
            stages += [clock.timed(part, self._line(cell)) for part in parts]
        return [*stages, Stage("table", lambda folder, _: self._write(folder, say), always=True, alone=True)]

    def plan(self) -> Plan:
        """Returns the cells, and FLOPs of one cell of each row, and of all."""
        stages, flops, total, unknown = [], [], 0.0, []
        for name in self.config.rows:
            cells = [cell for cell in self.cells if cell.row == name]
            if not cells:
                continue
            columns = [cell.column for cell in cells if cell.column and cell.seed == self.config.seeds[0]]
            stages.append((name, f"{len(cells)} cells: {', '.join(columns) or 'once'}; {len(self.config.seeds)} seeds"))
            one = self._flops(cells[0])
            if one is None:
                unknown.append(name)
            else:
                flops += [(f"{name}, one cell", one), (f"{name}, {len(cells)} cells", one * len(cells))]
                total += one * len(cells)
        before = [(name, "before the cells") for name in self.runs.order if name in self.config.runs]
        if total:
            flops.append(("all cells", total))
        notes = (f"FLOPs are not known before data and weights are on this machine: {', '.join(unknown)}",)
        return Plan(stages=(*before, *stages), flops=tuple(flops), notes=notes if unknown else ())

    def check(self) -> None:
        """Raises UserError for what is certain to fail in a run, for one seed of each cell, or in a test part."""
        from fmda.evaluate.maps import common_list

        first = {cell.name for cell in self.cells if cell.seed == self.config.seeds[0]}
        self.runs.check(name for name in self.runs.order if name in self.config.runs or name in first)
        data = from_dict(DataConfig, self.config.common.get("data", {}), f"{self.where}: common.data")
        source = None if pending(data.root) or "data" not in self.config.common else data.open().classes
        for name in self.columns:
            test = self.config.columns[name].test
            if not pending(test.root) and not all(self._scores(cell, name).is_file() for cell in self._tested(name)):
                try:
                    dataset = test.open()
                    if source is not None:
                        common_list(source, dataset.classes, test.class_map)
                except UserError as fault:
                    raise UserError(f"{self.where}: columns.{name}.test: {fault}") from None

    def _scored_on(self, cell: Cell) -> list[str]:
        if not self.config.rows[cell.row].scored:
            return []
        return [cell.column] if cell.column else self.columns

    def _tested(self, column: str) -> list[Cell]:
        return [cell for cell in self.cells if column in self._scored_on(cell)]

    def _last(self, cell: Cell) -> Path:
        names = [cell.name, *(cell.test(column) for column in self._scored_on(cell))]
        return self.work_dir / names[-1]

    def _scores(self, cell: Cell, column: str) -> Path:
        return self.work_dir / cell.test(column) / "scores.json"

    def _test(self, cell: Cell, column: str) -> Stage:
        """Returns the stage that scores a finished cell on the test part of a column."""
        test = self.config.columns[column].test
        inputs = [cell.name]
        if pending(test.root):
            inputs.append(referred(str(test.root), self.runs.order))
        # a network that serves all columns sees the images of each as this one says
        protocol = merge(self.config.common, self.config.columns[column].config).get("protocol")

        def run(folder: Path, done: dict[str, Path]) -> dict[str, Any]:
            from fmda.evaluate import Protocol, Segmenter, evaluate_dataset
            from fmda.methods.uda.network import network_folder

            if cell.column is None and protocol is not None:
                network = network_folder(str(done[cell.name] / "export"))
                segmenter = Segmenter.load(network, protocol=from_dict(Protocol, protocol, f"{self.where}: protocol"))
            else:
                segmenter = Segmenter.load(done[cell.name])
            root = Path(resolve(str(test.root), done)) if test.root else None
            data = replace(test, root=root).open()
            scores = evaluate_dataset(segmenter, data, test.class_map, out=folder, keep=2, limit=test.limit)
            self._write(self.work_dir / "table")
            return {"miou": scores.miou}

        facts = {"test": test, "protocol": protocol, "cell": self.runs.jobs[cell.name].config}
        return Stage(cell.test(column), run, facts, tuple(dict.fromkeys(inputs)), renew=True, alone=True)

    def _line(self, cell: Cell) -> Callable[[], str]:
        """Returns what gives the scores of a cell in a line."""

        def line() -> str:
            scores = [
                f"{column} {100 * json.loads(path.read_text(encoding='utf-8'))['scores']['miou']:.1f}"
                for column in self._scored_on(cell)
                if (path := self._scores(cell, column)).is_file()
            ]
            return f"{cell.row}, seed {cell.seed}: {', '.join(scores) or cell.column or 'done'}"

        return line

    def _write(self, folder: Path, say: Callable[[str], None] | None = None) -> dict[str, Any]:
        """Writes the table of the cells that are finished: `table.json`, `table.md` and a section of the report."""
        from fmda.evaluate.comparison import Comparison
        from fmda.evaluate.sections import write_sections

        outcomes = {
            (cell.row, column, cell.seed): _outcome(self.work_dir / cell.name, path)
            for column in self.columns
            for cell in self._tested(column)
            if (path := self._scores(cell, column)).is_file()
        }
        table = Comparison(self.config.scored, self.columns, self.config.seeds, self.baseline, outcomes)
        folder.mkdir(exist_ok=True)
        write_json(folder / "table.json", table.to_json())
        write_atomic(folder / "table.md", table.markdown())
        write_sections(folder, [table.section()])
        if say is not None:
            say(table.markdown())
        return {"scores": len(outcomes)}

    def _flops(self, cell: Cell) -> float | None:
        """Returns the FLOPs of a cell; None where they are not known yet."""
        folders = {name: self.work_dir / name for name in self.runs.order if (self.work_dir / name).is_dir()}
        values = resolve(cell_values(self.config, cell, self.where), folders)
        network = values.get("network")
        if isinstance(network, Mapping) and pending(network.get("start")):
            # the network of another row has the form of the common one
            values["network"] = {key: value for key, value in network.items() if key != "start"}
        return Runs({cell.row: values}, self.where, self.work_dir, self.here).jobs[cell.row].flops()


class _Clock:
    """Says after each cell how many are finished, and when the others will be."""

    def __init__(self, last: Sequence[Path], say: Callable[[str], None]) -> None:
        self._last, self._say = last, say
        self._start: float | None = None
        self._done = 0

    def timed(self, stage: Stage, line: Callable[[], str]) -> Stage:
        """Returns the stage with a line at its end where it is the last one of a cell."""

        def run(folder: Path, done: dict[str, Path]) -> dict[str, Any] | None:
            self._start = self._start or time.monotonic()
            outputs = stage.run(folder, done)
            if folder in self._last and process_index() == 0:
                self._done += 1
                left = sum(not (one / STAGE).is_file() for one in self._last if one != folder)
                seconds = (time.monotonic() - self._start) / self._done
                ready = f"table: {len(self._last) - left}/{len(self._last)} cells"
                self._say(f"{ready}, {line()}" + (f", ETA {duration(seconds * left)}" if left else ""))
            return outputs

        return replace(stage, run=run)


def _outcome(run: Path, scores: Path) -> Any:
    from fmda.evaluate.comparison import Outcome
    from fmda.evaluate.dead_classes import dead_classes

    seconds = json.loads((run / STAGE).read_text(encoding="utf-8"))["seconds"]
    miou = json.loads(scores.read_text(encoding="utf-8"))["scores"]["miou"]
    return Outcome(miou, seconds, tuple(dead_classes(read_rows(run / "train" / "metrics.jsonl"))))


def _check_names(config: Config, where: str) -> None:
    if not (config.scored and config.columns and config.seeds):
        raise UserError(f"{where}: rows, columns and seeds each need one entry at least")
    for name in (*config.rows, *config.columns):
        if "/" in name:
            raise UserError(f"{where}: '{name}' is a folder of the table; name it without '/'")
    for name in config.rows:
        if name in config.runs:
            raise UserError(f"{where}: rows.{name}: a run has this name too; choose another")
    if config.baseline is not None and config.baseline not in config.scored:
        raise UserError(
            f"{where}: baseline: '{config.baseline}' is no scored row{did_you_mean(config.baseline, config.scored)}"
        )
    for column, one in config.columns.items():
        for name in one.rows:
            if name not in config.rows:
                raise UserError(f"{where}: columns.{column}.rows: '{name}' is no row{did_you_mean(name, config.rows)}")
