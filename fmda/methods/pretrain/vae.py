"""An autoencoder of Stable Diffusion's shape from images alone: training, export in diffusers' layout, check.

The loss is the mean absolute error of pixels and of their differences to neighbours, and a small Kullback-Leibler term
that keeps latents near a normal distribution (Rombach et al. 2022, 3.1, without their discriminator). The number that
latents are multiplied by before a UNet sees them is measured at the end: it makes their deviation 1.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from fmda.atomic import write_json
from fmda.config import Decay, NonNegativeFloat, PositiveInt
from fmda.data.dataset import Example
from fmda.data.streams import Stream
from fmda.data.transforms import Compose, RandomCrop, RandomFlip
from fmda.errors import UserError
from fmda.methods.pretrain.checks import check_disjoint, check_image_folders
from fmda.methods.pretrain.dino_views import Image, ImageFolders
from fmda.methods.trainer import trainer_plan, trainer_stages
from fmda.models.module import abstract, init
from fmda.models.sd_vae import Vae, VaeConfig, signed
from fmda.png import write_png
from fmda.progress import track
from fmda.runs.plan import Plan
from fmda.runs.stages import Stage
from fmda.train import Objective, OptimConfig, Outcome, Task, TrainerConfig, TrainState
from fmda.weights.load import load_vae
from fmda.weights.network import Loaded, save


@dataclass(frozen=True, kw_only=True)
class Config(TrainerConfig):
    """Data, network and schedule of an autoencoder.

    Attributes:
        data: folders of images to train on.
        held: folders of images for the check; none of them may be in `data`.
        model: the network. `model.scale` is measured, not read.
        crop: side of the training crops, pixels, at the images' own scale.
        edges: weight of the error of differences between neighbouring pixels.
        kl: weight of the mean Kullback-Leibler divergence per latent, in nats.
        ema: share that the weight average keeps at each step.
    """

    data: tuple[Path, ...]
    held: tuple[Path, ...] = ()
    model: VaeConfig = field(
        default_factory=lambda: VaeConfig(channels=(16, 32, 64, 96), layers=1, groups=8, sample_size=128)
    )
    crop: PositiveInt = 64
    edges: NonNegativeFloat = 0.5
    kl: NonNegativeFloat = 1e-4
    steps: PositiveInt = 3000
    batch: PositiveInt = 16
    optim: OptimConfig = OptimConfig(learning_rate=1e-3, warmup_steps=100, weight_decay=0.0, clip_norm=1.0)
    ema: Decay = 0.998

    def __post_init__(self) -> None:
        """Raises UserError for crops that the network cannot halve, or images that are trained on and held."""
        if self.crop < self.model.factor or self.crop % self.model.factor:
            raise UserError(f"crop: {self.crop} is no multiple of {self.model.factor}, the pixels of a latent's side")
        check_disjoint(self.data, self.held)


@dataclass(frozen=True)
class Crop:
    """The transform (image, generator) -> {"pixels": uint8 [size, size, 3]}: a square at its own scale, mirrored."""

    size: int

    def __call__(self, image: Image, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns the crop."""
        height, width = image.shape[:2]
        if min(height, width) < self.size:
            raise UserError(f"crop: {self.size} pixels, but an image is {height}x{width}; choose a smaller crop")
        steps = Compose((RandomCrop((self.size, self.size)), RandomFlip()))
        return {"pixels": steps(Example(image, None, ""), rng).image}


def make_objective(graphdef: nnx.GraphDef, edges: float, kl: float) -> Objective:
    """Returns the objective: the weighted sum, with the metrics "pixel_error", "edge_error" and "kl"."""

    def objective(params: Any, state: TrainState, frozen: Any, batch: dict[str, Array], key: Array) -> Outcome:
        del state, frozen
        vae, images = nnx.merge(graphdef, params), signed(batch["pixels"])
        mean, logvar = vae.encode(images)
        drawn = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        error = vae.decode(drawn) - images
        pixel_error = jnp.abs(error).mean()
        edge_error = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
        divergence = 0.5 * (mean**2 + jnp.exp(logvar) - 1.0 - logvar).mean()
        metrics = {"pixel_error": pixel_error, "edge_error": edge_error, "kl": divergence}
        return Outcome(pixel_error + edges * edge_error + kl * divergence, metrics, {})

    return objective


def check(config: Config) -> None:
    """Raises UserError for images that are missing or damaged."""
    check_image_folders((*config.data, *config.held))


def stages(config: Config) -> list[Stage]:
    """Returns train, export (diffusers' layout) and, with held-out images, check."""
    return trainer_stages(
        config, lambda _: _task(config, ImageFolders(config.data)), _write, exported=config.model,
        check=_check if config.held else None, checked=config.held,
    )  # fmt: skip


def plan(config: Config) -> Plan:
    """Returns parameters, FLOPs and memory at the configured sizes."""
    blank = np.zeros((config.crop, config.crop, 3), np.uint8)
    return trainer_plan(config, _task(config, [blank]), stages(config), parts=("encoder", "decoder"), example="crop")


def _task(config: Config, images: Sequence[Image]) -> Task:
    def make(rngs: nnx.Rngs) -> Vae:
        return Vae(config.model, rngs=rngs)

    return Task(
        name="vae",
        objective=make_objective(abstract(make)[0], config.edges, config.kl),
        init=functools.partial(init, make),
        optim=config.optim,
        streams=Stream(images, Crop(config.crop), config.batch),
        teacher_decay=config.ema,
    )


def _write(config: Config, folder: Path, done: dict[str, Path], params: Any) -> dict[str, Any]:
    scale = measured_scale(Loaded("vae", config.model, params), ImageFolders(config.data), config.seed)
    save("vae", folder, dataclasses.replace(config.model, scale=scale), params, dtype=np.float16)
    return {"scale": scale}


def measured_scale(vae: Loaded, images: ImageFolders, seed: int, count: int = 100) -> float:
    """Returns 1 / deviation of the latents of some images (Rombach et al. 2022, appendix G)."""
    rows = np.random.default_rng((seed, 3)).permutation(len(images))[:count]
    means = [np.asarray(vae.encode(signed(_whole(images[int(i)], vae))[None])[0]) for i in track(rows, "latents")]
    return round(1.0 / float(np.std(np.concatenate([m.ravel() for m in means]))), 4)


def _whole(image: Image, vae: Loaded) -> Image:
    """Returns the image without what fills no whole latent."""
    height, width = (side - side % vae.config.factor for side in image.shape[:2])
    return image[:height, :width]


def _check(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    """Measures the error of held-out images that went through both halves, and draws some beside the result."""
    vae = load_vae(done["export"])
    result = {}
    for number, root in enumerate(config.held):
        images = ImageFolders([root])
        errors: list[float] = []
        shown: list[Image] = []
        for i in track(range(min(len(images), 50)), f"reconstruct {Path(root).name}"):
            image = _whole(images[i], vae)
            decoded = np.asarray(vae.decode(vae.encode(signed(image)[None])[0]))[0]
            decoded = np.clip((decoded + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)
            errors.append(float(np.mean((decoded.astype(np.float32) - image) ** 2)))
            pair = np.concatenate([image, decoded], axis=1)
            if len(shown) < 4 and pair.shape == (shown or [pair])[0].shape:
                shown.append(pair)
        result[str(root)] = {"psnr": round(float(np.mean(10 * np.log10(255**2 / np.array(errors)))), 2)}
        write_png(folder / f"{number}-{Path(root).name}.png", np.concatenate(shown))
    write_json(folder / "reconstruction.json", result)
    return result
