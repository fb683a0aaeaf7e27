"""The joint training of CLOUDS: source and generated images, labelled by a teacher and a SAM. Kind `clouds`.

Its warm-up is a run of kind `supervised` with `mask2former`.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from fmda.data import Dataset, read_image
from fmda.data.check import check_images
from fmda.data.dataset import Example
from fmda.data.loader import Batches
from fmda.data.transforms import training_transform
from fmda.diffusion.manifest import MANIFEST, Manifest
from fmda.errors import UserError
from fmda.evaluate import overlay
from fmda.evaluate.maps import common_list
from fmda.evaluate.overlay import in_row
from fmda.evaluate.sections import Section, write_sections
from fmda.methods import supervised
from fmda.methods.clouds.labelling import LabelledBatches, label_maps
from fmda.methods.clouds.objective import initial_aux, make_objective, teacher_decay
from fmda.methods.clouds.refinement import Refinement
from fmda.methods.clouds.settings import Config
from fmda.methods.clouds.streams import joint_stream
from fmda.methods.mask_head import MaskHeadConfig, MaskNetwork, names_read
from fmda.methods.refine_labels import figure, roles_of
from fmda.methods.supervised import (
    Model,
    blank_example,
    model_of_shapes,
    open_model,
    plan_of_unknown,
    write_model,
)
from fmda.methods.trainer import plan_without_sizes, trainer_plan, trainer_stages
from fmda.methods.tune import TunedNetwork, finished, starting, tuned
from fmda.methods.uda.run import check_crops
from fmda.png import write_png
from fmda.runs.plan import Plan
from fmda.runs.stages import Stage, pending
from fmda.sam import SamStage
from fmda.train import Task, read_params
from fmda.trees import Tree

TEACHER = "teacher"
"""Folder of the teacher in an export."""


def make_task(
    config: Config,
    model: Model,
    source: Sequence[Example],
    generated: Sequence[Example],
    stage: SamStage | None,
    **options: Any,
) -> Task:
    """Returns the task of the joint training; `options` are further attributes of the task.

    The embeddings of `stage` will lie in the run's folder.
    """
    network, reference = joint_network(config, model), config.mode == "reference"
    transform = training_transform(
        (config.crop, config.crop), resize=config.resize, scale=config.scale, max_class_ratio=1.0, diagonal=reference
    )

    def guide(batches: Batches, mesh: Mesh, folder: Path) -> LabelledBatches:
        refine = make_refinement(config, model, stage and stage.cached(folder / "embeddings")).labels
        return LabelledBatches(
            batches, generated, network, refine, folder / "labels", mesh,
            check_every=config.labels.check_every, confidence=config.labels.confidence, mirror_first=reference,
            ahead=config.labels.ahead, threads=config.labels.threads,
        )  # fmt: skip

    return Task(
        name="clouds",
        objective=make_objective(
            network, check_every=config.labels.check_every, moved=config.moved, hidden=config.hidden,
            patch=config.patch,
        ),
        init=network.init,
        optim=config.optim,
        streams=joint_stream(source, generated, transform, config.crop, config.batch, config.factor),
        frozen={"encoder": network.encoder.params},
        aux=initial_aux(jax.eval_shape(network.init, jax.random.key(0))),
        teacher_decay=teacher_decay(config.teacher.decay, config.teacher_every),
        teacher_when="before",
        weights=starting(network, model.head),
        guide=guide,
        **options,
    )  # fmt: skip


def joint_network(config: Config, model: Model) -> MaskNetwork | TunedNetwork:
    """Returns the network of a warm-up with the loss of the mode, and with what is trained of the encoder.

    Raises UserError as `joint_masks` and `TunedNetwork`.
    """
    return tuned(MaskNetwork(model.encoder, joint_masks(config, model), model.classes), config.tune)


def joint_masks(config: Config, model: Model) -> MaskHeadConfig:
    """Returns the decoders of a warm-up with the loss of the mode and with what classifies beside them.

    Raises UserError for a head of convolutions.
    """
    if (masks := model.masks) is None:
        raise UserError(f"start: {config.start} has a head of convolutions; train the warm-up with mask2former")
    ignore: Literal["negative", "excluded"] = "negative" if config.mode == "reference" else "excluded"
    return replace(masks, ignore=ignore, zero_shot=config.zero_shot or masks.zero_shot)


def open_generated(config: Config) -> Dataset:
    """Returns the generated images, those of earlier rounds included, under names that differ."""
    newest, *earlier = (images.open() for images in (config.generated, *config.earlier))
    items = [replace(item, name=f"{number}-{item.name}") for number, one in enumerate(earlier, 1) for item in one.items]
    return Dataset(newest.name, newest.split, newest.root, [*newest.items, *items], newest.classes)


def generator_of(root: Path | None) -> str | None:
    """Returns the fingerprint of the diffusion model that made a folder of images; None for other images.

    Raises UserError for images of several models.
    """
    if root is None or not (root / MANIFEST).is_file():
        return None
    made_by = sorted({str(image.facts.get("checkpoint")) for image in Manifest.read(root).images})
    if len(made_by) > 1:
        raise UserError(f"{root}: its images are of {len(made_by)} checkpoints; generate a set with one of them")
    return made_by[0] if made_by else None


def check(config: Config) -> None:
    """Raises UserError for a warm-up, images, class maps or a SAM that cannot work."""
    if config.crop % 32:
        raise UserError(f"crop: {config.crop} is not a multiple of 32, the stride of the last map; choose one")
    if not pending(config.labels.sam):
        open_stage(config)
    for images in (config.generated, *config.earlier):
        if not pending(images.root):
            check_crops(images.open(), None, config.crop, "lower crop or generate larger images")
            generator_of(images.root)
    if pending(config.start) or pending(config.data.root) or pending(config.val.root):
        return
    data, model = config.data.open(), open_model(Path(config.start))
    joint_network(config, model)
    names_read(model.encoder, joint_masks(config, model), model.classes)
    if data.classes.names != model.classes.names:
        raise UserError(f"data: has {data.classes!r}, and the warm-up {model.classes!r}; name the data of the warm-up")
    common_list(data.classes, config.val.open().classes, config.protocol.class_map)


def stages(config: Config) -> list[Stage]:
    """Returns train, export (`model.json`, which `Segmenter.load` opens), score, and labels (figures)."""
    made = trainer_stages(
        config, lambda _: _task(config), _write, exported=config, which="params", check=supervised.score,
        checked=config.val, check_name="score",
    )  # fmt: skip
    return [*made, Stage("labels", partial(_labels, config), config, ("train",), renew=True, alone=True)]


def plan(config: Config) -> Plan:
    """Returns parameters, FLOPs and memory, where warm-up and data are on this machine."""
    steps = stages(config)
    if without := plan_without_sizes(steps, start=config.start, **{"data.root": config.data.root}):
        return without
    return _plan(config, open_model(Path(config.start)))


def plan_after(config: Config, warm_up: supervised.Config) -> Plan:
    """Returns the plan where the warm-up is an earlier run of the same pipeline, not made yet."""
    return plan_of_unknown(warm_up, stages(config)) or _plan(config, model_of_shapes(warm_up))


def _plan(config: Config, model: Model) -> Plan:
    blank = [blank_example(config.crop)]
    task = make_task(config, model, blank, blank, None)
    return trainer_plan(config, task, stages(config), parts=() if config.tune is None else ("encoder",), example="crop")


def open_stage(config: Config, cache: Path | None = None) -> SamStage | None:
    """Returns the SAM, its embeddings in `cache`; None without one."""
    labels = config.labels
    return None if labels.sam is None else SamStage(labels.sam, cache, labels.cache_bytes, labels.threads)


def make_refinement(config: Config, model: Model, stage: SamStage | None) -> Refinement:
    """Returns what refines label maps."""
    labels = config.labels
    settings = None if config.mode == "reference" else labels.votes
    return Refinement(stage, roles_of(model.classes, labels.things, labels.kept), settings)


def _task(config: Config) -> Task:
    model, data, val = open_model(Path(config.start)), config.data.open(), config.val.open()
    generated = open_generated(config)
    for images in (data, generated):
        check_images(images)
    stage = open_stage(config)
    where = (config, joint_network(config, model), val, data.classes)
    evaluators = [
        supervised.evaluator("val", config.evaluate_steps, "params", *where),
        supervised.evaluator("teacher", 0, "teacher", *where),
    ]
    facts = {
        "warm-up": model.fingerprint(),
        "data": data.digest(),
        "generated": generated.digest(labels=False),
        "generator": generator_of(config.generated.root),
        **({"earlier": [generator_of(one.root) for one in config.earlier]} if config.earlier else {}),
        "sam": stage and stage.fingerprint,
        **names_read(model.encoder, joint_masks(config, model), model.classes),
    }
    return make_task(config, model, data, generated, stage, evaluators=evaluators, facts=facts)


def _write(config: Config, folder: Path, done: dict[str, Path], trained: Tree) -> None:
    """Writes the student and, in `teacher`, the last teacher."""
    model = open_model(Path(config.start))
    network = joint_network(config, model)
    teacher = jax.device_get(read_params(done["train"], "teacher"))
    for place, params in ((folder, trained), (folder / TEACHER, teacher)):
        head, encoder = finished(network, params)
        place.mkdir(exist_ok=True)
        write_model(
            place, head, encoder=encoder, classes=model.classes, masks=joint_masks(config, model),
            protocol=config.protocol, method="clouds",
        )  # fmt: skip


def _labels(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    """Writes figures of generated images as the last teacher labels them."""
    model, images = open_model(Path(config.start)), open_generated(config)
    network = joint_network(config, model)
    params = {"encoder": network.encoder.params, "head": read_params(done["train"], "teacher")}
    predict = label_maps(network, config.labels.confidence)
    refinement = make_refinement(config, model, open_stage(config, done["train"] / "embeddings"))
    sections = []
    for place in np.linspace(0, len(images) - 1, min(config.figures, len(images))).round().astype(int):
        item = images.items[place]
        image = read_image(item.image)
        label_map = predict(params, image)
        result = refinement.refined(image, label_map)
        if result is None:
            shown = in_row({"image": image, "map": overlay(image, label_map, model.classes, 0.8)})
            text = "image, map of the teacher"
        else:
            shown = figure(image, label_map, result, model.classes)
            text = "image, map of the teacher, prompts, masks (grey: refused), refined map"
        write_png(folder / f"{place:06}.png", shown)
        sections.append(Section(f"generated: {item.name}", text, image=f"{place:06}.png"))
    write_sections(folder, sections)
    return {"figures": len(sections)}
