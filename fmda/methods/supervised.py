"""Supervised segmentation: a head on a CLIP, DINO or DINOv2, trained on labelled images. Kind `supervised`.

The head is a convolution, or Mask2Former's decoders. The encoder is frozen, or trained too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from fmda import trees
from fmda.atomic import write_json
from fmda.augment.photometric import ssd_jitter
from fmda.config import FREE, FolderOrName, NonNegativeInt, PositiveFloat, PositiveInt, Share, from_dict, to_dict
from fmda.data import ClassList, Dataset
from fmda.data.config import DataConfig
from fmda.data.dataset import Example
from fmda.data.streams import Order, Shuffled, Stream
from fmda.data.transforms import training_transform
from fmda.errors import UserError
from fmda.evaluate import (
    Predictor,
    Protocol,
    Scores,
    SegmentationEvaluator,
    Segmenter,
    evaluate_dataset,
    score_on_mesh,
)
from fmda.evaluate.maps import common_list
from fmda.mesh import make_mesh
from fmda.methods.dense import DenseNetwork, Encoder, known_encoder
from fmda.methods.mask_head import MaskHeadConfig, MaskNetwork, names_read
from fmda.methods.resident import with_resident_data
from fmda.methods.sampling import source_order
from fmda.methods.trainer import plan_without_sizes, trainer_plan, trainer_stages
from fmda.methods.tune import TuneConfig, TunedNetwork, finished, starting, tuned
from fmda.runs.plan import Plan
from fmda.runs.stages import Stage, pending
from fmda.train import Objective, OptimConfig, Outcome, Task, TrainerConfig, TrainState
from fmda.weights.checkpoint import weight_fingerprint
from fmda.weights.files import read_arrays, read_json, write_safetensors

SHUFFLED = Shuffled()
ENCODER_FILE = "encoder.safetensors"
"""Beside a trained head: the parameters of the encoder that training changed, by path."""
Network = DenseNetwork | MaskNetwork | TunedNetwork


@dataclass(frozen=True, kw_only=True)
class Config(TrainerConfig):
    """Data, encoder, head and schedule.

    Attributes:
        data: what is trained on; its class list is what is predicted.
        val: what is scored, during training every `evaluate_steps` steps and at the end.
        encoder: folder, name of a model of the package, or hub id of a CLIP, a DINO or a DINOv2.
        hidden: channels of a 3x3 convolution before the linear layer; 0 leaves it out.
        mask2former: Mask2Former's decoders in place of these layers; sides of the crop are multiples of 32 then.
        tune: how the encoder is trained too, under the paths `encoder/...` of `optim`; None freezes it.
        resize: largest (long, short) side of an image; None keeps the size. Training multiplies it within `scale`.
        crop, stride: training crop and scoring window, and the step between windows, pixels.
        max_class_ratio, jitter: see `training_transform`.
        ssd_jitter: change colours as SSD, Mask2Former and CLOUDS do (`fmda.augment.photometric`).
        rare, rare_pixels: `temperature` and `least` of `RareClasses`; rare None shuffles.
    """

    data: DataConfig
    val: DataConfig
    encoder: FolderOrName = "street-clip"
    hidden: NonNegativeInt = 0
    mask2former: MaskHeadConfig | None = None
    tune: TuneConfig | None = None
    resize: tuple[PositiveInt, PositiveInt] | None = None
    scale: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0)
    crop: PositiveInt = 512
    stride: PositiveInt = 341
    max_class_ratio: PositiveFloat = 0.75
    jitter: Share = 0.0
    ssd_jitter: bool = False
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


def make_network(
    encoder: Encoder, classes: ClassList, masks: MaskHeadConfig | None, hidden: int = 0
) -> DenseNetwork | MaskNetwork:
    """Returns the network for these classes: with Mask2Former's decoders, or with a head of convolutions.

    `hidden` counts where a head is drawn.
    """
    return DenseNetwork(encoder, hidden, len(classes)) if masks is None else MaskNetwork(encoder, masks, classes)


def make_objective(network: Network, jitter: bool = False) -> Objective:
    """Returns the objective of what is trained; with `jitter` the network sees the images after SSD's."""

    def objective(head: Any, state: TrainState, frozen: Any, batch: dict[str, Array], key: Any) -> Outcome:
        del state
        if jitter:
            batch = batch | {"image": ssd_jitter(jax.random.fold_in(key, 1), batch["image"])}
        return Outcome(*network.loss({"encoder": frozen["encoder"], "head": head}, batch, key), {})

    return objective


def make_task(
    config: Config, network: Network, images: Sequence[Example], order: Order = SHUFFLED,
    **options: Any,
) -> Task:  # fmt: skip
    """Returns the task of training a network; `options` are further attributes of the task."""
    transform = training_transform(
        (config.crop, config.crop), resize=config.resize, scale=config.scale, max_class_ratio=config.max_class_ratio,
        jitter=config.jitter,
    )  # fmt: skip
    return Task(
        name="supervised",
        objective=make_objective(network, config.ssd_jitter),
        init=network.init,
        optim=config.optim,
        streams=Stream(images, transform, config.batch, order),
        frozen={"encoder": network.encoder.params},
        weights=starting(network, {}) or None,
        **options,
    )


def check(config: Config) -> None:
    """Raises UserError for data, class maps, an encoder or a shape of the head that cannot work."""
    if (masks := config.mask2former) is not None:
        if masks.width % 32 or masks.width % masks.heads:
            raise UserError(
                f"mask2former.width: {masks.width} is not a multiple of 32 and of the {masks.heads} heads; choose one"
            )
        if config.crop % 32:
            raise UserError(f"crop: {config.crop} is not a multiple of 32, the stride of the last map; choose one")
    encoder = None if pending(config.encoder) else Encoder(str(config.encoder))
    if encoder is not None:
        tuned(DenseNetwork(encoder, 0, 1), config.tune)
    if pending(config.data.root):
        return
    classes = config.data.open().classes
    if encoder is not None:
        names_read(encoder, masks, classes)
    if not pending(config.val.root):
        common_list(classes, config.val.open().classes, config.protocol.class_map)


def stages(config: Config) -> list[Stage]:
    """Returns train, export (`model.json`, which `Segmenter.load` opens) and score (`scores.json`, figures)."""
    return trainer_stages(
        config, lambda _: _task(config), _write, exported=config, which="params", check=score, checked=config.val,
        check_name="score",
    )  # fmt: skip


def plan(config: Config) -> Plan:
    """Returns parameters, FLOPs and memory, where the sizes of the encoder and the classes are known."""
    steps = stages(config)
    if without := plan_of_unknown(config, steps):
        return without
    model = model_of_shapes(config)
    network = tuned(make_network(model.encoder, model.classes, model.masks, config.hidden), config.tune)
    task = make_task(config, network, [blank_example(config.crop)])
    return trainer_plan(config, task, steps, parts=() if config.tune is None else ("encoder",), example="crop")


def plan_of_unknown(config: Config, steps: Sequence[Stage]) -> Plan | None:
    """Returns a plan of these stages alone where the sizes of the encoder or the classes are not known."""
    encoder = str(config.encoder)
    absent = {} if known_encoder(encoder) else {"encoder": encoder}
    absent |= {} if config.data.known_classes() else {"data.root": str(config.data.root)}
    return plan_without_sizes(steps, **absent)


def model_of_shapes(config: Config) -> "Model":
    """Returns what a run will train, with shapes for the arrays that are not here."""
    encoder, classes = (
        Encoder(str(config.encoder), sizes=True),
        config.data.known_classes() or config.data.open().classes,
    )
    network = make_network(encoder, classes, config.mask2former, config.hidden)
    head = jax.eval_shape(network.init, jax.random.key(0))
    return Model("supervised", encoder, head, config.mask2former, classes, config.protocol)


def blank_example(side: int) -> Example:
    """Returns a black square with labels."""
    return Example(np.zeros((side, side, 3), np.uint8), np.zeros((side, side), np.uint8), "")


def _task(config: Config) -> Task:
    encoder, data, val = Encoder(str(config.encoder)), config.data.open(), config.val.open()
    network = tuned(make_network(encoder, data.classes, config.mask2former, config.hidden), config.tune)
    order = source_order(data, config.rare, config.rare_pixels)
    evaluators = [evaluator("val", config.evaluate_steps, "params", config, network, val, data.classes)]
    facts = {"encoder": encoder.fingerprint, "data": data.digest()}
    facts |= names_read(encoder, config.mask2former, data.classes)
    task = make_task(config, network, data, order, evaluators=evaluators, facts=facts)
    return with_resident_data(task) if config.data.resident == "auto" else task


def evaluator(
    name: str, every: int, which: Literal["params", "teacher"], config: Any, network: Network,
    val: Dataset, classes: ClassList,
) -> SegmentationEvaluator:  # fmt: skip
    """Returns what scores the head of a state, or its average, as `config` of this or another trainer of heads says."""
    mesh = make_mesh(*config.mesh)

    def scores(state: TrainState) -> Scores:
        params = {"encoder": network.encoder.params, "head": getattr(state, which)}
        return score_on_mesh(
            network.scores, params, val, mesh, config.protocol, classes=classes, limit=config.val.limit
        )

    return SegmentationEvaluator(name, every, scores)


def _write(config: Config, folder: Path, done: dict[str, Path], trained: Any) -> None:
    classes = config.data.open().classes
    network = make_network(Encoder(str(config.encoder)), classes, config.mask2former, config.hidden)
    head, encoder = finished(tuned(network, config.tune), trained)
    write_model(
        folder, head, encoder=encoder, classes=classes, masks=config.mask2former, protocol=config.protocol,
    )  # fmt: skip


def write_model(
    folder: Path, head: Any, *, encoder: Encoder, classes: ClassList, masks: MaskHeadConfig | None, protocol: Protocol,
    method: str = "supervised",
) -> None:  # fmt: skip
    """Writes a trained head and `model.json`, which `open_model` and `Segmenter.load` open.

    Of the encoder, what was changed is written. `masks` is the shape of Mask2Former's decoders, if the head is made of
    them, and `method` the name of the segmenter.
    """
    write_safetensors(folder / "head.safetensors", trees.flatten(head))
    if encoder.changes:
        write_safetensors(folder / ENCODER_FILE, trees.flatten(encoder.changes))
    model: dict[str, Any] = {"method": method, "encoder": encoder.source, "fingerprint": encoder.fingerprint}
    model |= {"classes": classes.to_dict(), "mask2former": None if masks is None else to_dict(masks)}
    seen = {"resize": protocol.resize, "crop": protocol.crop, "stride": protocol.stride}
    write_json(folder / "model.json", {"loader": f"{__name__}:load_segmenter", **model, "protocol": seen})


class Model(NamedTuple):
    """A trained head on its encoder.

    Attributes:
        method: that trained it.
        encoder: with its changes in place.
        head: parameters.
        masks: shape of Mask2Former's decoders; None for convolutions.
        classes: that are predicted.
        protocol: how images are scored.
    """

    method: str
    encoder: Encoder
    head: Any
    masks: MaskHeadConfig | None
    classes: ClassList
    protocol: Protocol

    def fingerprint(self, *settings: Any) -> str:
        """Returns what changes with any parameter or setting."""
        settings += tuple(names_read(self.encoder, self.masks, self.classes).values())
        return weight_fingerprint({**self.head, "encoder": self.encoder.changes}, self.encoder.fingerprint, *settings)


def open_model(folder: Path) -> Model:
    """Returns what `write_model` wrote. Raises UserError where the encoder is not that of the training."""
    model = read_json(folder / "model.json")
    encoder = Encoder(model["encoder"])
    if encoder.fingerprint != model["fingerprint"]:
        raise UserError(f"{folder}: {model['encoder']} has other weights than the encoder of training; restore them")
    if (folder / ENCODER_FILE).is_file():
        encoder = encoder.changed(trees.unflatten(read_arrays(folder / ENCODER_FILE)))
    head = trees.unflatten(read_arrays(folder / "head.safetensors"))
    where, masks = str(folder / "model.json"), model.get("mask2former")
    if masks is not None:
        masks = from_dict(MaskHeadConfig, masks, where)
    classes, protocol = ClassList.from_dict(model["classes"], where), from_dict(Protocol, model["protocol"], where)
    return Model(model.get("method", "supervised"), encoder, head, masks, classes, protocol)


def load_segmenter(folder: Path) -> Segmenter:
    """Returns the trained segmenter. Raises UserError as `open_model`."""
    model = open_model(folder)
    encoder, protocol = model.encoder, model.protocol
    network = make_network(encoder, model.classes, model.masks)
    predictor = Predictor(network.scores, {"encoder": encoder.params, "head": model.head}, protocol)
    return Segmenter(predictor, model.classes, model.method, model.fingerprint(protocol), protocol)


def score(config: Any, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    """Scores the exported model on `config.val`, of this or another trainer of such heads."""
    segmenter, val = load_segmenter(done["export"]), config.val
    return {"miou": evaluate_dataset(segmenter, val.open(), val.class_map, out=folder, limit=val.limit).miou}
