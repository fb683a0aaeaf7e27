"""The settings of a FLOSS run, as frozen dataclasses."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fmda.config import FREE, FileOrName, FolderOrName, NonNegativeInt, PositiveInt
from fmda.data import ClassList, Dataset, open_dataset, prompts, templates
from fmda.data.config import DataConfig
from fmda.errors import UserError
from fmda.methods.class_text import Queries
from fmda.methods.floss.chain import Resolution
from fmda.methods.floss.criteria import Criterion
from fmda.methods.floss.hosts import HostConfig, host_for
from fmda.methods.floss.predict import Fusion
from fmda.methods.floss.selection import Guards


@dataclass(frozen=True, kw_only=True)
class ScoredConfig(DataConfig):
    """The labelled images that host and FLOSS are scored on."""

    split: str = "val"


@dataclass(frozen=True)
class UnlabelledConfig:
    """The images that templates are ranked on. Their labels are never opened.

    Attributes:
        name, root: default: those of the scored data.
        split: default "train", or all images of a folder without splits.
        images: budget, drawn by `seed`; default all.
    """

    name: str | None = None
    root: Path | None = None
    split: str | None = None
    images: PositiveInt | None = None
    seed: NonNegativeInt = 0

    def open(self) -> Dataset:
        """Returns all images of the split, without labels."""
        assert self.name is not None  # see `Config.ranked`
        try:
            return open_dataset(self.name, self.root, self.split or "train", labels=False)
        except UserError:
            if self.name != "folder" or self.split is not None:
                raise
            # a flat folder has no splits
            return open_dataset(self.name, self.root, "all", labels=False)


@dataclass(frozen=True)
class RankingConfig:
    """How templates are ranked.

    Attributes:
        criterion: see `criteria.CRITERIA`.
        resolution: where pixels are compared: at the size of the image, the network's input, or the patches.
        flip: also process mirrored images (for the criterion "flip"); doubles the work.
        chunk: templates at a time on a device.
        save_every: groups of images between two writes of the resumable state.
        file: an existing ranking; no image is ranked then.
    """

    criterion: Criterion = "entropy"
    resolution: Resolution = "original"
    flip: bool = False
    chunk: PositiveInt = field(default=4, metadata=FREE)
    save_every: PositiveInt = field(default=8, metadata=FREE)
    file: Path | None = None


@dataclass(frozen=True)
class Config:
    """A FLOSS run: rank templates on unlabelled images, choose experts, score host and FLOSS.

    Attributes:
        clip: folder, name of a model of the package, or hub id; `revision` for the hub.
        host: `name` (maskclip, naclip, clip-dinoiser) and any field of `HostConfig` to change.
        heads: folder of CLIP-DINOiser's heads; default: beside the weights of `clip`.
        classes: class list whose names become prompts; default: that of the scored or the unlabelled data.
        templates: a known set or a text file with one template a line.
        data: labelled images to score on; without them the run ranks templates and leaves a model.
        n: templates an expert, or "auto": chosen without labels among `n_candidates` on `n_images` unlabelled images.
        guards: conditions on templates besides their risk.
        fusion: "exact", "reference" (equal and slow) or "patch" (fast, not equal).
        background: class of patches without an object (CLIP-DINOiser only).
        compare_criteria: also score all label-free criteria, on the scored images.
    """

    clip: FolderOrName = "street-clip"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    host: dict[str, Any] = field(default_factory=lambda: {"name": "maskclip"})
    heads: FolderOrName | None = None
    classes: FileOrName | None = None
    templates: FileOrName = "imagenet80"
    data: ScoredConfig | None = None
    unlabelled: UnlabelledConfig = UnlabelledConfig()
    ranking: RankingConfig = RankingConfig()
    n: PositiveInt | Literal["auto"] = 4
    n_candidates: tuple[PositiveInt, ...] = (1, 2, 4, 8, 16)
    n_images: PositiveInt = 16
    guards: Guards = Guards()
    fusion: Fusion = "exact"
    background: str | None = None
    compare_criteria: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for invalid combinations, before anything is loaded."""
        if self.data is None and self.unlabelled.name is None:
            raise UserError("data: missing; name labelled images under data, or only unlabelled ones under unlabelled")
        host = self.host_config()
        if self.ranking.criterion == "flip" and not self.ranking.flip and self.ranking.file is None:
            raise UserError("ranking.criterion: 'flip' needs mirrored images; set ranking.flip=true")
        if self.background is not None and host.features != "clip-dinoiser":
            raise UserError("background: only clip-dinoiser detects background; choose that host or remove the key")
        if host.pamr_steps and (self.background is not None or self.compare_criteria or self.ranking.file is None):
            raise UserError(
                "host.pamr_steps: PAMR refines the host alone, without background, ranking or compare_criteria; "
                "set it to 0, or name ranking.file"
            )
        if self.compare_criteria and (self.data is None or self.ranking.resolution != "original"):
            raise UserError("compare_criteria: needs labelled data and ranking.resolution=original")

    @property
    def ranked(self) -> UnlabelledConfig:
        """The unlabelled data; name and root are those of the scored data unless it has a name of its own."""
        if self.unlabelled.name is not None or self.data is None:
            return self.unlabelled
        return replace(self.unlabelled, name=self.data.name, root=self.unlabelled.root or self.data.root)

    @property
    def target(self) -> ScoredConfig | UnlabelledConfig:
        """The data whose classes and published host settings are the default: scored, else unlabelled."""
        return self.ranked if self.data is None else self.data

    def host_config(self) -> HostConfig:
        """Returns the host with its settings for the dataset and the configured changes."""
        return host_for(self.host, str(self.target.name))

    def queries(self, classes: ClassList) -> Queries:
        """Returns the names that are put into the templates."""
        return Queries.of(prompts(classes, self.host_config().prompts))

    def template_list(self) -> tuple[str, ...]:
        """Returns the templates."""
        return templates(self.templates)
