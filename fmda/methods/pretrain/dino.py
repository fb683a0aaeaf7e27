"""A self-supervised teacher from images alone: training, export, and a check of its patches against labels.

The network distils itself (Caron et al. 2021, DINO): from one view of an image, a student predicts what an average of
earlier students predicts from other views. A small net learns little about local structure that way, so predictions at
masked patches also match the teacher's at the unmasked ones (Zhou et al. 2022, iBOT).
No label is read before the check.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from fmda import trees
from fmda.atomic import write_json
from fmda.config import PositiveInt
from fmda.data.streams import Stream
from fmda.errors import UserError
from fmda.methods.dense import normalised
from fmda.methods.pretrain.checks import check_image_folders, check_scenes
from fmda.methods.pretrain.dino_check import agreement_on
from fmda.methods.pretrain.dino_net import (
    DistillConfig,
    HeadConfig,
    Pupil,
    initial_centres,
    make_objective,
    momentum_schedule,
)
from fmda.methods.pretrain.dino_views import Image, ImageFolders, ViewConfig, Views
from fmda.methods.trainer import trainer_plan, trainer_stages
from fmda.models.clip import VitConfig
from fmda.models.dino import vit_config
from fmda.models.module import abstract, init
from fmda.runs.plan import Plan
from fmda.runs.stages import Stage
from fmda.train import OptimConfig, Task, TrainerConfig
from fmda.weights.load import load_dino
from fmda.weights.network import save


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
        data: folders of images to train on; labels in them are not read.
        held: rendered folders whose labels the check reads. They may be trained on, since training sees no labels.
        model, head: the network; `views.size` is what its position table is for.
        views: how views are cut, changed and masked.
        distill: losses, temperatures, momenta.
        batch: images per step, over all devices and processes.
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
    check_image_folders(config.data)
    check_scenes(config.held)


def stages(config: Config) -> list[Stage]:
    """Returns train, export (Hugging Face layout) and, with held-out images, check."""
    return trainer_stages(
        config, lambda _: _task(config, ImageFolders(config.data)), _write, exported=config.model,
        check=_check if config.held else None, checked=[config.held, config.check_size, config.check_thresholds],
    )  # fmt: skip


def plan(config: Config) -> Plan:
    """Returns parameters, FLOPs and memory at the configured sizes."""
    blank = np.zeros((config.views.size, config.views.size, 3), np.uint8)
    return trainer_plan(config, _task(config, [blank]), stages(config), parts=("backbone", "head"))


def _task(config: Config, images: Sequence[Image]) -> Task:
    def make(rngs: nnx.Rngs) -> Pupil:
        return Pupil(config.vit, config.head, rngs=rngs)

    return Task(
        name="dino",
        objective=make_objective(abstract(make)[0], config.distill),
        init=functools.partial(init, make),
        optim=config.optim,
        streams=Stream(images, Views(config.views, config.vit.side), config.batch),
        aux=initial_centres(config.head.prototypes),
        teacher_decay=momentum_schedule(config.distill.teacher_momentum, config.steps),
    )


def _write(config: Config, folder: Path, done: dict[str, Path], params: Any) -> dict[str, Any]:
    save("dino", folder, config.vit, params["backbone"], dtype=np.float16)
    return {"parameters": trees.count(params["backbone"])}


def _check(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    """Compares patches that look alike with patches that are alike: by the teacher's values, and by raw pixels."""
    teacher = load_dino(done["export"])

    def values(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(teacher.last_layer(normalised(pixels), part="value"))

    patch = config.model.patch_size
    size = config.check_size - config.check_size % patch
    result = {
        str(root): agreement_on(root, {"values": values}, size, patch, config.check_thresholds, config.seed)
        for root in config.held
    }
    write_json(folder / "patches.json", result)
    return result
