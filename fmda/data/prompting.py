"""Prompt templates: texts with one slot "{}" for a class name."""

from pathlib import Path

from fmda.errors import UserError, did_you_mean

SLOT = "{}"

_HERE = Path(__file__).parent / "templates"


def templates(name: str = "imagenet80") -> tuple[str, ...]:
    """Returns the templates of a known set, or of a text file with one on each line, in order.

    "imagenet80" is the set of 80 that OpenAI published for zero-shot ImageNet; template ids are positions in it.
    Raises UserError for an unknown set, an empty file, a repeated template, or one without exactly one slot "{}".
    """
    path = _HERE / f"{name}.txt"
    if not path.is_file():
        path = Path(name)
        if path.suffix != ".txt":
            known = sorted(p.stem for p in _HERE.glob("*.txt"))
            raise UserError(f"'{name}': no such template set{did_you_mean(name, known)}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        raise UserError(f"{path}: cannot be read as a template file ({fault}); one template a line, UTF-8") from None
    found = tuple(line.strip() for line in lines if line.strip())
    check_templates(found, str(path))
    return found


def check_templates(found: tuple[str, ...], where: str = "templates") -> None:
    """Raises UserError, naming `where` and the line, unless each template is new and has exactly one slot "{}"."""
    if not found:
        raise UserError(f"{where}: holds no template; write one a line, with {SLOT} for the class name")
    for i, template in enumerate(found):
        if template.count(SLOT) != 1:
            raise UserError(f"{where}: template {i} '{template}' needs exactly one slot {SLOT} for the class; mend it")
        if template in found[:i]:
            raise UserError(f"{where}: template {i} '{template}' stands twice (also {found.index(template)}); drop one")
