"""The HTML report over one or several runs: one file, no network, no script; equal input gives equal bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from fmda.atomic import write_atomic
from fmda.errors import UserError, disk_errors
from fmda.evaluate.charts import curves, heat_map, image_address, svg_address
from fmda.evaluate.runs import Evaluation, Run, read_run
from fmda.evaluate.sections import Cell, Section, Table
from fmda.evaluate.summary import Group, groups_of, reported

TEMPLATE = "report.html.jinja"
MOST_CHARTS = 12
MOST_FIGURES = 24
CONFUSIONS = 8
LONG_TABLE = 8
"""Tables of a section with more rows are folded."""
RATES = {
    "time/examples_per_second": "images/s",
    "time/mfu": "MFU",
    "time/data_wait": "share of time waiting for data",
    "time/label_wait": "share of time waiting for labels",
    "time/device_memory": "device memory, bytes",
}


def report(
    runs: Sequence[str | Path], out: str | Path, *, title: str = "fmda report", command: str | None = None
) -> Path:
    """Writes one self-contained HTML page over run folders and returns its path.

    The page shows a summary, scores by class with differences to the host or the first run, confusions, examples,
    curves, the `sections.json` of methods, and throughput, each where the run has it.

    Args:
        runs: run folders; the others are compared with the first.
        out: the page; its folder is made if missing.
        title: heading of the page.
        command: the command that made the runs, where they did not record it.

    Raises:
        UserError: no run, a folder without a run, or a damaged file in it. Nothing is written then.
    """
    if not runs:
        raise UserError("report: name at least one run folder")
    opened = [read_run(folder, name) for folder, name in zip(runs, _names(runs), strict=True)]
    page = _page(opened, title, command)
    out = Path(out)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, page)
    return out


def _names(runs: Sequence[str | Path]) -> list[str]:
    """Returns short names for run folders, longer where the last part is not unique."""
    paths = [Path(r).resolve() for r in runs]
    for parts in range(1, 5):
        names = ["/".join(p.parts[-parts:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{p.name} ({k})" for k, p in enumerate(paths, 1)]


def _page(runs: list[Run], title: str, command: str | None) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "percent": percent,
        "points": points,
        "cell": cell,
        "hexcolour": "#{0[0]:02x}{0[1]:02x}{0[2]:02x}".format,
    }
    groups = groups_of([e for run in runs for e in run.evaluations])
    several = len(runs) > 1
    return environment.get_template(TEMPLATE).render(
        title=title,
        command=command,
        runs=runs,
        several=several,
        groups=groups,
        score_tables=[_score_table(group) for group in groups],
        confusions=[[_confusion(e) for e in group.members] for group in groups],
        examples=[_examples(group) for group in groups],
        reported=[line for run in runs for line in reported(run, f"{run.name}: " if several else "")],
        charts=_charts(runs),
        sections=[_shown(run, place, s, several) for run in runs for place, s in run.sections],
        figures=[_figure(run, path) for run in runs for path in run.figures[:MOST_FIGURES]],
        throughput=_throughput(runs),
        long_table=LONG_TABLE,
    )


def _score_table(group: Group) -> dict[str, Any]:
    first = group.members[0]
    shares = first.scores.pixels / max(int(first.scores.pixels.sum()), 1)
    ious = np.stack([e.scores.iou for e in group.members], axis=1)
    rows = [
        {"name": name, "colour": colour, "pixels": float(share), "ious": iou.tolist(), "best": _single_best(iou)}
        for name, colour, share, iou in zip(group.names, first.palette, shares, ious, strict=True)
    ]
    summary = {name: [e.scores.summary[name] for e in group.members] for name in first.scores.summary}
    return {"rows": rows, "summary": summary}


def _single_best(ious: np.ndarray) -> int:
    """Returns the index of the highest value as it is printed; -1 for ties, a single value, or none."""
    rounded = np.round(100 * ious, 2)
    if len(ious) < 2 or np.isnan(rounded).all():
        return -1
    winners = np.flatnonzero(rounded == np.nanmax(rounded))
    return int(winners[0]) if len(winners) == 1 else -1


def _confusion(evaluation: Evaluation) -> dict[str, Any]:
    """Returns the heat map, and the pairs of classes confused most: names, share of all pixels, of the truth's."""
    scores = evaluation.scores
    full = np.concatenate([scores.confusion, scores.void[:, None]], 1)
    wrong = full.copy()
    np.fill_diagonal(wrong, 0)
    share = wrong / np.maximum(full.sum(1, keepdims=True), 1)
    names = (*scores.names, "no class")
    largest = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS]
    pairs = [divmod(int(flat), len(names)) for flat in largest]
    rows = [(names[t], names[g], float(wrong[t, g] / full.sum()), float(share[t, g])) for t, g in pairs if wrong[t, g]]
    return {"svg": Markup(heat_map(full, scores.names)), "pairs": rows}


def _examples(group: Group) -> list[dict[str, Any]]:
    """Returns the example images, each with the figures of all members that drew it."""
    images: dict[str, dict[str, Any]] = {}
    for label, member in zip(group.labels, group.members, strict=True):
        for e in member.examples:
            image = images.setdefault(e["name"], {"kind": e["kind"], "name": e["name"], "figures": []})
            image["figures"].append((label, e["miou"], image_address(e["figure"])))
    return list(images.values())


def _charts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Returns (metric, address of its chart), losses first, scores of single classes last; all runs in each."""
    lines: dict[str, list[tuple[str, list[float], list[float]]]] = {}
    for run in runs:
        for where, rows in run.metrics.items():
            label = "/".join(part for part in (run.name if len(runs) > 1 else "", where) if part) or run.name
            for key in dict.fromkeys(k for row in rows for k in row):
                curve = [(row["step"], row[key]) for row in rows if key in row and np.isfinite(row[key])]
                if key != "step" and len(curve) > 1 and not key.startswith("time/"):
                    steps, values = map(list, zip(*curve, strict=True))
                    lines.setdefault(key, []).append((label, steps, values))
    order = sorted(lines, key=lambda key: (key.count("/") > 1, "loss" not in key, key != "loss"))
    return [(key, svg_address(curves(lines[key], key))) for key in order[:MOST_CHARTS]]


def _shown(run: Run, place: Path, section: Section, several: bool) -> dict[str, Any]:
    return {
        "title": section.title,
        "run": run.name if several else "",
        "paragraphs": [p.strip() for p in section.text.split("\n\n") if p.strip()],
        "table": section.table,
        "address": image_address(place / section.image) if section.image else None,
    }


def _figure(run: Run, path: Path) -> dict[str, str]:
    where = path.relative_to(run.folder).with_suffix("").as_posix().replace("figures/", "")
    return {"name": f"{run.name}: {where}", "address": image_address(path)}


def _throughput(runs: Sequence[Run]) -> Table | None:
    rows: list[tuple[Cell, ...]] = []
    for run in runs:
        for where, metrics in run.metrics.items():
            for key, what in RATES.items():
                values = [row[key] for row in metrics if key in row]
                if values:
                    rows.append((run.name, where or "-", what, float(np.median(values))))
        rows += [(run.name, where or "-", "images/s", timing["images_per_second"]) for where, timing in run.timings]
        rows += [(run.name, where or "-", "seconds", r["seconds"]) for where, r in run.stages if "seconds" in r]
    return Table(("run", "stage", "what", "value"), tuple(rows)) if rows else None


def percent(value: float | None) -> str:
    """Returns a share as percent with two digits, "–" for nan or None."""
    return "–" if value is None or np.isnan(value) else f"{100 * value:.2f}"


def points(value: float, reference: float) -> str:
    """Returns a difference of shares in signed percentage points, "" where either is nan."""
    difference = 100 * (value - reference)
    return "" if np.isnan(difference) else f"{difference:+.2f}".replace("-", "−")


def cell(value: Cell) -> str:
    """Returns a table cell: integers with thin groups, other numbers with four figures, None and nan as a dash."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "–"
    if isinstance(value, bool) or isinstance(value, str):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", "\u2009")
    return f"{value:.4g}"
