"""CLIP-DINOiser's two heads for a given CLIP, from images alone, with a self-supervised teacher.

CLIP stays as it is. `obj_proj` learns which patches the teacher's values hold together, `bkg_decoder` which patches are
not background by the teacher's attention and keys (Wysoczanska et al. 2024; Simeoni et al. 2023).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from fmda.atomic import write_json
from fmda.config import FolderOrName, NonNegativeFloat, PositiveInt, Share, Side
from fmda.data.dataset import Example
from fmda.data.streams import Stream
from fmda.data.transforms import ColourJitter, Compose, RandomFlip
from fmda.errors import UserError
from fmda.mesh import REPLICATED_RULES
from fmda.methods.dense import normalised
from fmda.methods.generate.checks import check_weights
from fmda.methods.pretrain.checks import check_image_folders, check_scenes
from fmda.methods.pretrain.dino_check import agreement_on, object_overlap
from fmda.methods.pretrain.dino_views import Image, ImageFolders, random_square, resized_window
from fmda.methods.pretrain.dinoiser_targets import Reading, background, read_teacher, same_object
from fmda.methods.trainer import plan_without_sizes, trainer_plan, trainer_stages
from fmda.models.clip import VitConfig, vision_tower
from fmda.models.dinoiser import LEAST_BLOCKS, guide_features, init_heads, object_features, saliency
from fmda.models.module import abstract
from fmda.nn.resize import resize
from fmda.runs.plan import Plan
from fmda.runs.stages import Stage
from fmda.train import Objective, OptimConfig, Outcome, Task, TrainerConfig, TrainState
from fmda.weights.checkpoint import weight_fingerprint
from fmda.weights.load import load_clip, load_dino, load_heads
from fmda.weights.network import Loaded, save_heads


@dataclass(frozen=True, kw_only=True)
class Config(TrainerConfig):
    """Networks, data and schedule of the heads. The defaults are the published recipe for ViT-B/16.

    Attributes:
        data: folders of images to train on; labels in them are not read.
        held: rendered folders whose labels the check reads.
        clip, teacher: where CLIP and the self-supervised teacher are: folder, name of a model of the package, hub id.
        size: side of the crops, pixels; what makes no whole patch is cut off.
        side: smallest and largest side of a crop, as a share of the image's shorter side; drawn log-uniformly.
        jitter: probability of changed colours.
        channels: width of the object features.
        floor: cosine of two patches' values from which the teacher holds them together.
        background: cosine of two patches' keys above which one is background if the other is.
        learning_rate, background_rate: of `obj_proj` and of `bkg_decoder`.
        decay_step: step at which both rates fall to a tenth.
    """

    data: tuple[Path, ...]
    held: tuple[Path, ...] = ()
    clip: FolderOrName = "street-clip"
    teacher: FolderOrName = "street-dino"
    size: PositiveInt = 448
    side: tuple[Side, Side] = (1.0, 1.0)
    jitter: Share = 0.8
    channels: PositiveInt = 256
    floor: float = 0.2
    background: float = 0.3
    steps: PositiveInt = 6250
    batch: PositiveInt = 16
    learning_rate: NonNegativeFloat = 5e-5
    background_rate: NonNegativeFloat = 1e-2
    weight_decay: NonNegativeFloat = 0.01
    decay_step: PositiveInt = 5000


class Networks(NamedTuple):
    """The two frozen networks, and the sides in pixels that give both the same grid of patches."""

    clip: Loaded
    tower: VitConfig
    teacher: Loaded
    clip_side: int
    teacher_side: int

    @property
    def frozen(self) -> dict[str, Any]:
        """The parameters that a step reads."""
        return {"vision": self.clip.params["vision"], "teacher": self.teacher.params}

    @property
    def digest(self) -> str:
        """12 hex digits that change with any parameter: a run goes on only with the networks it began with."""
        return weight_fingerprint(self.frozen)


def check(config: Config) -> None:
    """Raises UserError for images, scenes or networks that are missing or damaged."""
    check_image_folders(config.data)
    check_scenes(config.held)
    check_weights(config.clip)
    check_weights(config.teacher)


def stages(config: Config) -> list[Stage]:
    """Returns train, export (`dinoiser.safetensors`) and, with held-out images, check."""
    return trainer_stages(
        config, lambda _: _task(config, load_networks(config), ImageFolders(config.data)), _write, which="params",
        summary="dinoiser.json", check=_check if config.held else None, checked=config.held,
    )  # fmt: skip


def plan(config: Config) -> Plan:
    """Returns parameters, FLOPs and memory, where CLIP and teacher are on this machine."""
    steps = stages(config)
    blank = np.zeros((config.size, config.size, 3), np.uint8)
    return plan_without_sizes(steps, clip=config.clip, teacher=config.teacher) or trainer_plan(
        config, _task(config, load_networks(config), [blank]), steps, example="crop"
    )


def load_networks(config: Config) -> Networks:
    """Returns CLIP and teacher. Raises UserError for a CLIP without the blocks that the heads read, or small crops."""
    clip, teacher = load_clip(config.clip), load_dino(config.teacher)
    tower = clip.config.vision
    if not isinstance(tower, VitConfig):
        raise UserError(f"clip: CLIP-DINOiser reads a vision transformer, not the tower of {config.clip}; name another")
    if tower.layers < LEAST_BLOCKS:
        raise UserError(
            f"clip: the image tower of {config.clip} has {tower.layers} blocks; the heads read the third last one, "
            "name a CLIP with more"
        )
    grid = config.size // tower.patch_size
    if grid < 2:
        raise UserError(f"size: {config.size} gives no two patches of {tower.patch_size} pixels; choose a larger one")
    return Networks(clip, tower, teacher, grid * tower.patch_size, grid * teacher.config.patch_size)


@dataclass(frozen=True)
class Crop:
    """The transform (image, generator) -> {"pixels": uint8 [size, size, 3]}: a square, mirrored and recoloured."""

    size: int
    side: tuple[float, float]
    jitter: float

    def __call__(self, image: Image, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns the crop."""
        square = resized_window(random_square(image, self.side, rng), self.size)
        steps = Compose((RandomFlip(), ColourJitter(0.2, 0.3, 0.3, 0.05, self.jitter)))
        return {"pixels": steps(Example(square, None, ""), rng).image}


Guides = Callable[[Any, Array], tuple[Float[Array, "b h w width"], Reading]]


def make_guides(networks: Networks) -> Guides:
    """Returns guides(frozen, uint8 crops) -> (CLIP's guide features, the teacher's reading), both without gradients."""
    image, offset = networks.clip.config, networks.teacher.config.position_offset
    graphdef = abstract(lambda rngs: vision_tower(networks.tower, image.embed_dim, rngs=rngs))[0]

    def guides(frozen: Any, pixels: Array) -> tuple[Array, Reading]:
        tower, teacher = nnx.merge(graphdef, frozen["vision"]), nnx.merge(networks.teacher.graphdef, frozen["teacher"])
        guide = guide_features(tower, normalised(pixels, image.image_mean, image.image_std))
        reading = read_teacher(
            teacher, resize(normalised(pixels), (networks.teacher_side,) * 2), position_offset=offset
        )
        return jax.lax.stop_gradient((guide, reading))

    return guides


def make_objective(networks: Networks, config: Config) -> Objective:
    """Returns the objective of the heads: the sum of both heads' binary cross-entropies.

    `obj_proj`: over all pairs of patches, with the cosine of the object features, negative ones set to 0, as the logit.
    `bkg_decoder`: over all patches. Both are means, in nats (the authors' training code; the paper's eq. 5 and 6).
    Metrics: `object_loss`, `background_loss`; `alike`, share of pairs that the teacher holds together, and `objects`,
    share of patches that are no background: near 0 or 1 they teach nothing.
    """

    guides = make_guides(networks)

    def objective(heads: Any, state: TrainState, frozen: Any, batch: dict[str, Array], key: Any) -> Outcome:
        del state, key
        guide, reading = guides(frozen, batch["pixels"])
        together = same_object(reading.values, config.floor).astype(jnp.float32)
        objects = 1.0 - background(reading.attention, reading.keys, config.background).astype(jnp.float32)
        features = object_features(heads, guide).reshape(*objects.shape, -1)
        logits = jnp.maximum(jnp.einsum("bpc,bqc->bpq", features, features), 0.0)
        object_loss = optax.sigmoid_binary_cross_entropy(logits, together).mean()
        foreground = saliency(heads, guide).reshape(objects.shape)
        background_loss = optax.sigmoid_binary_cross_entropy(foreground, objects).mean()
        metrics = {
            "object_loss": object_loss,
            "background_loss": background_loss,
            "alike": together.mean(),
            "objects": objects.mean(),
        }
        return Outcome(object_loss + background_loss, metrics, {})

    return objective


def heads_optim(config: Config) -> OptimConfig:
    """Returns AdamW with a rate for each head; both fall to a tenth at `decay_step`."""
    return OptimConfig(
        learning_rate=config.learning_rate,
        schedule="step",
        drops=(config.decay_step,),
        weight_decay=config.weight_decay,
        no_decay=(),
        multipliers={"bkg_decoder/*": config.background_rate / config.learning_rate},
    )


def _task(config: Config, networks: Networks, images: Sequence[Image]) -> Task:
    return Task(
        name="dinoiser",
        objective=make_objective(networks, config),
        init=lambda key: init_heads(key, networks.tower.width, config.channels),
        optim=heads_optim(config),
        streams=Stream(images, Crop(networks.clip_side, config.side, config.jitter), config.batch),
        frozen=networks.frozen,
        rules=REPLICATED_RULES,
        facts={"weights": networks.digest},
    )


def _write(config: Config, folder: Path, done: dict[str, Path], heads: Any) -> None:
    save_heads(folder, heads, np.float16)


def _check(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    """Compares what heads, CLIP alone and teacher hold together with the classes, and saliency with things."""
    networks = load_networks(config)
    heads, guides = load_heads(done["export"], networks.tower.width), make_guides(networks)

    @jax.jit
    def look(frozen: Any, heads: Any, pixels: Array) -> dict[str, Array]:
        guide, reading = guides(frozen, pixels)
        b, h, w, _ = guide.shape
        return {
            "clip": guide,
            "teacher": reading.values.reshape(b, h, w, -1),
            "heads": object_features(heads, guide),
            "saliency": saliency(heads, guide) > 0,
            "teacher saliency": ~background(reading.attention, reading.keys, config.background).reshape(b, h, w),
        }

    def reader(name: str) -> Any:
        return lambda pixels: np.asarray(look(networks.frozen, heads, pixels)[name])

    size, patch = networks.clip_side, networks.tower.patch_size
    together = {name: reader(name) for name in ("clip", "teacher", "heads")}
    things = {name: reader(name) for name in ("saliency", "teacher saliency")}
    result = {
        str(root): {
            "together": agreement_on(root, together, size, patch, (config.floor,), config.seed),
            "things": object_overlap(root, things, size, patch, config.seed),
        }
        for root in config.held
    }
    write_json(folder / "patches.json", result)
    return result
