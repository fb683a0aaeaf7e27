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
    texts = [composed(line) for line in lines]
    for i, template in enumerate(texts):
        if _slots(template) != [["", "", None]]:
            raise UserError(
                f"{where}: template {i} '{template}' needs exactly one slot {SLOT} for the class name; "
                "write other braces twice"
            )
        if (first := texts.index(template)) < i:
            raise UserError(f"{where}: template {i} '{template}' occurs twice (also {first}); remove one")


def _slots(template: str) -> list[list]:
    """Returns (name, format, conversion) of each slot, none for braces without partner."""
    try:
        return [slot for _, *slot in string.Formatter().parse(template) if slot[0] is not None]
    except ValueError:
        return []
