"""Prompt templates: texts with one slot "{}" for a class name."""

import string
from pathlib import Path

from fmda.errors import UserError, did_you_mean
from fmda.text import composed, read_lines

SLOT = "{}"

_HERE = Path(__file__).parent / "templates"


def templates(name: str = "imagenet80") -> tuple[str, ...]:
    """Returns the templates of a known set, or of a text file with one on each line (comments begin with #), in order.

    "imagenet80" is the set of 80 that OpenAI published for zero-shot ImageNet; template ids are positions in it.
    Raises UserError for an unknown set, an empty file, a repeated template, or one without exactly one slot "{}".
    """
    path = _HERE / f"{name}.txt"
    if not path.is_file():
        path = Path(name).expanduser()
        if path.suffix != ".txt":
            known = sorted(p.stem for p in _HERE.glob("*.txt"))
            raise UserError(f"'{name}': no such template set{did_you_mean(name, known)}")
    lines = tuple(map(composed, read_lines(path)))
    check_templates(lines, str(path))
    return lines


def check_templates(lines: tuple[str, ...], where: str = "templates") -> None:
    """Raises UserError, naming `where` and the line, unless each template is new and has exactly one slot "{}".

    Templates are format strings: a literal brace is written twice.
    """
    if not lines:
        raise UserError(f"{where}: holds no template; write one a line, with {SLOT} for the class name")
    first: dict[str, int] = {}
    for i, template in enumerate(lines):
        if _slots(template) != [("", "", None)]:
            raise UserError(
                f"{where}: template {i} '{template}' needs exactly one slot {SLOT} for the class name; "
                "write other braces twice"
            )
        if composed(template) in first:
            earlier = first[composed(template)]
            raise UserError(f"{where}: template {i} '{template}' occurs twice (also {earlier}); remove one")
        first[composed(template)] = i


def _slots(template: str) -> list[tuple[str, str | None, str | None]] | None:
    """Returns (name, format, conversion) of each slot, None for braces without partner."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError:
        return None
    return [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
