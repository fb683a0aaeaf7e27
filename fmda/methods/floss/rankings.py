"""Ranking files: the published JSON form, and one more key that records the provenance of the ranking.

    {"model": "maskclip", "dataset": "cityscapes", "split": "train",
     "classes": {"road": {"entropy_ranking": [
        {"template_id": 66, "entropy": 1.012, "pixel_percentage": 23.98, "rank": 1}, ...]}},
     "meta": {...}}

Published files have no `meta`. There, a template that never predicts a class has entropy 0; it is ranked last here.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from fmda.atomic import write_json
from fmda.data import ClassList
from fmda.data import templates as known_templates
from fmda.errors import UserError
from fmda.methods.class_text import template_hash
from fmda.methods.floss.selection import order


@dataclass(frozen=True)
class Ranking:
    """How much each template is trusted for each class.

    Attributes:
        host, dataset, split: what was ranked.
        classes: K class names.
        risks: [M, K], lower is better; entropy in nats unless `meta` names another criterion.
        share: [M, K], per cent of all pixels that the template gives to the class.
        meta: provenance, {} for published files: criterion, weights, templates (SHA-256), names, resolution, images,
            pixels.
    """

    host: str
    dataset: str
    split: str
    classes: tuple[str, ...]
    risks: Float[np.ndarray, "M K"]
    share: Float[np.ndarray, "M K"]
    meta: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        ranked = order(self.risks, self.share)

        def rows(k: int) -> list[dict[str, Any]]:
            values = zip(ranked[:, k], self.risks[ranked[:, k], k], self.share[ranked[:, k], k], strict=True)
            return [
                {"template_id": int(m), "entropy": float(risk), "pixel_percentage": float(share), "rank": place}
                for place, (m, risk, share) in enumerate(values, 1)
            ]

        classes = {name: {"entropy_ranking": rows(k)} for k, name in enumerate(self.classes)}
        head = {"model": self.host, "dataset": self.dataset, "split": self.split}
        write_json(path, {**head, "classes": classes, "meta": self.meta})

    def for_classes(self, classes: ClassList, where: str | Path = "ranking") -> "Ranking":
        """Returns the ranking with its columns in the order of a class list, such as that of another dataset.

        Names are matched as written, then as synonyms of the list's classes. Raises UserError for a class without a
        ranking.
        """
        places = {name: k for k, name in enumerate(self.classes)}
        for k, name in enumerate(self.classes):
            with contextlib.suppress(UserError):
                places.setdefault(classes.names[classes.index(name)], k)
        missing = [name for name in classes.names if name not in places]
        if missing:
            raise UserError(
                f"{where}: ranks other classes ({', '.join(self.classes[:3])}, ...) and lacks {len(missing)}: "
                f"{', '.join(missing[:3])}; rank these classes, or name their file"
            )
        columns = [places[name] for name in classes.names]
        return replace(self, classes=classes.names, risks=self.risks[:, columns], share=self.share[:, columns])


def read_ranking(path: str | Path, templates: Sequence[str] | None = None) -> Ranking:
    """Returns the ranking in a file of either form.

    Args:
        templates: those that the ids stand for; default "imagenet80", of which published files are.

    Raises UserError for a missing or broken file and for a ranking of other or reordered templates.
    """
    path, published = Path(path), known_templates()
    templates = published if templates is None else templates
    if not path.is_file():
        raise UserError(f"{path}: no such ranking file; name one with ranking.file=, or remove the key to rank images")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except (UnicodeDecodeError, json.JSONDecodeError) as fault:
        raise UserError(f"{path}: not JSON ({fault}); take the file as it was published or written") from None
    except KeyError as fault:
        raise UserError(f"{path}: class {fault} occurs twice; keep one of them") from None
    try:
        host, dataset, split = (str(content[key]) for key in ("model", "dataset", "split"))
        lists = {str(name): entry["entropy_ranking"] for name, entry in content["classes"].items()}
    except (KeyError, TypeError, AttributeError) as fault:
        raise UserError(f"{path}: no ranking file: {fault} is missing; see the form of published ones") from None
    if not lists:
        raise UserError(f"{path}: ranks no class; name another file")
    meta = dict(content.get("meta") or {})
    if meta.get("templates", template_hash(published)) != template_hash(templates):
        raise UserError(
            f"{path}: ranks other templates, or the same in another order; name the templates it was made from with "
            "templates=, or rank again"
        )
    count = len(templates)
    risks, share = np.zeros((2, count, len(lists)))
    for k, (name, rows) in enumerate(lists.items()):
        try:
            ids = [int(row["template_id"]) for row in rows]
            values = np.asarray([[row["entropy"], row["pixel_percentage"]] for row in rows], np.float64)
        except (KeyError, TypeError, ValueError) as fault:
            raise UserError(f"{path}: class '{name}': {fault} is missing or not a number; fix that entry") from None
        if sorted(ids) != list(range(count)):
            raise UserError(
                f"{path}: class '{name}' ranks {len(set(ids))} templates, not each of 0 to {count - 1} once; "
                "name the templates it was made from with templates="
            )
        if not (np.isfinite(values).all() and ((values[:, 1] >= 0) & (values[:, 1] <= 100)).all()):
            raise UserError(f"{path}: class '{name}' has a value out of range; fix that entry")
        risks[ids, k], share[ids, k] = values.T
    return Ranking(host, dataset, split, tuple(lists), risks, share, meta)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise KeyError(key)
    return dict(pairs)
