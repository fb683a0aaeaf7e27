"""The stages of a FLOSS run: rank -> host -> floss (-> criteria) -> report. Kind `floss` in a configuration."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from fmda.atomic import write_atomic
from fmda.config import from_dict, to_dict
from fmda.data import ClassList, ClassMap, Dataset, known_class_maps
from fmda.errors import UserError
from fmda.evaluate import Protocol, Segmenter, evaluate_dataset
from fmda.evaluate.sections import Section, Table, write_sections
from fmda.methods.floss import criteria
from fmda.methods.floss.model import Chosen, Floss, scored_images, unlabelled_images
from fmda.methods.floss.rankings import Ranking, read_ranking
from fmda.methods.floss.selection import choose_n, flip_consistency, select
from fmda.methods.floss.settings import Config
from fmda.methods.floss.summary import plan
from fmda.methods.floss.tally import Tally
from fmda.methods.floss.text import template_hash
from fmda.runs.stages import Stage

__all__ = ["Config", "load_segmenter", "plan", "stages"]

LOADER = "fmda.methods.floss.run:load_segmenter"


def stages(config: Config) -> list[Stage]:
    """Returns the stages of a run.

    rank: `ranking.json`, `experts.json` (and `tally.npz`, the resumable sums). host, floss: `scores.json` and figures;
    floss also `model.json`, which `Segmenter.load` opens. criteria (if asked for): the label-free criteria against true
    IoU. page: `report.html` in the run folder.
    """
    found = [
        Stage("rank", lambda folder, done: _rank(config, folder), config),
        Stage("host", lambda folder, done: _score(config, folder, None), config, alone=True),
        Stage("floss", lambda folder, done: _score(config, folder, done["rank"]), config, ("rank",), alone=True),
    ]
    if config.compare_criteria:
        found.append(Stage("criteria", lambda folder, done: _compare(config, folder), config))

    def page(folder: Path, done: dict[str, Path]) -> dict[str, Any]:
        from fmda.evaluate.report import report

        return {"page": str(report([folder.parent], folder.parent / "report.html"))}

    return [*found, Stage("page", page, config, tuple(s.name for s in found), always=True, alone=True)]


def load_segmenter(folder: Path) -> Segmenter:
    """Returns the segmenter that `model.json` in a run's folder describes."""
    path = Path(folder) / "model.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config = from_dict(Config, content["config"], str(path))
        classes = ClassList.from_dict(content["classes"], str(path))
        chosen = tuple(tuple(int(i) for i in ids) for ids in content["chosen"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as fault:
        raise UserError(f"{path}: no description of a FLOSS model ({fault}); run the method again") from None
    return segmenter(Floss.load(config, classes), chosen)


def segmenter(model: Floss, chosen: Chosen | None) -> Segmenter:
    """Returns FLOSS with these experts as a segmenter, or its host alone for None."""
    host, mark = model.host, model.identity(chosen)
    protocol = Protocol((host.long_max, host.short_max), host.crop, host.stride)
    if chosen is None:
        return Segmenter(model.predict_host, model.classes, host.name, mark, protocol)
    classifiers = model.classifiers(chosen)
    forward = partial(model.predict, classifiers=classifiers)
    return Segmenter(forward, model.classes, f"{host.name} + FLOSS", mark, protocol)


def predicted_classes(config: Config) -> ClassList:
    """Returns the classes a run predicts: the configured list, else that of the scored images."""
    return config.class_list(None if config.classes is not None else scored_images(config).classes)


def _rank(config: Config, folder: Path) -> dict[str, Any]:
    classes = predicted_classes(config)
    model: Floss | None = None
    if config.ranking.file is not None:
        ranking = read_ranking(config.ranking.file, len(config.template_list()))
        ranking = ranking.for_classes(classes, config.ranking.file)
    else:
        model = Floss.load(config, classes)
        tally = model.rank(unlabelled_images(config), folder / "tally.npz")
        ranking = _ranking(config, model, tally)
    ranking.save(folder / "ranking.json")
    n, consistency = config.n, {}
    if n == "auto":
        model = model or Floss.load(config, classes)
        images = unlabelled_images(config)
        images = images.subset(range(0, len(images), max(1, len(images) // config.n_images)))[: config.n_images]
        for candidate in config.n_candidates:
            chosen = select(ranking.risks, ranking.share, candidate, config.guards)
            consistency[candidate] = flip_consistency(model.flip_counts(images, chosen))
        n = choose_n(consistency)
    chosen = select(ranking.risks, ranking.share, n, config.guards)
    experts = {"n": n, "consistency": consistency, "chosen": [list(c) for c in chosen]}
    write_atomic(folder / "experts.json", json.dumps(experts, indent=1) + "\n")
    _write_experts(config, folder, ranking, chosen)
    return {"n": n, "images": ranking.meta.get("images"), "classes_without_expert": sum(not c for c in chosen)}


def _ranking(config: Config, model: Floss, tally: Tally) -> Ranking:
    part = config.unlabelled
    meta = {
        "criterion": config.ranking.criterion,
        "clip": config.clip,
        "weights": model.fingerprint,
        "templates": template_hash(model.templates),
        "names": list(model.queries.names),
        "resolution": config.ranking.resolution,
        "images": tally.images,
        "pixels": tally.pixels,
        "seed": part.seed,
        "host": to_dict(model.host),
    }
    risks = criteria.risk(config.ranking.criterion, tally)
    data = part.name or config.data.name
    return Ranking(model.host.name, data, part.split, model.classes.names, risks, tally.share, meta)


def _write_experts(config: Config, folder: Path, ranking: Ranking, chosen: Chosen) -> None:
    templates = config.template_list()
    rows = tuple(
        (name, f"{ranking.risks[ids[0], k]:.4f}", ", ".join(map(str, ids)), templates[ids[0]])
        if ids
        else (name, None, "all", None)
        for k, (name, ids) in enumerate(zip(ranking.classes, chosen, strict=True))
    )
    columns = ("class", f"{config.ranking.criterion} of the first", "template ids", "first template")
    text = "The templates that make up each class's expert, chosen on unlabelled images."
    write_sections(folder, [Section("Experts", text, Table(columns, rows))])


def _score(config: Config, folder: Path, ranked: Path | None) -> dict[str, Any]:
    dataset, classes = scored_images(config), predicted_classes(config)
    model = Floss.load(config, classes)
    chosen: Chosen | None = None
    if ranked is not None:
        experts = json.loads((ranked / "experts.json").read_text(encoding="utf-8"))
        chosen = tuple(tuple(ids) for ids in experts["chosen"])
        described = {
            "loader": LOADER,
            "config": to_dict(config),
            "classes": classes.to_dict(),
            "chosen": [list(ids) for ids in chosen],
        }
        write_atomic(folder / "model.json", json.dumps(described, indent=1) + "\n")
    scores = evaluate_dataset(
        segmenter(model, chosen), dataset, config.data.class_map, out=folder, limit=config.data.limit
    )
    return {"miou": scores.miou, "accuracy": scores.accuracy}


def _compare(config: Config, folder: Path) -> dict[str, Any]:
    """Scores the label-free criteria: looks at the labelled images with all templates, criteria blind to the labels."""
    classes, dataset = predicted_classes(config), scored_images(config)
    dataset = _relabelled(dataset, config, classes)
    if config.data.limit is not None:
        dataset = dataset[: config.data.limit]
    model = Floss.load(config, classes)
    tally = model.rank(dataset, folder / "tally.npz", labels=True)
    n = 4 if config.n == "auto" else config.n
    rows = criteria.comparison(tally, n)
    write_atomic(folder / "criteria.json", json.dumps(rows, indent=1) + "\n")
    columns = tuple(rows[0])
    cells = tuple(tuple(v if isinstance(v, str) else f"{v:.3f}" for v in row.values()) for row in rows)
    text = (
        "Label-free criteria against the true IoU of each template, mean over classes. `correlation` is Spearman's; "
        f"`chosen_iou` the IoU (per cent) of the {n} templates a criterion chooses, each alone; `any_iou` that of all, "
        "`best_iou` that of the best."
    )
    write_sections(folder, [Section("Criteria without labels", text, Table(columns, cells))])
    return {"best": rows[0]["criterion"], "correlation": rows[0]["correlation"]}


def _relabelled(dataset: Dataset, config: Config, classes: ClassList) -> Dataset:
    """Returns the images with labels in the predicted classes: by the configured map, or a known one between the lists.

    A map that merges predictions does not say which of the merged classes a label means; another one may.
    """
    if dataset.classes.names == classes.names:
        return dataset
    names = [config.data.class_map, f"{config.data.name}-to-{config.classes}"]
    for name in names:
        if name is None or (name == names[1] and name not in known_class_maps()):
            continue
        onward = ClassMap.load(name)
        if onward.source.names == dataset.classes.names and onward.target.names == classes.names:
            return dataset.mapped(onward)
    raise UserError(
        f"compare_criteria: no class map leads from the labels of {dataset.name} to the {len(classes)} predicted "
        "classes; set data.class_map or classes"
    )
