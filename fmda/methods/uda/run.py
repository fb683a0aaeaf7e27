"""Adaptation of a segmentation network to a domain without labels. Kind `uda`; without a target, source only."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fmda import trees
from fmda.atomic import write_json
from fmda.config import FREE, NonNegativeInt, PositiveFloat, PositiveInt, from_dict, to_dict
from fmda.data import Dataset
from fmda.data.check import check_images
from fmda.data.config import DataConfig, ImagesConfig
from fmda.data.dataset import Example
from fmda.data.files import image_size
from fmda.data.streams import Order, Shuffled, Stream
from fmda.data.transforms import fit_size, training_transform
from fmda.errors import UserError
from fmda.evaluate import (
    DeadClasses,
    LabelFree,
    Protocol,
    Scores,
    SegmentationEvaluator,
    Segmenter,
    evaluate_dataset,
    label_free_scores,
    score_on_mesh,
)
from fmda.evaluate.maps import common_list
from fmda.mesh import make_mesh
from fmda.methods import segmentation
from fmda.methods.planning import Training
from fmda.methods.resident import with_resident_data
from fmda.methods.sampling import source_order
from fmda.methods.trainer import plan_without_sizes, trainer_plan, trainer_stages
from fmda.methods.uda.adversary import without_adversary
from fmda.methods.uda.network import NETWORK, PACKAGED, Network, NetworkConfig, known_encoder
from fmda.methods.uda.objective import LearnConfig, init_adversary, make_objective
from fmda.methods.uda.output_adversarial import LEAST_CROP
from fmda.methods.uda.self_training import Optimizer, initial_aux, teacher_decay
from fmda.methods.uda.style import open_autoencoder
from fmda.runs.plan import Plan
from fmda.runs.stages import Stage, pending
from fmda.train import Evaluator, Task, TrainerConfig, TrainState, best_step, read_params
from fmda.trees import Tree
from fmda.weights.checkpoint import weight_fingerprint
from fmda.weights.files import read_json
from fmda.weights.network import CLASSES_FILE, Loaded, save
from fmda.weights.registry import FAMILIES

SHUFFLED = Shuffled()


@dataclass(frozen=True, kw_only=True)
class TargetConfig(ImagesConfig):
    """Images of the target domain; one alone, named by `only`, is the one-shot setting.

    Attributes:
        labels: read the labels that lie beside the images, such as pseudo-labels; they are of the source's classes.
        resize: largest (long, short) side of an image; None keeps the size.
    """

    labels: bool = False
    resize: tuple[PositiveInt, PositiveInt] | None = None


@dataclass(frozen=True, kw_only=True)
class Config(TrainerConfig):
    """Data, network and schedule; the defaults are DAFormer's.

    Attributes:
        data: the labelled source; its class list is what is predicted.
        target: None trains on the source alone.
        val: what is scored, during training every `evaluate_steps` steps and at the end.
        network: what is trained.
        learn: what is learned beside the labels of the source.
        resize: largest (long, short) side of a source image; None keeps the size.
        crop: side of a training crop, pixels.
        protocol: how images are scored; the class map is that of `val`.
        max_class_ratio: see `training_transform`.
        rare, rare_pixels, rare_crop: `temperature`, `least` and `least_in_crop` of `RareClasses`; rare None shuffles.
        batch: source images of a step; as many are of the target.
        label_free_images: images of the target that are scored without labels, as `val` is with them.
        examples_of: the folder of another run's score of the same images (`RUN/score`); the images that it shows are
            shown here too. None shows the worst and the best of this run.
    """

    data: DataConfig
    target: TargetConfig | None = None
    val: DataConfig
    network: NetworkConfig = NetworkConfig()
    learn: LearnConfig = LearnConfig()
    resize: tuple[PositiveInt, PositiveInt] | None = None
    crop: PositiveInt = 512
    protocol: Protocol = Protocol()
    max_class_ratio: PositiveFloat = 0.75
    rare: PositiveFloat | None = 0.01
    rare_pixels: NonNegativeInt = 3000
    rare_crop: NonNegativeInt = 1500
    steps: PositiveInt = 40000
    batch: PositiveInt = 2
    optim: Optimizer = Optimizer()
    evaluate_steps: NonNegativeInt = field(default=2000, metadata=FREE)
    label_free_images: PositiveInt = field(default=50, metadata=FREE)
    examples_of: Path | None = field(default=None, metadata=FREE)

    @property
    def scoring(self) -> Protocol:
        """How images are scored, with the class map."""
        return replace(self.protocol, class_map=() if self.val.class_map is None else (str(self.val.class_map),))


def make_task(
    config: Config,
    network: Network,
    source: Sequence[Example],
    target: Sequence[Example] | None,
    order: Order = SHUFFLED,
    autoencoder: Loaded | None = None,
    **options: Any,
) -> Task:
    """Returns the task of training the network; `options` are further attributes of the task.

    `autoencoder` is that of a style in latents.
    """
    crop, learn = (config.crop, config.crop), config.learn
    transform = training_transform(crop, resize=config.resize, max_class_ratio=config.max_class_ratio)
    streams = {"source": Stream(source, transform, config.batch, order)}
    if target is not None and config.target is not None:
        margins = learn.self_training is not None and any(learn.self_training.border)
        transform = training_transform(crop, resize=config.target.resize, margins=margins)
        streams["target"] = Stream(target, transform, config.batch)
    classes, channels = network.config.classes, network.channels(config.crop)
    frozen = {"encoder": network.frozen_encoder(learn.distance.encoder)} if learn.distance else {}
    graphdef = None
    if autoencoder is not None:
        frozen["autoencoder"], graphdef = autoencoder.params, autoencoder.graphdef

    def init(key: Any) -> Tree:
        return network.init(key) | init_adversary(learn, jax.random.fold_in(key, 1), channels, classes)

    return Task(
        name="uda",
        objective=make_objective(network.graphdef, classes, learn, steps=config.steps, autoencoder=graphdef),
        init=init,
        optim=config.optim,
        streams=streams,
        frozen=frozen,
        aux=initial_aux(network.statistics(), classes),
        weights=network.parts(network.weights)[0],
        teacher_decay=teacher_decay(learn.self_training.decay) if learn.self_training and target else None,
        teacher_when="before",
        **options,
    )


def check(config: Config) -> None:
    """Raises UserError for data, class maps, a target, a network or terms that cannot work."""
    learn = config.learn
    if learn.of_target and not config.target:
        raise UserError(
            f"learn.{learn.of_target[0]}: needs images of the target; name a target, or set this term to null"
        )
    if learn.output_adversarial and config.crop < LEAST_CROP:
        raise UserError(f"crop: {config.crop} is below {LEAST_CROP}, the least that learn.output_adversarial takes")
    if learn.style and not pending(learn.style.autoencoder):
        open_autoencoder(learn.style, config.crop)
    sources = [config.data.root, config.val.root, config.network.encoder, config.network.start]
    sources += [config.target.root] if config.target else []
    sources += [learn.distance.encoder] if learn.distance else []
    if any(pending(source) for source in sources):
        return
    data = config.data.open()
    common_list(data.classes, config.val.open().classes, config.scoring.class_map)
    if config.target:
        target = config.target.open(labels=config.target.labels)
        check_crops(target, config.target.resize, config.crop)
        if config.target.labels and target.classes.names != data.classes.names:
            raise UserError(f"target: its labels are of {target.classes!r}, those of the source of {data.classes!r}")
    network = Network(config.network, len(data.classes.names))
    if learn.distance:
        network.frozen_encoder(learn.distance.encoder)
    multiple = FAMILIES[network.family].multiple
    for name, side in (("crop", config.crop), ("protocol.crop", config.protocol.crop)):
        if side % multiple:
            raise UserError(f"{name}: {side} is no multiple of {multiple}, which '{network.family}' needs")


def check_crops(
    images: Dataset,
    resize: tuple[int, int] | None,
    crop: int,
    remedy: str = "lower crop or enlarge the images by target.resize",
) -> None:
    """Raises UserError where an image, resized, holds no crop: what is filled up would get pseudo-labels too.

    `remedy` is the end of the message.
    """
    for item in images.items:
        width, height = image_size(item.image)
        size = fit_size(height, width, max(resize), min(resize)) if resize else (height, width)
        if min(size) < crop:
            raise UserError(f"{item.image}: has {size[1]}x{size[0]} pixels, less than a crop of {crop}; {remedy}")


def stages(config: Config) -> list[Stage]:
    """Returns train, export (the network, and `model.json`, which `Segmenter.load` opens) and score."""
    return trainer_stages(
        config, lambda _: _task(config), _write, exported=config, which="params", check=_score, checked=config.val,
        check_name="score",
    )  # fmt: skip


def plan(config: Config) -> Plan:
    """Returns parameters, FLOPs and memory, where the sizes of networks and the classes are known."""
    without = _plan_without_sizes(config)
    if without:
        return without
    task = _blank_task(config)
    parts = tuple(jax.eval_shape(task.init, jax.random.key(0)))
    return trainer_plan(config, task, stages(config), parts=parts, example="crop")


def flops(config: Config) -> float | None:
    """Returns the FLOPs of the training; None where sizes of networks or classes are not known."""
    if _plan_without_sizes(config):
        return None
    return Training.of(_blank_task(config), config.steps).flops(1) * config.batch * config.steps


def _plan_without_sizes(config: Config) -> Plan | None:
    network, style, distance = config.network, config.learn.style, config.learn.distance
    frozen = distance.encoder if distance and distance.encoder != PACKAGED else None
    return plan_without_sizes(
        stages(config),
        **{
            "network.encoder": None if known_encoder(network.encoder) else network.encoder,
            "network.start": network.start,
            "data.root": None if config.data.known_classes() else config.data.root,
            "learn.distance.encoder": None if known_encoder(frozen) else frozen,
            "learn.style.autoencoder": style.autoencoder if style else None,
        },
    )


def _blank_task(config: Config) -> Task:
    """Returns the task on one blank image."""
    side = config.crop
    blank = Example(np.zeros((side, side, 3), np.uint8), np.zeros((side, side), np.uint8), "")
    image = Example(blank.image, blank.labels if config.target and config.target.labels else None, "")
    classes = config.data.known_classes() or config.data.open().classes
    return make_task(
        config, Network(config.network, len(classes.names), sizes=True), [blank], [image] if config.target else None,
        autoencoder=open_autoencoder(config.learn.style, side),
    )  # fmt: skip


def _task(config: Config) -> Task:
    data, val = config.data.open(), config.val.open()
    target = config.target.open(labels=config.target.labels) if config.target else None
    if target:
        check_images(target)
    network = Network(config.network, len(data.classes.names))
    order = source_order(data, config.rare, config.rare_pixels, config.rare_crop)
    mesh, limit = make_mesh(*config.mesh), config.val.limit
    protocol = segmentation.fitting(config.scoring, network.family)

    def whole(state: TrainState, params: Tree | None = None) -> Tree:
        return trees.joined(without_adversary(params or state.params), state.aux["statistics"])

    def score(state: TrainState) -> Scores:
        return score_on_mesh(network.scores, whole(state), val, mesh, protocol, classes=data.classes, limit=limit)

    evaluators: list[Evaluator] = [SegmentationEvaluator("val", config.evaluate_steps, score)]
    if target:
        without_labels = partial(
            label_free_scores, network.scores, dataset=target, mesh=mesh, protocol=protocol, classes=data.classes,
            limit=config.label_free_images,
        )  # fmt: skip

        def score_target(state: TrainState) -> LabelFree:
            return without_labels(whole(state), teacher=whole(state, state.teacher) if state.teacher else None)

        evaluators.append(SegmentationEvaluator("target", config.evaluate_steps, score_target))
        if config.learn.self_training:
            names = data.classes.names
            evaluators.append(DeadClasses("teacher", config.evaluate_steps, names, lambda state: state.aux["shares"]))
    facts = {"network": network.fingerprint, "data": data.digest()}
    facts |= {"target": target.digest()} if target else {}
    autoencoder = open_autoencoder(config.learn.style, config.crop)
    if autoencoder is not None:
        facts["autoencoder"] = autoencoder.fingerprint
    task = make_task(config, network, data, target, order, autoencoder=autoencoder, evaluators=evaluators, facts=facts)
    if config.learn.distance and config.learn.distance.encoder:
        task = replace(task, facts=facts | {"distance": weight_fingerprint(task.frozen["encoder"])})
    return with_resident_data(task) if config.data.resident == "auto" else task


def _write(config: Config, folder: Path, done: dict[str, Path], params: Tree) -> None:
    classes = config.data.open().classes
    network = Network(config.network, len(classes.names))
    step = None if config.best is None else best_step(done["train"], config.best, config.best_mode)
    statistics = read_params(done["train"], "aux", step=step)["statistics"]
    save(network.family, folder / NETWORK, network.config, trees.joined(without_adversary(params), statistics))
    classes.save(folder / NETWORK / CLASSES_FILE)
    write_json(folder / "model.json", {"loader": f"{__name__}:load_segmenter", "protocol": to_dict(config.protocol)})


def load_segmenter(folder: Path) -> Segmenter:
    """Returns the segmenter of a run's export."""
    model = read_json(folder / "model.json")
    return segmentation.load_segmenter(
        folder / NETWORK, from_dict(Protocol, model["protocol"], str(folder / "model.json"))
    )


def _score(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    segmenter, val = load_segmenter(done["export"]), config.val
    scores = evaluate_dataset(
        segmenter, val.open(), val.class_map, out=folder, limit=val.limit, examples_of=config.examples_of
    )
    return {"miou": scores.miou}
