"""Configuration of CLOUDS' joint training."""

from dataclasses import dataclass, field
from typing import Literal

from fmda.config import (
    FREE,
    Decay,
    FolderOrName,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Share,
)
from fmda.data.config import DataConfig, ImagesConfig
from fmda.evaluate import Protocol
from fmda.methods.refine_labels import KEPT, THINGS
from fmda.methods.tune import TuneConfig
from fmda.methods.zero_shot import ZeroShotConfig
from fmda.sam import Improved
from fmda.train import OptimConfig, TrainerConfig

Mode = Literal["improved", "reference"]
EVERY: dict[Mode, int] = {"improved": 1, "reference": 100}
MOVED: dict[Mode, float] = {"improved": 0.02, "reference": 0.0}


@dataclass(frozen=True)
class Optimizer(OptimConfig):
    """AdamW of CLOUDS: norms, queries and the decoder's level codes do not decay, biases do."""

    learning_rate: NonNegativeFloat = 1e-5
    schedule: Literal["cosine", "linear", "poly", "step", "constant"] = "constant"
    weight_decay: NonNegativeFloat = 0.05
    no_decay: tuple[str, ...] = ("*norm*", "decoder/queries", "decoder/positions", "decoder/level")
    clip_norm: PositiveFloat | None = 0.01


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The average of earlier students that labels.

    Attributes:
        decay: share that it keeps at an update.
        every: steps between updates; None is 1, in the reference mode 100.
    """

    decay: Decay = 0.999
    every: PositiveInt | None = None


@dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """How generated images are labelled.

    Attributes:
        confidence: probability from which a pixel keeps the teacher's class; CLOUDS keeps all.
        sam: folder of the ONNX graphs of a SAM, or "street-sam"; None takes the teacher's label maps as they are.
        votes: how SAM's regions vote in the improved mode; the reference mode has the paper's points.
        things, kept: classes in these roles (`fmda.sam.Roles`), where the list has them.
        check_every: steps after which the labelling teacher may be renewed.
        moved: distance of the teacher from the one that labels, relative to its norm, from which it is; None is 0.02,
            in the reference mode 0, which renews it each time. What is trained of the encoder counts.
        ahead: batches whose labels are begun before they are needed.
        threads: images at work at once.
        cache_bytes: size of the folder of SAM's embeddings.
    """

    confidence: Share = 0.0
    sam: FolderOrName | None = None
    votes: Improved = field(default_factory=Improved)
    things: tuple[str, ...] = THINGS
    kept: tuple[str, ...] = KEPT
    check_every: PositiveInt = 100
    moved: NonNegativeFloat | None = None
    ahead: NonNegativeInt = field(default=2, metadata=FREE)
    threads: PositiveInt = field(default=2, metadata=FREE)
    cache_bytes: PositiveInt = field(default=4 << 30, metadata=FREE)


@dataclass(frozen=True, kw_only=True)
class Config(TrainerConfig):
    """Warm-up, data and schedule; the defaults are CLOUDS' from GTA5.

    Attributes:
        start: export of a run of kind `supervised` with `mask2former`, which is the warm-up, or of an earlier round.
        data: the labelled source; its classes are those of the warm-up.
        generated: generated images, at least as large as a crop.
        earlier: further ones, such as those of earlier rounds.
        val: what is scored, during training every `evaluate_steps` steps and at the end, there with the teacher too.
        mode: "reference" follows the released code: the teacher moves every 100 steps, points of the paper prompt SAM,
            mirrored images are labelled as such, pixels without a label are negative for every mask, crops lie on a
            diagonal. "improved": the teacher moves at each step, regions vote, pixels without a label are left out.
        factor: how often a generated image occurs for each time that a source image does.
        teacher, labels: see there.
        tune: how the encoder is trained too, of the teacher as of the student, under the paths `encoder/...` of
            `optim`; None freezes it, as in CLOUDS.
        hidden, patch: share of the patches of that side, pixels, which are hidden in the student's view of a generated
            image.
        zero_shot: how the CLIP classifies beside student and teacher, so in the labels too; None is as in the warm-up,
            `share: 0` not at all.
        resize: largest (long, short) side of a source image, which training multiplies within `scale`; None keeps it.
        crop, stride: training crop and scoring window, multiples of 32, and the step between windows, pixels.
        figures: generated images of the report.
    """

    start: FolderOrName
    data: DataConfig
    generated: ImagesConfig
    earlier: tuple[ImagesConfig, ...] = ()
    val: DataConfig
    mode: Mode = "improved"
    factor: PositiveFloat = 2.0
    teacher: TeacherConfig = TeacherConfig()
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    tune: TuneConfig | None = None
    hidden: Share = 0.0
    patch: PositiveInt = 64
    zero_shot: ZeroShotConfig | None = None
    resize: tuple[PositiveInt, PositiveInt] | None = None
    scale: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0)
    crop: PositiveInt = 768
    stride: PositiveInt = 512
    steps: PositiveInt = 40000
    batch: PositiveInt = 8
    optim: Optimizer = Optimizer()
    evaluate_steps: NonNegativeInt = field(default=4000, metadata=FREE)
    figures: NonNegativeInt = field(default=4, metadata=FREE)

    @property
    def protocol(self) -> Protocol:
        """How images are scored."""
        maps = () if self.val.class_map is None else (str(self.val.class_map),)
        return Protocol(resize=self.resize, crop=self.crop, stride=self.stride, class_map=maps)

    @property
    def teacher_every(self) -> int:
        """Steps between updates of the teacher."""
        return self.teacher.every or EVERY[self.mode]

    @property
    def moved(self) -> float:
        """Distance at which the labelling teacher is renewed."""
        return MOVED[self.mode] if self.labels.moved is None else self.labels.moved
