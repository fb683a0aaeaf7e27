"""Configuration of a personalisation; the defaults are the paper's."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fmda.config import (
    FREE,
    DataPath,
    Decay,
    FolderOrName,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from fmda.diffusion.draw import SamplerConfig
from fmda.errors import UserError
from fmda.methods.datum.dreambooth import NoiseConfig
from fmda.methods.datum.stop import ProbeConfig
from fmda.methods.generate import PromptConfig
from fmda.models.sd_unet import Remat
from fmda.train import OptimConfig, TrainerConfig


@dataclass(frozen=True)
class Optimizer(OptimConfig):
    """AdamW as DreamBooth's: a constant rate, decay of every parameter, one clip over all networks together."""

    learning_rate: NonNegativeFloat = 5e-6
    schedule: Literal["cosine", "linear", "poly", "step", "constant"] = "constant"
    weight_decay: NonNegativeFloat = 1e-2
    no_decay: tuple[str, ...] = ()
    clip_norm: PositiveFloat | None = 1.0


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of the attention's projections (Hu et al. 2022).

    Attributes:
        rank: of an adapter.
        alpha: an adapter is multiplied by alpha / rank.
        text: whether the text encoder gets adapters too.
    """

    rank: PositiveInt = 8
    alpha: PositiveFloat = 8.0
    text: bool = True


@dataclass(frozen=True)
class PriorConfig:
    """Prior preservation (Ruiz et al. 2023, eq. 2): the model keeps drawing images of the class as it did before.

    Attributes:
        weight: of the loss on class images.
        prompt: of the class images, without the token.
        images: folder of class images; None: the untouched model draws them before training.
        count: class images to draw.
        batch: class images drawn at once.
        sampler: how they are drawn.
    """

    weight: PositiveFloat = 1.0
    prompt: str = "a photo of an urban scene"
    images: Path | None = None
    count: PositiveInt = 200
    batch: PositiveInt = 4
    sampler: SamplerConfig = SamplerConfig()


@dataclass(frozen=True, kw_only=True)
class Config(TrainerConfig):
    """Personalisation of a latent diffusion model on one target image.

    Attributes:
        image: the target image, or its name below FMDA_DATA.
        model, revision: the diffusion model: a folder in diffusers' layout, a model of the package, or a hub id.
        token: the rare word that will stand for the target.
        prompt: the caption of every crop; contains the token.
        trained: all weights of UNet and text encoder, of the UNet alone, or low-rank adapters.
        lora: the adapters, where they are what is trained.
        prior: prior preservation; None for none.
        noise: what is added to the latents, and when.
        resize: the image's shorter side, pixels; None leaves the image as it is.
        crop: side of the crops, pixels.
        bank: crops that are drawn and encoded once, before training; 0 draws and encodes new ones at each step.
        accumulate: parts that a batch is taken in.
        ema: share that an average of the weights keeps at each step; None keeps none.
        snapshots: steps at which the weights are kept; None for every fifth of the run.
        probe: images of every snapshot, whose curves choose a step without labels; None draws none.
        export: of the snapshots (0 is the untouched model) those written in diffusers' layout, by their step; None for
            the chosen one, as `chosen`, and without probes for the last.
        store: number format of snapshots and exported models.
        precision: "bfloat16" computes in it; parameters, moments and losses stay in float32.
        remat: what is kept for the backward pass of the UNet.
        device_memory: GiB of a device; None reads it from the device, if it has a limit.
    """

    image: DataPath
    model: FolderOrName = "CompVis/stable-diffusion-v1-4"
    revision: str | None = None
    token: str = "sks"
    prompt: str = "a photo of a sks urban scene"
    trained: Literal["unet+text", "unet", "lora"] = "unet+text"
    lora: LoraConfig = LoraConfig()
    prior: PriorConfig | None = None
    noise: NoiseConfig = NoiseConfig()
    resize: PositiveInt | None = 1024
    crop: PositiveInt = 512
    bank: NonNegativeInt = 0
    steps: PositiveInt = 1000
    batch: PositiveInt = 1
    accumulate: PositiveInt = 1
    optim: Optimizer = field(default_factory=Optimizer)
    ema: Decay | None = None
    snapshots: tuple[int, ...] | None = None
    probe: ProbeConfig | None = field(default=None, metadata=FREE)
    export: tuple[int, ...] | None = field(default=None, metadata=FREE)
    store: Literal["float16", "bfloat16", "float32"] = "float16"
    precision: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    device_memory: PositiveFloat | None = field(default=None, metadata=FREE)

    def __post_init__(self) -> None:
        """Raises UserError for values that contradict each other."""
        if self.token not in self.prompt.split():
            raise UserError(f"prompt: '{self.prompt}' does not hold the token '{self.token}'; put it there as a word")
        if self.resize is not None and self.resize < self.crop:
            raise UserError(f"crop: {self.crop} pixels of a side of {self.resize}; choose a smaller crop")
        if self.batch % self.accumulate:
            raise UserError(
                f"accumulate: a batch of {self.batch} is not taken in {self.accumulate} parts; give a divisor"
            )
        if self.minutes is not None:
            raise UserError("minutes: a personalisation ends at its snapshots, not by the clock; set steps instead")
        if self.probe is not None and self.probe.prompts.token not in (PromptConfig.token, self.token):
            raise UserError(
                f"probe.prompts.token: '{self.probe.prompts.token}', but the model learns '{self.token}'; leave it out"
            )
        steps = self.snapshot_steps
        if not steps or list(steps) != sorted(set(steps)) or not all(1 <= step <= self.steps for step in steps):
            raise UserError(
                f"snapshots: {list(steps)} must name steps, rising from 1 or later to {self.steps} at most; fix them"
            )
        for step in self.export or ():
            if step not in (0, *steps):
                raise UserError(f"export: step {step} is no snapshot; choose of {[0, *steps]}, or add it to snapshots")

    @property
    def snapshot_steps(self) -> tuple[int, ...]:
        """The steps at which weights are kept, rising."""
        if self.snapshots is not None:
            return self.snapshots
        return tuple(sorted({max(1, round(self.steps * part / 5)) for part in range(1, 6)}))

    @property
    def probed_steps(self) -> tuple[int, ...]:
        """The steps that probes are drawn of: the untouched model and every snapshot."""
        return (0, *self.snapshot_steps)

    @property
    def trained_parts(self) -> tuple[str, ...]:
        """The networks that are changed, by all their weights or by adapters."""
        text = self.trained == "unet+text" or self.trained == "lora" and self.lora.text
        return ("unet", "text_encoder") if text else ("unet",)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The caption of the target's crops and, with prior preservation, that of class images."""
        return (self.prompt,) if self.prior is None else (self.prompt, self.prior.prompt)
