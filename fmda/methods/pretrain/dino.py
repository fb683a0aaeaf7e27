"""A self-supervised teacher from pictures alone: training, export, and a check of its patches against labels.

The network distils itself (Caron et al. 2021, DINO): views of a picture are told by a student as an average of earlier
students tells other views of it. A small net learns little about places that way, so masked patches are told as the
teacher tells them unmasked (Zhou et al. 2022, iBOT). No label is read before the check.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from fmda.atomic import write_atomic
from fmda.config import PositiveInt
from fmda.data.streams import Stream
from fmda.errors import UserError
from fmda.methods.export import export
from fmda.methods.pipeline import Plan
from fmda.methods.pretrain.checks import check_pictures, check_scenes
from fmda.methods.pretrain.dino_check import agreement_on, normalised_float
from fmda.methods.pretrain.dino_net import (
    DistillConfig,
    HeadConfig,
    Pupil,
    initial_centres,
    make_objective,
    momentum_schedule,
)
from fmda.methods.pretrain.dino_views import Pictures, ViewConfig, Views
from fmda.models.clip import VitConfig
from fmda.models.dino import vit_config
from fmda.models.module import abstract, init
from fmda.perf.flops import training_flops, vit_flops
from fmda.runs.stages import Stage
from fmda.train import OptimConfig, Task, TrainerConfig, run_task
from fmda.weights.network import load_dino, save


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the vision transformer; its positions are for the global views."""

    patch_size: PositiveInt = 8
    width: PositiveInt = 128
    layers: PositiveInt = 6
    heads: PositiveInt = 4
    mlp_width: PositiveInt = 512


@dataclass(frozen=True, kw_only=True)
class Config(TrainerConfig):
    """Data, network and schedule of a self-distillation run.

    Attributes:
        data: folders of pictures to train on; labels in them are not read.
        held: rendered folders whose labels the check reads. They may be trained on, since training sees no labels.
        model, head: the network; `views.size` is what its position table is for.
        views: how views are cut, changed and masked.
        distill: losses, temperatures, momenta.
        batch: pictures per step, over all devices and processes.
        check_size: side of the squares that the check looks at, pixels.
        check_thresholds: cosines above which two patches count as alike in the check.
    """

    data: tuple[Path, ...]
    held: tuple[Path, ...] = ()
    model: ModelConfig = ModelConfig()
    head: HeadConfig = HeadConfig()
    views: ViewConfig = ViewConfig()
    distill: DistillConfig = DistillConfig()
    steps: PositiveInt = 3000
    batch: PositiveInt = 64
    optim: OptimConfig = OptimConfig(learning_rate=1e-3, warmup_steps=200, weight_decay=0.04, clip_norm=3.0)
    check_size: PositiveInt = 128
    check_thresholds: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 0.9)

    def __post_init__(self) -> None:
        """Raises UserError for sizes that make no whole patches, or no network."""
        patch = self.model.patch_size
        for name, size in (("views.size", self.views.size), ("views.local_size", self.views.local_size)):
            if size < patch or size % patch:
                raise UserError(f"{name}: {size} is no multiple of model.patch_size={patch}; choose one")
        if self.model.width % self.model.heads:
            raise UserError(f"model.heads: {self.model.heads} do not divide width={self.model.width}; choose a divisor")

    @property
    def vit(self) -> VitConfig:
        """The backbone's full configuration."""
        sizes = self.model
        return vit_config(
            sizes.patch_size, sizes.width, layers=sizes.layers, heads=sizes.heads, mlp_width=sizes.mlp_width,
            image_size=self.views.size,
        )  # fmt: skip


def check(config: Config) -> None:
    """Raises UserError for images or scenes that are missing or damaged."""
    check_pictures(config.data)
    check_scenes(config.held)


def stages(config: Config) -> list[Stage]:
    """Returns train, export (Hugging Face layout) and, with held pictures, check."""
    chain = [
        Stage("train", functools.partial(_train, config), config),
        Stage("export", functools.partial(_export, config), config.model, inputs=("train",), alone=True),
    ]
    if config.held:
        seen = [config.held, config.check_size, config.check_thresholds]
        chain.append(Stage("check", functools.partial(_check, config), seen, inputs=("export",), alone=True))
    return chain


def plan(config: Config) -> Plan:
    """Returns parameters and FLOPs at the configured sizes."""
    shapes = abstract(lambda rngs: Pupil(config.vit, config.head, rngs=rngs))[1]
    counts = {name: sum(x.size for x in jax.tree.leaves(shapes[name])) for name in ("backbone", "head")}
    return Plan(
        stages=tuple((stage.name, "") for stage in stages(config)),
        parameters=tuple(counts.items()),
        flops=(
            ("backbone, one global view", view_flops(config, config.views.size)),
            ("one training picture, all views", picture_flops(config)),
        ),
        memory=(("parameters, moments and teacher, float32", 16.0 * sum(counts.values())),),
    )


def view_flops(config: Config, size: int) -> float:
    """Returns the FLOPs of the backbone for one view of that side, forward."""
    sizes = config.model
    return vit_flops(
        size, patch_size=sizes.patch_size, width=sizes.width, layers=sizes.layers, mlp_width=sizes.mlp_width
    )


def picture_flops(config: Config) -> float:
    """Returns the FLOPs of one training step per picture: the student's views and the teacher's two, with heads."""
    head, views = config.head, config.views
    token = 2 * (
        config.model.width * head.hidden
        + head.hidden**2
        + head.hidden * head.bottleneck
        + head.bottleneck * head.prototypes
    )
    patches = (views.size // config.model.patch_size) ** 2 if config.distill.patch_weight else 0
    seen = 2 * (view_flops(config, views.size) + (1 + patches) * token)
    small = views.locals * (view_flops(config, views.local_size) + token)
    return seen + training_flops(seen + small)


def _train(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    pictures = Pictures(config.data)

    def make(rngs: nnx.Rngs) -> Pupil:
        return Pupil(config.vit, config.head, rngs=rngs)

    task = Task(
        name="dino",
        objective=make_objective(abstract(make)[0], config.distill),
        init=functools.partial(init, make),
        optim=config.optim,
        streams=Stream(pictures, Views(config.views, config.vit.side), config.batch),
        aux=initial_centres(config.head.prototypes),
        teacher_decay=momentum_schedule(config.distill.teacher_momentum, config.steps),
        flops_per_example=picture_flops(config),
    )
    state = run_task(task, config, folder)
    return {"steps": int(state.step), "pictures": len(pictures)}


def _export(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    def write(params: Any) -> None:
        save("dino", folder, config.vit, params, dtype=np.float16)

    return export(config, folder, done["train"], write, part="backbone")


def _check(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    """Compares patches that look alike with patches that are alike: by the teacher's values, and by raw pixels."""
    teacher = load_dino(done["export"])

    def values(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(teacher.last_layer(normalised_float(pixels), part="value"))

    patch = config.model.patch_size
    size = config.check_size - config.check_size % patch
    result = {
        str(root): agreement_on(root, {"values": values}, size, patch, config.check_thresholds, config.seed)
        for root in config.held
    }
    write_atomic(folder / "patches.json", json.dumps(result, indent=1) + "\n")
    return result
