"""Everything a FLOSS run can be told, as frozen dataclasses."""

from dataclasses import dataclass, field
from typing import Any, Literal

from fmda.data import class_list, prompts, templates
from fmda.data.classes import ClassList
from fmda.errors import UserError
from fmda.methods.floss.chain import Resolution
from fmda.methods.floss.criteria import CRITERIA
from fmda.methods.floss.hosts import HostConfig, host_for
from fmda.methods.floss.predict import Fusion
from fmda.methods.floss.selection import Guards
from fmda.methods.floss.text import Queries


@dataclass(frozen=True)
class DataConfig:
    """The labelled images that host and FLOSS are scored on.

    Attributes:
        name, root, split: as `fmda.open_dataset` takes them.
        class_map: leads from the classes that are predicted to those of the labels, where they differ.
        limit: score the first so many images.
    """

    name: str = "cityscapes"
    root: str | None = None
    split: str = "val"
    class_map: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class UnlabelledConfig:
    """The images the ranking looks at. Their labels are never opened.

    Attributes:
        name, root: default: those of the scored data.
        split: which part; default "train".
        images: budget, drawn by `seed`; default all.
    """

    name: str | None = None
    root: str | None = None
    split: str = "train"
    images: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class RankingConfig:
    """How templates are ranked.

    Attributes:
        criterion: one of `criteria.CRITERIA`.
        resolution: where pixels are judged: the photograph's size, the network's, or patches.
        flip: look at mirrored images too (for the criterion "flip"); doubles the work.
        chunk: templates at a time on a device.
        save_every: groups of images between two writes of the resumable state.
        file: a ranking made before, here or elsewhere; nothing is ranked then.
    """

    criterion: str = "entropy"
    resolution: Resolution = "original"
    flip: bool = False
    chunk: int = 4
    save_every: int = 8
    file: str | None = None


@dataclass(frozen=True)
class Config:
    """A FLOSS run: rank templates on unlabelled images, choose experts, score host and FLOSS.

    Attributes:
        clip: folder, name of a model of the package, or hub id; `revision` for the hub.
        host: `name` (maskclip, naclip, clip-dinoiser) and any field of `HostConfig` to change.
        heads: folder of CLIP-DINOiser's heads; default: beside the weights of `clip`.
        classes: class list whose names become prompts; default: that of the scored data.
        templates: a known set or a text file with one template a line.
        n: templates an expert, or "auto": chosen without labels among `n_candidates` on `n_images` unlabelled images.
        guards: conditions on templates besides their risk.
        fusion: "exact", "reference" (equal and slow) or "patch" (fast, not equal).
        background: class that takes what looks like no object (CLIP-DINOiser only).
        compare_criteria: also score all label-free criteria, on the scored images.
    """

    clip: str = "street-clip"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    host: dict[str, Any] = field(default_factory=lambda: {"name": "maskclip"})
    heads: str | None = None
    classes: str | None = None
    templates: str = "imagenet80"
    data: DataConfig = DataConfig()
    unlabelled: UnlabelledConfig = UnlabelledConfig()
    ranking: RankingConfig = RankingConfig()
    n: int | Literal["auto"] = 4
    n_candidates: tuple[int, ...] = (1, 2, 4, 8, 16)
    n_images: int = 16
    guards: Guards = Guards()
    fusion: Fusion = "exact"
    background: str | None = None
    compare_criteria: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for what cannot work, before anything is loaded."""
        host = self.host_config()
        if self.ranking.criterion not in CRITERIA:
            raise UserError(
                f"ranking.criterion: '{self.ranking.criterion}' is none of the choices; known: {', '.join(CRITERIA)}"
            )
        if self.ranking.criterion == "flip" and not self.ranking.flip and self.ranking.file is None:
            raise UserError("ranking.criterion: 'flip' needs mirrored images; set ranking.flip=true")
        if self.background is not None and host.features != "clip-dinoiser":
            raise UserError("background: only clip-dinoiser knows what is no object; take that host or leave it out")
        if host.pamr_steps and self.ranking.file is None:
            raise UserError("host.pamr_steps: PAMR refines the host alone; set it to 0, or name ranking.file")
        if isinstance(self.n, int) and self.n < 1:
            raise UserError(f"n: {self.n} templates make no expert; give 1 or more, or auto")

    def host_config(self) -> HostConfig:
        """Returns the host with the settings for the scored data and one's own."""
        return host_for(self.host, self.data.name)

    def class_list(self, of_data: ClassList | None = None) -> ClassList:
        """Returns the classes that are predicted."""
        if self.classes is not None:
            return class_list(self.classes)
        return class_list(self.data.name) if of_data is None else of_data

    def queries(self, classes: ClassList) -> Queries:
        """Returns the names that are put into the templates."""
        return Queries.of(prompts(classes, self.host_config().prompts))

    def template_list(self) -> tuple[str, ...]:
        """Returns the templates."""
        return templates(self.templates)
