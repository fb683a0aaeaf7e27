"""A small Segment Anything on rendered scenes: training, export for transformers and as ONNX, check.

A region is prompted by a point or a box; then, round by round, by a point where the answer was wrong (Kirillov et al.
2023, appendix A). Regions are things, and connected parts of the other classes; which class they have is not learned.
Images that are wider than high are stacked to a square, since the network encodes squares alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from fmda import trees
from fmda.atomic import write_json
from fmda.config import Decay, FolderOrName, NonNegativeInt, PositiveInt, Share
from fmda.data.loader import stack
from fmda.data.streams import Stream
from fmda.errors import UserError
from fmda.losses.prompted import error_points, mask_iou, prompted_losses
from fmda.methods.dense import normalised
from fmda.methods.pretrain.checks import check_disjoint, check_scenes
from fmda.methods.pretrain.crops import Drawn, Scenes
from fmda.methods.pretrain.regions import PromptConfig, Prompts
from fmda.methods.trainer import trainer_plan, trainer_stages
from fmda.models.module import abstract, init
from fmda.models.sam import Sam, SamConfig, SamVitConfig
from fmda.models.sam.prompts import TOP_LEFT
from fmda.progress import track
from fmda.runs.plan import Plan
from fmda.runs.stages import Stage, pending
from fmda.train import Objective, OptimConfig, Outcome, Task, TrainerConfig, TrainState
from fmda.weights.load import load_dino, load_sam
from fmda.weights.network import network_graph, save

READING = ("to_image", "to_tokens")
"""Attention of a block of the decoder between prompts and image."""
SHARPNESS = 2**0.25
"""Factor of its kernels at the start: the logit of a place with itself is about 4 where a head has 16 channels."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a SAM with a vision transformer.

    Attributes:
        image_size: side of the images, pixels; masks have four cells for each patch along a side.
        window, whole: see `SamVitConfig`.
        channels: of the embedding, prompts and decoder.
        decoder_heads, decoder_mlp_width: of the decoder's transformer.
        iou_width: hidden channels of the head that predicts IoU.
    """

    image_size: PositiveInt = 128
    patch_size: PositiveInt = 8
    width: PositiveInt = 128
    layers: PositiveInt = 6
    heads: PositiveInt = 4
    mlp_width: PositiveInt = 512
    window: PositiveInt = 8
    whole: tuple[NonNegativeInt, ...] = (2, 5)
    channels: PositiveInt = 64
    decoder_heads: PositiveInt = 2
    decoder_mlp_width: PositiveInt = 256
    iou_width: PositiveInt = 64

    @property
    def sam(self) -> SamConfig:
        """The network's full configuration."""
        encoder = SamVitConfig(
            self.image_size, self.patch_size, self.width, self.layers, self.heads, self.mlp_width, self.window,
            self.whole, self.channels,
        )  # fmt: skip
        return SamConfig(encoder, heads=self.decoder_heads, mlp_width=self.decoder_mlp_width, iou_width=self.iou_width)


@dataclass(frozen=True, kw_only=True)
class Config(TrainerConfig):
    """Data, network and schedule of a SAM.

    Attributes:
        data: rendered folders, or domains that are drawn in memory.
        held: those of the check; none of them may be in `data`.
        model: the network.
        start: DINO of the encoder's sizes from which its blocks, patches and positions start.
        prompts: which regions are prompted, and how.
        alone: share of the squares that hold one image and zeros below it, as images are encoded later.
        ema: share that the weight average keeps at each step.
    """

    data: tuple[Path | Drawn, ...]
    held: tuple[Path | Drawn, ...] = ()
    model: ModelConfig = ModelConfig()
    start: FolderOrName | None = None
    prompts: PromptConfig = PromptConfig()
    alone: Share = 0.3
    steps: PositiveInt = 3000
    batch: PositiveInt = 8
    optim: OptimConfig = OptimConfig(learning_rate=1e-3, warmup_steps=100, weight_decay=0.05, clip_norm=1.0)
    ema: Decay = 0.995

    def __post_init__(self) -> None:
        """Raises UserError for sizes that make no network, or scenes that are trained on and held."""
        model = self.model
        for name, whole, part in (
            ("model.image_size", model.image_size, model.patch_size),
            ("model.width", model.width, model.heads),
            ("model.channels", model.channels, 2 * model.decoder_heads),
        ):
            if whole % part:
                raise UserError(f"{name}: {whole} is no multiple of {part} (of patch, heads, or twice decoder_heads)")
        if model.patch_size % 4:
            raise UserError(f"model.patch_size: {model.patch_size} is no multiple of 4, the cells of a mask in a patch")
        check_disjoint(self.data, self.held)

    @property
    def transform(self) -> Prompts:
        """Returns what makes a prompted image of a scene."""
        return Prompts(self.prompts, self.model.image_size, self.model.patch_size // 4)


def make_objective(graphdef: nnx.GraphDef, prompts: PromptConfig, alone: float) -> Objective:
    """Returns the objective: the mean over rounds and prompts of the mask's loss and the error of the predicted IoU.

    Metrics: "mask" and "score", the two terms; "point" and "box", the mean IoU of the first answer to a point and to
    a box; "last", that of the last answers. An answer is the mask of the highest predicted IoU of the last three.
    """

    def objective(params: Any, state: TrainState, frozen: Any, batch: dict[str, Array], key: Array) -> Outcome:
        del state, frozen
        sam: Sam = nnx.merge(graphdef, params)
        size = sam.config.encoder.image_size
        there, height = len(batch["image"]), batch["image"].shape[1]
        rows = size // height
        squares = -(-there // rows)
        batch = {name: _filled(values, squares * rows) for name, values in batch.items()}
        keep_key, *keys = jax.random.split(key, prompts.rounds + 1)
        # the first image of a square stays; zeros stand for the others where it is to be alone
        together = jax.random.bernoulli(keep_key, 1 - alone, (squares, 1)) | (jnp.arange(rows)[None] == 0)
        together &= (jnp.arange(squares * rows) < there).reshape(squares, rows)
        pixels = normalised(batch["image"]).reshape(squares, rows, height, size, 3) * together[:, :, None, None, None]
        embedding = sam.encode(pixels.reshape(squares, size, size, 3))
        cell = size / (4 * embedding.shape[1])
        target = in_square(batch["masks"], rows)
        count = target.shape[1]
        below = np.repeat(np.arange(rows) * height, count // rows)
        labels = batch["labels"].reshape(squares, count, 2)
        points = batch["points"].reshape(squares, count, 2, 2) + np.stack([0 * below, below], -1)[None, :, None]
        weight = jnp.repeat(together, count // rows, axis=1).astype(jnp.float32)

        def mean(values: Array, where: Array | float = 1.0) -> Array:
            return (values * weight * where).sum() / jnp.maximum((weight * where).sum(), 1.0)

        boxes, previous = labels[..., 0] == TOP_LEFT, None
        mask_terms, score_terms, ious = [], [], []
        for turn, point_key in enumerate(keys):
            logits, predicted = sam.decode_labelled(embedding, points, labels, previous if turn > 1 else None)
            ambiguous = ~boxes & (turn == 0)
            mask_term, score_term, _ = prompted_losses(logits, predicted, target, ambiguous)
            best = 1 + predicted[..., 1:].argmax(-1)
            chosen = jnp.take_along_axis(logits, best[..., None, None, None], axis=2)[:, :, 0]
            previous = jax.lax.stop_gradient(chosen)
            mask_terms.append(mean(mask_term))
            score_terms.append(mean(score_term))
            ious.append(mask_iou(chosen, target))
            if turn < prompts.rounds - 1:
                places, kinds = error_points(previous > 0, target, point_key)
                where = places * cell + (cell - 1) / 2
                points = jnp.concatenate([where[:, :, None], points], axis=2)
                labels = jnp.concatenate([kinds[:, :, None], labels], axis=2)
        mask_loss, score_loss = jnp.stack(mask_terms).mean(), jnp.stack(score_terms).mean()
        metrics = {
            "mask": mask_loss, "score": score_loss, "point": mean(ious[0], ~boxes), "box": mean(ious[0], boxes),
            "last": mean(ious[-1]),
        }  # fmt: skip
        return Outcome(mask_loss + score_loss, metrics, {})

    return objective


def _filled(values: Array, count: int) -> Array:
    """Returns values [b, ...] with zeros up to [count, ...]."""
    return jnp.pad(values, [(0, count - len(values)), *[(0, 0)] * (values.ndim - 1)])


def in_square(masks: Array, rows: int) -> Array:
    """Returns masks [b, p, h, w] of images, `rows` of which are stacked, at their place: [b/rows, rows * p, w, w]."""
    b, p, h, w = masks.shape
    masks = masks.reshape(b // rows, rows, p, h, w)
    placed = [jnp.pad(masks[:, k], ((0, 0), (0, 0), (k * h, w - (k + 1) * h), (0, 0))) for k in range(rows)]
    return jnp.concatenate(placed, axis=1)


def check(config: Config) -> None:
    """Raises UserError for scenes that are missing or damaged, and for a start of other sizes."""
    check_scenes((*config.data, *config.held))
    if config.start is not None and not pending(config.start):
        encoder_weights(config.start, config.model)


def stages(config: Config) -> list[Stage]:
    """Returns train, export (as transformers' SamModel opens it) and, with held-out scenes, check."""
    return trainer_stages(
        config, lambda _: _task(config, Scenes(config.data)), _write, exported=config.model,
        check=_check if config.held else None, checked=[config.held, config.prompts, config.batch],
    )  # fmt: skip


def plan(config: Config) -> Plan:
    """Returns parameters, FLOPs and memory at the configured sizes."""
    size = config.model.image_size
    shape = (size // 2, size)
    blank = {
        "image": np.zeros((*shape, 3), np.uint8), "labels": np.zeros(shape, np.uint8),
        "instances": np.zeros(shape, np.uint16),
    }  # fmt: skip
    return trainer_plan(config, _task(config, [blank]), stages(config), parts=("encoder", "prompts", "decoder"))


def _task(config: Config, scenes: Sequence[Any]) -> Task:
    def make(rngs: nnx.Rngs) -> Sam:
        return Sam(config.model.sam, rngs=rngs)

    return Task(
        name="sam",
        objective=make_objective(abstract(make)[0], config.prompts, config.alone),
        init=lambda key: pointed(init(make, key)),
        optim=config.optim,
        streams=Stream(scenes, config.transform, config.batch),
        weights=None if config.start is None else encoder_weights(config.start, config.model),
        teacher_decay=config.ema,
    )


def pointed(params: Any) -> Any:
    """Returns fresh parameters whose attention between prompts and image has equal queries and keys.

    A point then reads the place that it lies on from the first step, which it would be long to learn.
    """
    decoder = params["decoder"]
    layers = [decoder["final"], *(block[name] for block in decoder["blocks"].values() for name in READING)]
    for layer in layers:
        layer["query"]["kernel"] = layer["key"]["kernel"] = SHARPNESS * layer["key"]["kernel"]
    return params


def encoder_weights(source: str, model: ModelConfig) -> Any:
    """Returns the parameters of an encoder that a DINO has: those of its patches, blocks and positions.

    Positions are repeated, as one of DINO's images begins at each window. Raises UserError for a DINO of other sizes.
    """
    teacher, side = load_dino(source), model.image_size // model.patch_size
    own, wanted = trees.flatten(teacher.params), trees.flatten(network_graph("sam", model.sam)[1]["encoder"])
    grid = own["position"][1:].reshape(2 * (teacher.config.image_size // teacher.config.patch_size,) + (-1,))
    repeats = -(-side // len(grid))
    own["position"] = np.tile(grid, (repeats, repeats, 1))[:side, :side]
    taken = {path: leaf for path, leaf in own.items() if path in wanted}
    odd = [path for path, leaf in taken.items() if leaf.shape != wanted[path].shape]
    if odd or teacher.config.layers != model.layers:
        raise UserError(f"start: {source} has other sizes than model ({', '.join(odd) or 'layers'}); give those of one")
    return trees.unflatten({f"encoder/{path}": leaf for path, leaf in taken.items()})


def _write(config: Config, folder: Path, done: dict[str, Path], params: Any) -> None:
    save("sam", folder, config.model.sam, params, dtype=np.float16)


def _check(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    """Measures the answers to prompts of held-out scenes, each alone in its square: means over prompts."""
    sam, transform = load_sam(done["export"]), config.transform
    objective = jax.jit(make_objective(sam.graphdef, config.prompts, config.alone))
    result = {}
    for source in config.held:
        scenes = Scenes([source])
        rows, counts = [], []
        for place in track(range(len(scenes)), f"prompt {source}"):
            example = transform(scenes[place], np.random.default_rng([config.seed, place]))
            metrics = objective(sam.params, None, {}, stack([example]), jax.random.key(place)).metrics
            boxes = int((example["labels"][:, 0] == TOP_LEFT).sum())
            rows.append([float(metrics[name]) for name in ("point", "box", "last")])
            counts.append([config.prompts.count - boxes, boxes, config.prompts.count])
        means = (np.array(rows) * counts).sum(0) / np.maximum(np.sum(counts, axis=0), 1)
        result[str(source)] = dict(zip(("point", "box", "last"), means.tolist(), strict=True))
    write_json(folder / "prompts.json", result)
    return result
