"""Configuration of a set of generated images, and the prompts that follow from it."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fmda.config import FREE, DataPath, FolderOrName, NonNegativeInt, PositiveFloat, PositiveInt, Share
from fmda.diffusion.draw import SamplerConfig
from fmda.diffusion.manifest import Prompt
from fmda.errors import UserError
from fmda.methods.endpoint import Endpoint
from fmda.runs.journal import read_rows
from fmda.text import read_lines

THINGS: dict[str, str] = {
    "traffic light": "traffic lights",
    "traffic sign": "traffic signs",
    "person": "persons",
    "rider": "riders",
    "car": "cars",
    "truck": "trucks",
    "train": "trains",
    "bus": "buses",
    "motorcycle": "motorcycles",
    "bicycle": "bicycles",
}
"""Cityscapes' classes that DATUM prompts for, in its order, and their plurals."""

STUFF: dict[str, str] = {
    "road": "roads",
    "sidewalk": "sidewalks",
    "building": "buildings",
    "wall": "walls",
    "fence": "fences",
    "pole": "poles",
    "vegetation": "vegetation",
    "terrain": "terrain",
    "sky": "skies",
}
"""Cityscapes' other classes, which may be prompted for too, and their plurals."""


@dataclass(frozen=True)
class PromptConfig:
    """Prompts of the images. Give `form` and `classes`, or `file`, or `texts`.

    Attributes:
        form: prompt with the slots {token} and {classes} (plural) or {class} (singular).
        token: the rare word of a personalised model.
        classes: of `THINGS` and `STUFF`; each gives a prompt, in this order.
        file: a text file with one prompt on each line, or the `prompts.jsonl` of kind `prompts`, which names classes.
        texts: prompts as they are.
    """

    form: str = "a photo of {token} {classes}"
    token: str = "sks"
    classes: tuple[str, ...] = tuple(THINGS)
    file: Path | None = None
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class FilterConfig:
    """What is refused; None leaves a filter out. Scores and presence are read from the images by a CLIP.

    Attributes:
        clip: the CLIP that judges.
        clip_score: least cosine of an image and its prompt.
        near_duplicate: largest cosine of two images.
        class_presence: least share of a 4 x 4 grid of crops in which the prompt's class is the likeliest of all.
        banned: words that no prompt may contain.
        similar_prompt: largest share of common words of two prompts of a class.
        long_prompt: whether prompts that the text encoder does not read to their end are refused; else they are cut,
            with a warning that shows what was lost.
        unclipped: least share of pixels that are not 0 or 255 in every channel.
        textured: least share of an image's 8 x 8 tiles that are not of one colour.
        judge: a vision-language model that looks at each image and may edit its prompt for the next try. `clip_score`
            and `class_presence` then judge the images for which it gives no verdict.
    """

    clip: FolderOrName = "openai/clip-vit-base-patch16"
    clip_score: float | None = None
    near_duplicate: float | None = None
    class_presence: Share | None = None
    banned: tuple[str, ...] = ()
    similar_prompt: Share | None = None
    long_prompt: bool = False
    unclipped: Share | None = None
    textured: Share | None = None
    judge: Endpoint | None = None

    @property
    def judge_images(self) -> bool:
        """Whether any filter judges images by a CLIP."""
        return any(value is not None for value in (self.clip_score, self.near_duplicate, self.class_presence))


@dataclass(frozen=True, kw_only=True)
class CopyConfig:
    """How generated images are compared with the one image that the model was personalised on.

    Attributes:
        image: that image at the scale of its training, such as `prepare/target.png` of a personalisation.
        others: folder of further images of the target domain, or its name below FMDA_DATA; they tell how alike two of
            them are. None: none.
        encoder: whose patches are compared: a DINO, a DINOv2 or a CLIP.
        crops: of the image.
        count: images that are compared at most, generated and others.
        seed: of the crops.
    """

    image: Path
    others: DataPath | None = None
    encoder: FolderOrName = "street-dino"
    crops: PositiveInt = 32
    count: PositiveInt = 100
    seed: NonNegativeInt = 0


@dataclass(frozen=True)
class Config:
    """A set of generated images.

    Attributes:
        model: a latent diffusion model: folder in diffusers' layout, model of the package, or hub id.
        revision: of a hub id.
        prompts: of the images.
        count: images; image j shows prompt j modulo their number. A later run may ask for more.
        batch: images drawn at once, on all devices of a process.
        seed: decides every image, together with its index.
        sample: how images are sampled.
        filters: what is refused and drawn again.
        copies: comparison with the image that the model was personalised on; None leaves it out.
        tries: images of one index at most.
        dtype: that the networks compute in.
        mesh: sizes of the axes data and fsdp within a process; -1 takes the rest of its devices.
        device_memory: GiB of a device; None reads it from the device, if it has a limit.
    """

    model: FolderOrName
    revision: str | None = None
    prompts: PromptConfig = PromptConfig()
    count: PositiveInt = field(default=2975, metadata=FREE)
    batch: PositiveInt = field(default=8, metadata=FREE)
    seed: NonNegativeInt = 0
    sample: SamplerConfig = SamplerConfig()
    filters: FilterConfig = FilterConfig()
    copies: CopyConfig | None = field(default=None, metadata=FREE)
    tries: PositiveInt = field(default=8, metadata=FREE)
    dtype: Literal["float32", "bfloat16"] = "float32"
    mesh: tuple[int, int] = (-1, 1)
    device_memory: PositiveFloat | None = field(default=None, metadata=FREE)


def make_prompts(config: PromptConfig) -> list[Prompt]:
    """Returns the prompts in order. Raises UserError for an unknown class, slot, or empty file."""
    if config.texts and config.file is not None:
        raise UserError(f"prompts: both texts and a file ({config.file}) are set; remove one of them")
    if config.texts:
        return [Prompt(text) for text in config.texts]
    if config.file is not None:
        try:
            written = config.file.suffix == ".jsonl"
            prompts = _of_rows(config.file) if written else [Prompt(text) for text in read_lines(config.file)]
        except UserError as fault:
            raise UserError(f"prompts.file: {fault}") from None
        if not prompts:
            raise UserError(f"prompts.file: {config.file} holds no prompt; write one on each line")
        return prompts
    if not config.classes:
        raise UserError("prompts.classes: names no class; give some, or a file or texts")
    if re.search("[{}]", re.sub(r"\{(token|class|classes)\}", "", config.form)):
        raise UserError(
            f"prompts.form: '{config.form}' has another slot than {{token}}, {{class}}, {{classes}}; fix it"
        )
    prompts, plurals = [], THINGS | STUFF
    for index, name in enumerate(config.classes):
        if name not in plurals:
            raise UserError(f"prompts.classes: '{name}' is not one of {', '.join(plurals)}; correct it or give texts")
        text = config.form.format_map({"token": config.token, "class": name, "classes": plurals[name]})
        prompts.append(Prompt(" ".join(text.split()), index, name))
    return prompts


def _of_rows(file: Path) -> list[Prompt]:
    """Returns the prompts of a file of JSON lines {"text", "class", ...}; classes are numbered in their order."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; name a file of prompts")
    rows = read_rows(file, finished=True)
    for number, row in enumerate(rows, 1):
        if not (isinstance(row, dict) and {type(row.get("text")), type(row.get("class"))} == {str} and row["text"]):
            raise UserError(f'{file}, line {number}: is no {{"text": ..., "class": ...}}; fix the line')
    names = list(dict.fromkeys(row["class"] for row in rows))
    return [Prompt(row["text"], names.index(row["class"]), row["class"]) for row in rows]
