"""`model.json`: the experts of a run with templates and class names as text, and fingerprints of the weights.

The file alone opens the same model, also where the run folder moved or a template file changed.
"""

import json
from pathlib import Path

from fmda.atomic import write_json
from fmda.config import differences, from_dict, to_dict
from fmda.data import ClassList
from fmda.errors import UserError
from fmda.methods.floss.model import Chosen, Floss
from fmda.methods.floss.settings import Config

FILE = "model.json"
LOADER = "fmda.methods.floss.run:load_segmenter"


def write_model(folder: Path, model: Floss, chosen: Chosen) -> None:
    """Writes `model.json`."""
    content = {
        "loader": LOADER,
        "config": to_dict(model.config),
        "weights": model.weights,
        "classes": model.classes.to_dict(),
        "templates": list(model.templates),
        "chosen": [list(ids) for ids in chosen],
    }
    write_json(folder / FILE, content)


def read_model(folder: Path, model: Floss | None = None) -> tuple[Floss, Chosen]:
    """Returns the host and the experts that `model.json` in a folder describes.

    Args:
        model: the host where this process has it already; used if it is the one that the file describes.

    Raises UserError for a damaged file, and for weights or a tokenizer that are not those of the ranking.
    """
    path = Path(folder) / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config = from_dict(Config, content["config"], str(path))
        classes = ClassList.from_dict(content["classes"], str(path))
        templates, weights = tuple(content["templates"]), dict(content["weights"])
        chosen = tuple(tuple(int(i) for i in ids) for ids in content["chosen"])
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise UserError(f"{path}: not a FLOSS model description ({fault}); run the method again") from None
    if model is None or (model.weights, model.templates, model.classes) != (weights, templates, classes):
        model = Floss(config, classes, templates=templates)
    changed = differences(weights, model.weights)
    if changed:
        raise UserError(
            f"{path}: the templates were ranked with other weights or another tokenizer than those of "
            f"{model.config.clip} ({'; '.join(changed)}); restore them, or rank again in another work_dir="
        )
    return model, chosen
