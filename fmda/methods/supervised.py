"""Supervised segmentation: a head on a frozen CLIP or DINO, trained on labelled images. Kind `supervised`."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fmda import trees
from fmda.atomic import write_json
from fmda.config import FREE, FolderOrName, NonNegativeInt, PositiveFloat, PositiveInt, Share, from_dict
from fmda.data import ClassList, Dataset
from fmda.data.check import check_images
from fmda.data.config import DataConfig
from fmda.data.streams import RareClasses, Shuffled, Stream, class_pixels
from fmda.data.transforms import training_transform
from fmda.errors import UserError
from fmda.evaluate import Predictor, Protocol, SegmentationEvaluator, Segmenter, evaluate_dataset, score_on_mesh
from fmda.evaluate.maps import common_list
from fmda.losses.pixelwise import cross_entropy
from fmda.mesh import make_mesh
from fmda.methods.dense import Encoder, init_head
from fmda.methods.export import export
from fmda.nn.resize import resize
from fmda.perf.flops import count_flops
from fmda.runs.plan import Plan
from fmda.runs.stages import Stage, pending
from fmda.train import Objective, OptimConfig, Outcome, Task, TrainerConfig, TrainState, run_task
from fmda.weights.files import read_arrays, write_safetensors
from fmda.weights.network import weight_fingerprint


@dataclass(frozen=True, kw_only=True)
class Config(TrainerConfig):
    """Data, encoder, head and schedule.

    Attributes:
        data: what is trained on; its class list is what is predicted.
        val: what is scored, during training every `evaluate_steps` steps and at the end.
        encoder: folder, name of a model of the package, or hub id of a CLIP or a DINO.
        hidden: channels of a 3x3 convolution before the linear layer; 0 leaves it out.
        resize: largest (long, short) side of an image; None keeps the size. Training multiplies it within `scale`.
        crop, stride: training crop and scoring window, and the step between windows, pixels.
        max_class_ratio, jitter: see `training_transform`.
        rare, rare_pixels: `temperature` and `least` of `RareClasses`; rare None shuffles.
    """

    data: DataConfig
    val: DataConfig
    encoder: FolderOrName = "street-clip"
    hidden: NonNegativeInt = 0
    resize: tuple[PositiveInt, PositiveInt] | None = None
    scale: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0)
    crop: PositiveInt = 512
    stride: PositiveInt = 341
    max_class_ratio: PositiveFloat = 0.75
    jitter: Share = 0.0
    rare: PositiveFloat | None = 0.01
    rare_pixels: NonNegativeInt = 3000
    steps: PositiveInt = 40000
    batch: PositiveInt = 8
    optim: OptimConfig = OptimConfig(learning_rate=1e-3, schedule="poly", warmup_steps=0, weight_decay=0.01)
    evaluate_steps: NonNegativeInt = field(default=1000, metadata=FREE)
    best: str | None = field(default="val/miou", metadata=FREE)

    @property
    def protocol(self) -> Protocol:
        """How images are scored."""
        maps = () if self.val.class_map is None else (str(self.val.class_map),)
        return Protocol(resize=self.resize, crop=self.crop, stride=self.stride, class_map=maps)


def make_objective(encoder: Encoder) -> Objective:
    """Returns the objective of the head: cross-entropy over labelled pixels, logits resized to the labels."""

    def objective(head: Any, state: TrainState, frozen: Any, batch: dict[str, Array], key: Any) -> Outcome:
        del state, key
        logits = encoder.scores({"encoder": frozen["encoder"], "head": head}, batch["image"])
        _, height, width = batch["labels"].shape
        loss, accuracy = cross_entropy(resize(logits, (height, width)), batch["labels"])
        return Outcome(loss, {"accuracy": accuracy}, {})

    return objective


def training_task(config: Config, encoder: Encoder, data: Dataset, val: Dataset) -> Task:
    """Returns the training task."""
    transform = training_transform(
        (config.crop, config.crop), resize=config.resize, scale=config.scale, max_class_ratio=config.max_class_ratio,
        jitter=config.jitter,
    )  # fmt: skip
    order = Shuffled() if config.rare is None else RareClasses(class_pixels(data), config.rare, config.rare_pixels)
    evaluator = SegmentationEvaluator("val", config.evaluate_steps, lambda state: score_on_mesh(
        encoder.scores, {"encoder": encoder.params, "head": state.params}, val, make_mesh(*config.mesh),
        config.protocol, classes=data.classes, limit=config.val.limit,
    ))  # fmt: skip
    return Task(
        name="supervised", objective=make_objective(encoder), init=_init(config, encoder, data), optim=config.optim,
        streams=Stream(data, transform, config.batch, order), frozen={"encoder": encoder.params},
        evaluators=[evaluator], facts={"encoder": encoder.fingerprint, "data": data.digest()},
    )  # fmt: skip


def _init(config: Config, encoder: Encoder, data: Dataset) -> Callable[[Any], trees.Tree]:
    return lambda key: init_head(key, encoder.width, config.hidden, len(data.classes.names))


def check(config: Config) -> None:
    """Raises UserError for data, class maps or an encoder that cannot work."""
    if not pending(config.encoder):
        Encoder(str(config.encoder))
    if not pending(config.data.root) and not pending(config.val.root):
        common_list(config.data.open().classes, config.val.open().classes, config.protocol.class_map)


def stages(config: Config) -> list[Stage]:
    """Returns train, export (`model.json`, which `Segmenter.load` opens) and score (`scores.json`, figures)."""
    return [
        Stage("train", functools.partial(_train, config), config),
        Stage("export", functools.partial(_export, config), config, inputs=("train",), alone=True),
        Stage("score", functools.partial(_score, config), config.val, inputs=("export",), alone=True),
    ]


def _train(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    data = config.data.open()
    check_images(data)
    task = training_task(config, Encoder(str(config.encoder)), data, config.val.open())
    return {"steps": int(run_task(task, config, folder).step)}


def _export(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    encoder, classes = Encoder(str(config.encoder)), config.data.open().classes

    def write(head: Any) -> None:
        write_safetensors(folder / "head.safetensors", trees.flatten(head))
        model = {"encoder": str(config.encoder), "fingerprint": encoder.fingerprint, "classes": classes.to_dict()}
        protocol = {"resize": config.resize, "crop": config.crop, "stride": config.stride}
        write_json(folder / "model.json", {"loader": f"{__name__}:load_segmenter", **model, "protocol": protocol})

    return export(config, folder, done["train"], write, which="params")


def load_segmenter(folder: Path) -> Segmenter:
    """Returns the trained segmenter. Raises UserError where the encoder is not the one that the head was trained on."""
    model = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    encoder = Encoder(model["encoder"])
    if encoder.fingerprint != model["fingerprint"]:
        raise UserError(f"{folder}: {model['encoder']} has other weights than the encoder of training; restore them")
    head = trees.unflatten(read_arrays(folder / "head.safetensors"))
    protocol = from_dict(Protocol, model["protocol"], str(folder / "model.json"))
    fingerprint = weight_fingerprint(head, encoder.fingerprint, protocol)
    predictor = Predictor(encoder.scores, {"encoder": encoder.params, "head": head}, protocol)
    return Segmenter(predictor, ClassList.from_dict(model["classes"], str(folder)), "supervised", fingerprint, protocol)


def _score(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    segmenter, val = load_segmenter(done["export"]), config.val
    return {"miou": evaluate_dataset(segmenter, val.open(), val.class_map, out=folder, limit=val.limit).miou}


def plan(config: Config) -> Plan:
    """Returns stages, parameters and FLOPs."""
    encoder, data = Encoder(str(config.encoder)), config.data.open()
    objective, head = make_objective(encoder), jax.eval_shape(_init(config, encoder, data), jax.random.key(0))
    labels = jax.ShapeDtypeStruct((1, config.crop, config.crop), jnp.uint8)
    batch = {"image": jax.ShapeDtypeStruct((*labels.shape, 3), jnp.uint8), "labels": labels}
    nothing: Any = None
    gradient = jax.grad(lambda head, frozen, batch: objective(head, nothing, frozen, batch, nothing).loss)
    return Plan(
        stages=tuple((stage.name, "") for stage in stages(config)),
        parameters=(("encoder, frozen", trees.count(encoder.params)), ("head", trees.count(head))),
        flops=(("one training crop", count_flops(gradient, head, {"encoder": encoder.params}, batch)),),
    )
