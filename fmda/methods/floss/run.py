"""The stages of a FLOSS run: rank -> score -> report. Kind `floss` in a configuration."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fmda.atomic import write_json
from fmda.config import fingerprint, to_dict
from fmda.data import ClassMap, class_list
from fmda.evaluate import Segmenter, evaluate_dataset
from fmda.evaluate.sections import Section, Table, write_sections
from fmda.methods.class_text import template_hash
from fmda.methods.floss import criteria
from fmda.methods.floss.check import check
from fmda.methods.floss.inputs import compared_images, predicted_classes, unlabelled_images
from fmda.methods.floss.label_maps import LabelMaps, segmenter
from fmda.methods.floss.model import Chosen, Floss
from fmda.methods.floss.model_file import read_model, write_model
from fmda.methods.floss.rankings import Ranking, read_ranking
from fmda.methods.floss.selection import choose_n, select
from fmda.methods.floss.settings import Config
from fmda.methods.floss.summary import plan
from fmda.methods.floss.tally import Tally
from fmda.runs.stages import Stage, pending

__all__ = ["Config", "check", "load_segmenter", "plan", "stages"]


def stages(config: Config) -> list[Stage]:
    """Returns the stages of a run.

    rank: `ranking.json`, `experts.json`, `model.json`, which `Segmenter.load` opens, and `tally.npz`, the resumable
    sums. score, where labelled data are named: `scores.json` and figures of the host in `host`, of FLOSS in `floss`,
    and, if configured, the label-free criteria against true IoU in `criteria`. page: `report.html` in the run folder.
    """

    @functools.cache
    def model() -> Floss:
        # the stages of one process share the weights
        return Floss(config, predicted_classes(config))

    facts = {"config": config, "files": _contents(config)}
    images = config.ranking.file is None or config.n == "auto"
    ranked = unlabelled_images(config).digest(labels=False) if images and not pending(config.ranked.root) else None
    made = [Stage("rank", lambda folder, done: _rank(config, folder, model), facts | {"images": ranked})]
    if config.data is not None:

        def score(folder: Path, done: dict[str, Path]) -> dict[str, Any]:
            return _score(config, folder.parent, read_model(done["rank"], model()))

        scored = None if pending(config.data.root) else config.data.open().digest()
        made.append(Stage("score", score, facts | {"images": scored}, ("rank",), alone=True))

    def page(folder: Path, done: dict[str, Path]) -> dict[str, Any]:
        from fmda.evaluate.report import report

        return {"page": str(report([folder.parent], folder.parent / "report.html"))}

    return [*made, Stage("page", page, config, tuple(s.name for s in made), always=True, alone=True)]


def load_segmenter(folder: Path) -> Segmenter:
    """Returns the segmenter that `model.json` in a folder describes."""
    return segmenter(*read_model(folder))


def _rank(config: Config, folder: Path, load: Callable[[], Floss]) -> dict[str, Any]:
    model = load()
    if config.ranking.file is not None:
        ranking = read_ranking(config.ranking.file, model.templates).for_classes(model.classes, config.ranking.file)
    else:
        ranking = _ranking(config, model, model.rank(unlabelled_images(config), folder / "tally.npz"))
    ranking.save(folder / "ranking.json")
    n, consistency = config.n, {}
    if n == "auto":
        images = unlabelled_images(config)
        images = images.subset(range(0, len(images), max(1, len(images) // config.n_images)))[: config.n_images]
        candidates = {n: select(ranking.risks, ranking.share, n, config.guards) for n in config.n_candidates}
        consistency = model.flip_consistency(images, candidates)
        n = choose_n(consistency)
    chosen = select(ranking.risks, ranking.share, n, config.guards)
    write_json(folder / "experts.json", {"n": n, "consistency": consistency, "chosen": [list(c) for c in chosen]})
    write_model(folder, model, chosen)
    _write_experts(config, folder, ranking, chosen, model.templates)
    return {"n": n, "images": ranking.meta.get("images"), "classes_without_expert": sum(not c for c in chosen)}


def _ranking(config: Config, model: Floss, tally: Tally) -> Ranking:
    meta = {
        "criterion": config.ranking.criterion,
        "weights": model.weights,
        "templates": template_hash(model.templates),
        "names": list(model.queries.names),
        "resolution": config.ranking.resolution,
        "images": tally.images,
        "pixels": tally.pixels,
        "seed": config.unlabelled.seed,
        "host": to_dict(model.host),
    }
    risks = criteria.CRITERIA[config.ranking.criterion](tally)
    split = config.unlabelled.split or "train"
    return Ranking(model.host.name, str(config.ranked.name), split, model.classes.names, risks, tally.share, meta)


def _write_experts(config: Config, folder: Path, ranking: Ranking, chosen: Chosen, templates: Sequence[str]) -> None:
    def row(name: str, ids: tuple[int, ...], risks: Any) -> tuple[str | None, ...]:
        if not ids:
            return name, None, "all", None
        return name, f"{risks[ids[0]]:.4f}", ", ".join(map(str, ids)), templates[ids[0]]

    rows = tuple(map(row, ranking.classes, chosen, ranking.risks.T))
    columns = ("class", f"{config.ranking.criterion} of the first", "template ids", "first template")
    text = "The templates that make up each class's expert, chosen on unlabelled images."
    write_sections(folder, [Section("Experts", text, Table(columns, rows))])


def _score(config: Config, work: Path, opened: tuple[Floss, Chosen]) -> dict[str, Any]:
    assert config.data is not None
    model, chosen = opened
    maps = LabelMaps(model, chosen)
    outputs: dict[str, Any] = {}
    if config.compare_criteria:
        outputs["criteria"] = _compare(config, work / "criteria", model, maps)
    dataset = config.data.open()
    for name, member in (("host", maps.host), ("floss", maps.fused)):
        scores = evaluate_dataset(
            member, dataset, config.data.class_map, out=work / name, limit=config.data.limit,
            examples_of=work / "host" if name == "floss" else None,
        )  # fmt: skip
        outputs[name] = {"miou": scores.miou, "accuracy": scores.accuracy}
    return outputs


def _compare(config: Config, folder: Path, model: Floss, maps: LabelMaps) -> dict[str, Any]:
    """Compares the label-free criteria with the true IoU of each template; labels enter no criterion."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset = compared_images(config, model.classes)
    tally = model.rank(dataset, folder / "tally.npz", labels=True, each=maps.add, over_processes=False)
    n = 4 if config.n == "auto" else config.n
    rows = criteria.comparison(tally, n)
    write_json(folder / "criteria.json", rows)
    columns = tuple(rows[0])
    cells = tuple(tuple(v if isinstance(v, str) else f"{v:.3f}" for v in row.values()) for row in rows)
    text = (
        "Label-free criteria against the true IoU of each template, mean over classes. `correlation` is Spearman's; "
        f"`chosen_iou` the IoU (per cent) of the {n} templates that a criterion chooses, each alone; `any_iou` that of "
        "all, `best_iou` that of the best."
    )
    write_sections(folder, [Section("Criteria without labels", text, Table(columns, cells))])
    return {"best": rows[0]["criterion"], "correlation": rows[0]["correlation"]}


def _contents(config: Config) -> dict[str, str | None]:
    """Returns what files that a configuration names hold: they may change under their name."""
    data, ranking = config.data, config.ranking.file
    return {
        "templates": template_hash(config.template_list()),
        "classes": fingerprint(class_list(config.classes).to_dict()) if config.classes else None,
        "class_map": fingerprint(ClassMap.load(data.class_map).table.tolist()) if data and data.class_map else None,
        "ranking": hashlib.sha256(ranking.read_bytes()).hexdigest() if ranking and ranking.is_file() else None,
    }
