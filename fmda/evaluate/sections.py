"""Tables and images that a method adds to the report of its run, through `sections.json` in a folder of the run."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fmda.atomic import write_json
from fmda.errors import UserError

FILE = "sections.json"
Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """A table of a report: column headings and rows of text or numbers; None is shown as a dash."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Section:
    """One part of a report.

    Attributes:
        title: its heading.
        text: paragraphs, separated by blank lines.
        table: shown below the text.
        image: a PNG, JPEG or SVG file, relative to the folder of `sections.json`; shown below the table.
    """

    title: str
    text: str = ""
    table: Table | None = None
    image: str | None = None


def write_sections(folder: Path, sections: Sequence[Section]) -> None:
    """Writes `sections.json` into a folder of the run, replacing an earlier one.

    Raises:
        UserError: a row is longer or shorter than the headings, or an image is not there.
    """
    for section in sections:
        _check(section, folder, f"section '{section.title}'")
    write_json(folder / FILE, [asdict(s) for s in sections])


def read_sections(folder: Path) -> list[Section]:
    """Returns the sections of a folder, none when it has no `sections.json`.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        sections = [_section(item) for item in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a list of sections ({error}); run that stage again") from None
    for section in sections:
        _check(section, folder, f"{path}: section '{section.title}'")
    return sections


def _section(item: dict[str, Any]) -> Section:
    table = item["table"]
    if table is not None:
        table = Table(tuple(table["columns"]), tuple(map(tuple, table["rows"])))
    return Section(item["title"], item["text"], table, item["image"])


def _check(section: Section, folder: Path, where: str) -> None:
    if section.table is not None:
        columns = len(section.table.columns)
        for row in section.table.rows:
            if len(row) != columns:
                raise UserError(f"{where}: a row has {len(row)} cells for {columns} columns; make them equal")
    if section.image is not None and not (folder / section.image).is_file():
        raise UserError(f"{where}: image {section.image} is not in {folder}; write it first")
