"""A small Stable Diffusion from street scenes and their captions: latents, UNet, export in diffusers' layout.

The autoencoder comes from `vae`, the text encoder is a CLIP's text tower as it is; the UNet learns to predict the
velocity (or the noise) of noisy latents from their caption, which is left empty now and then, so that guidance works
(Rombach et al. 2022; Ho and Salimans 2022).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from fmda.atomic import write_json
from fmda.config import Bounds, Decay, FolderOrName, PositiveFloat, PositiveInt, Share
from fmda.data.streams import Stream
from fmda.diffusion.draw import SamplerConfig, make_draw
from fmda.diffusion.load import StableDiffusion, load_stable_diffusion, save_stable_diffusion
from fmda.diffusion.schedule import ScheduleConfig, add_noise, alphas_cumprod, training_target
from fmda.errors import UserError
from fmda.mesh import make_mesh
from fmda.methods.generate.checks import check_weights
from fmda.methods.pretrain.checks import check_disjoint, check_scenes
from fmda.methods.pretrain.crops import Drawn
from fmda.methods.pretrain.diffusion_check import compare, cut_windows, sheet
from fmda.methods.pretrain.latents import Latents, WindowConfig, caption_maker, check_networks, write_latents
from fmda.methods.trainer import plan_without_sizes, trainer_plan, trainer_stages
from fmda.models.module import abstract, init
from fmda.models.sd_unet import UNet, UNetConfig
from fmda.png import write_png
from fmda.progress import track
from fmda.runs.plan import Plan
from fmda.runs.stages import Stage, pending
from fmda.train import Objective, OptimConfig, Outcome, Task, TrainerConfig, TrainState
from fmda.train.step import rising
from fmda.weights.checkpoint import weight_fingerprint
from fmda.weights.load import load_clip, load_vae, part_folder
from fmda.weights.network import Loaded

SHOWN = 16
"""Images in the overview of the check."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the UNet; channels of latents and width of texts follow from the other networks."""

    channels: tuple[PositiveInt, ...] = (64, 128, 192)
    layers: PositiveInt = 1
    attention: tuple[bool, ...] = (True, True, True)
    heads: tuple[PositiveInt, ...] = (2, 4, 6)
    groups: PositiveInt = 8

    def __post_init__(self) -> None:
        """Raises UserError where the lists are of different lengths, or heads and groups do not divide widths."""
        if not len(self.channels) == len(self.attention) == len(self.heads):
            raise UserError("model: channels, attention and heads name different numbers of levels; fix the lists")
        if any(w % h or w % self.groups for w, h in zip(self.channels, self.heads, strict=True)):
            raise UserError("model: heads and groups must divide the channels of their level; choose divisors")


@dataclass(frozen=True, kw_only=True)
class Config(TrainerConfig):
    """Data, networks and schedule of a small latent diffusion model.

    Attributes:
        data: rendered folders, or `Drawn` domains, to train on.
        held: rendered folders for the check; none of them may be in `data`.
        vae: folder of the autoencoder, or of a checkpoint that holds one.
        clip: the CLIP whose text tower reads the captions.
        model: the UNet.
        windows: what of the images is learned, and how it is described.
        prediction: what the UNet predicts.
        drop: share of the examples whose caption is left empty.
        min_snr: signal-to-noise ratio above which a noise level counts less and less; None: all count alike.
        ema: share that the weight average keeps at each step, once it has risen to it.
        check_images: images that the check draws from captions of held-out windows.
        check_sample: how it samples them.
    """

    data: tuple[Path | Drawn, ...]
    held: tuple[Path | Drawn, ...] = ()
    vae: FolderOrName
    clip: FolderOrName = "street-clip"
    model: ModelConfig = ModelConfig()
    windows: WindowConfig = WindowConfig()
    prediction: Literal["epsilon", "v_prediction"] = "v_prediction"
    drop: Share = 0.1
    min_snr: PositiveFloat | None = 5.0
    steps: PositiveInt = 20000
    batch: PositiveInt = 32
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(learning_rate=6e-4, warmup_steps=200, weight_decay=0.01, clip_norm=1.0)
    )
    ema: Decay = 0.999
    check_images: Annotated[int, Bounds(SHOWN)] = 256
    check_sample: SamplerConfig = SamplerConfig(sampler="dpm++2m", steps=20, guidance=3.0)

    def __post_init__(self) -> None:
        """Raises UserError for folders that are both trained on and held out."""
        check_disjoint(self.data, self.held)


@dataclass(frozen=True)
class Networks:
    """What the UNet is trained with: text tower, autoencoder, and the configurations that follow from them."""

    clip: Loaded
    vae: Loaded
    unet: UNetConfig
    schedule: ScheduleConfig

    @property
    def text(self) -> Loaded:
        """The text tower without its projection."""
        params = {name: leaf for name, leaf in self.clip.params["text"].items() if name != "projection"}
        return Loaded("text_encoder", self.clip.config.text, params)

    @property
    def digest(self) -> str:
        """12 hex digits that change with any frozen parameter: a run goes on only with the networks it began with."""
        return weight_fingerprint({"vae": self.vae.params, "text": self.text.params}, self.vae.config)

    def padded(self, texts: Sequence[str]) -> Int[np.ndarray, "b t"]:
        """Returns the ids of texts at the text tower's whole context, padded as the UNet reads them."""
        assert self.clip.tokenizer is not None
        return self.clip.tokenizer.padded(texts, self.clip.config.text.context)[0]


def load_networks(config: Config) -> Networks:
    """Returns the frozen networks. Raises UserError for a CLIP without tokenizer, or windows that do not fit."""
    clip, vae = load_clip(config.clip), load_vae(config.vae)
    if clip.tokenizer is None:
        raise UserError(f"clip: {config.clip} holds no tokenizer; name a CLIP with its tokenizer files")
    sizes = config.model
    side = config.windows.size // vae.config.factor
    unet = UNetConfig(
        in_channels=vae.config.latent_channels, out_channels=vae.config.latent_channels, channels=sizes.channels,
        layers=sizes.layers, attention=sizes.attention, heads=sizes.heads, groups=sizes.groups,
        context_width=clip.config.text.width, linear_projection=True, sample_size=side,
    )  # fmt: skip
    if config.windows.size % vae.config.factor or side % unet.factor:
        raise UserError(
            f"windows.size: {config.windows.size} is no multiple of {vae.config.factor * unet.factor}, the pixels of "
            "the UNet's coarsest place; choose one"
        )
    return Networks(clip, vae, unet, ScheduleConfig(prediction=config.prediction))


def check(config: Config) -> None:
    """Raises UserError for scenes, an autoencoder or a CLIP that are missing or damaged."""
    check_scenes((*config.data, *config.held))
    check_weights(config.clip)
    if not pending(config.vae):
        part_folder(config.vae, "vae")


def stages(config: Config) -> list[Stage]:
    """Returns latents, train, export (diffusers' layout) and, with held-out images, check."""
    bank = [config.data, config.vae, config.clip, config.windows, config.seed]
    latents = Stage("latents", functools.partial(_latents, config), bank, alone=True)
    return trainer_stages(
        config, functools.partial(_training, config), _write, exported=config.model, before=[latents],
        check=_check if config.held else None, checked=[config.held, config.check_images, config.check_sample],
    )  # fmt: skip


def plan(config: Config) -> Plan:
    """Returns parameters, FLOPs and memory, where CLIP and autoencoder are on this machine."""
    steps = stages(config)
    if without := plan_without_sizes(steps, clip=config.clip, vae=config.vae):
        return without
    networks = load_networks(config)
    side, channels = networks.unet.sample_size, networks.unet.in_channels
    window = {"moments": np.zeros((side, side, 2 * channels), np.float16), "ids": networks.padded([""])[0]}
    return trainer_plan(config, _task(config, networks, [window]), steps, example="window")


def loss_weights(schedule: ScheduleConfig, min_snr: float | None) -> Float[np.ndarray, " t"]:
    """Returns what the squared error of each noise level counts: min(SNR, min_snr) as an error of the clean latents.

    Noise levels compete for the weights of one network; where hardly any noise is left there is little to learn, and
    yet it would take most of the gradient (Hang et al. 2023, section 3.4).
    """
    left = alphas_cumprod(schedule)
    if min_snr is None:
        return np.ones_like(left)
    snr = left / (1 - left)
    # an error of the velocity is (SNR + 1) times one of the clean latents, of the noise SNR times
    return np.minimum(snr, min_snr) / (snr + 1 if schedule.prediction == "v_prediction" else snr)


def make_objective(
    unet: nnx.GraphDef,
    text: nnx.GraphDef,
    schedule: ScheduleConfig,
    scale: float,
    drop: float,
    min_snr: float | None = None,
) -> Objective:
    """Returns the objective: the mean squared error of the prediction (Ho et al. 2020, eq. 14).

    Noise levels count by `loss_weights`; the metric "error" is the loss without them.
    `params` are the UNet's. `frozen` holds "text", the text tower's parameters, and "empty", the ids [T] of no
    caption. `batch` holds "moments", mean and log-variance of latents [B, h, w, 2c], and "ids" [B, T].
    """
    weights = loss_weights(schedule, min_snr)

    def objective(params: Any, state: TrainState, frozen: Any, batch: dict[str, Array], key: Array) -> Outcome:
        del state
        keys = jax.random.split(key, 4)
        mean, logvar = jnp.split(batch["moments"].astype(jnp.float32), 2, axis=-1)
        clean = (mean + jnp.exp(0.5 * logvar) * jax.random.normal(keys[0], mean.shape)) * scale
        noise = jax.random.normal(keys[1], mean.shape)
        times = jax.random.randint(keys[2], mean.shape[:1], 0, schedule.train_steps)
        dropped = jax.random.bernoulli(keys[3], drop, mean.shape[:1])
        ids = jnp.where(dropped[:, None], frozen["empty"][None], batch["ids"])
        context = nnx.merge(text, frozen["text"]).hidden(ids)
        prediction = nnx.merge(unet, params)(add_noise(schedule, clean, noise, times), times, context)
        error = ((prediction - training_target(schedule, clean, noise, times)) ** 2).mean((1, 2, 3))
        return Outcome((error * jnp.asarray(weights)[times]).mean(), {"error": error.mean()}, {})

    return objective


def _latents(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    networks = load_networks(config)
    captions = caption_maker(config.windows, networks.padded)
    digest = networks.digest
    count = write_latents(config.windows, networks.vae, captions, config.data, folder, config.seed, digest)
    return {"windows": count}


def _task(config: Config, networks: Networks, windows: Sequence[Any]) -> Task:
    def make(rngs: nnx.Rngs) -> UNet:
        return UNet(networks.unet, rngs=rngs)

    text, scale = networks.text, networks.vae.config.scale
    return Task(
        name="latent diffusion",
        objective=make_objective(
            abstract(make)[0], text.graphdef, networks.schedule, scale, config.drop, config.min_snr
        ),
        init=functools.partial(init, make),
        optim=config.optim,
        streams=Stream(windows, None, config.batch),
        frozen={"text": text.params, "empty": networks.padded([""])[0]},
        teacher_decay=rising(config.ema),
        facts={"weights": networks.digest},
    )


def _training(config: Config, done: dict[str, Path]) -> Task:
    networks = load_networks(config)
    check_networks(done["latents"], networks.digest)
    return _task(config, networks, Latents(done["latents"]))


def _write(config: Config, folder: Path, done: dict[str, Path], params: Any) -> None:
    networks = load_networks(config)
    check_networks(done["latents"], networks.digest)
    assert networks.clip.tokenizer is not None
    unet, text = Loaded("unet", networks.unet, params), networks.text
    model = StableDiffusion(unet, networks.vae, text, networks.clip.tokenizer, networks.schedule, folder)
    if not (folder / "model").is_dir():
        # it appears whole: what is there was written before an interruption
        save_stable_diffusion(folder / "model", model, dtype=np.float16)


def _check(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    """Draws images from captions of held-out windows, and measures them beside the windows themselves."""
    networks = load_networks(config)
    model = load_stable_diffusion(done["export"] / "model")
    captions = caption_maker(config.windows, networks.padded)
    held_out = cut_windows(config.windows, captions, config.held, config.check_images, config.seed)
    train = cut_windows(config.windows, captions, config.data, 4 * config.check_images, config.seed)
    draw = make_draw(model, config.check_sample, make_mesh(devices=jax.local_devices()))
    batch, parts = 16, []
    for first in track(range(0, len(held_out.captions), batch), "draw", unit="batches"):
        texts = held_out.captions[first : first + batch]
        parts.append(draw(texts, range(first, first + len(texts))))
    drawn = np.concatenate(parts)
    result = compare(networks.clip, train, held_out, drawn)
    write_png(folder / "samples.png", sheet(drawn, held_out.captions, SHOWN))
    write_json(folder / "quality.json", result)
    return result
