"""A small CLIP from street scenes and their captions: tokenizer, training, export, zero-shot check.

The trainer is an ordinary contrastive one (Radford et al. 2021) with two additions. Captions come with tags of what
they state, and images with tags of what is true of them, so that a caption that happens to be true of another
image of the batch is no negative there. Prompt templates are used only for images that match them.
Beside whole crops, patches are matched with class names (`patch_text`).
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
from jaxtyping import Array, Bool

from fmda.atomic import write_json
from fmda.config import Decay, NonNegativeFloat, PositiveInt
from fmda.data import templates
from fmda.data.streams import Stream
from fmda.errors import UserError
from fmda.losses.alignment import contrastive_loss
from fmda.methods.dense import normalised
from fmda.methods.judges import embed
from fmda.methods.pretrain.checks import check_disjoint, check_scenes
from fmda.methods.pretrain.crops import TAGS, CropConfig, Crops, Drawn, Scenes, Tokenize
from fmda.methods.pretrain.patch_text import chosen_templates, patch_features, patch_text_loss, template_needs
from fmda.methods.pretrain.tokenizer import train_tokenizer
from fmda.methods.trainer import trainer_plan, trainer_stages
from fmda.models.clip import Clip, ClipConfig, TextConfig, VitConfig
from fmda.models.module import abstract, init
from fmda.nn.norm import unit
from fmda.progress import track
from fmda.runs.plan import Plan
from fmda.runs.stages import Stage
from fmda.train import Objective, OptimConfig, Outcome, Task, TrainerConfig, TrainState
from fmda.weights.load import load_clip
from fmda.weights.network import save
from fmda.weights.tokenizer import Tokenizer
from fmda.world.captions import facts_of
from fmda.world.names import CLASSES

MAX_SCALE = float(np.log(100.0))


@dataclass(frozen=True, kw_only=True)
class Config(TrainerConfig):
    """Data, network and schedule of a CLIP run.

    Attributes:
        data: rendered folders, or `Drawn` domains, to train on.
        held: rendered folders for the zero-shot check; none of them may be in `data`.
        model: both towers; vocabulary and special ids follow from the tokenizer.
        crop: how crops are cut and described.
        vocabulary: most entries of the tokenizer.
        batch: crops per step, over all devices and processes.
        crops: crops cut from one image.
        patch_weight: weight of the patch-text loss beside the contrastive one; 0 leaves it out.
        patch_templates: templates drawn per step for the patch-text loss.
        ema: share that the weight average keeps at each step.
        mean, std: normalisation of RGB in [0, 1].
    """

    data: tuple[Path | Drawn, ...]
    held: tuple[Path | Drawn, ...] = ()
    model: ClipConfig = field(
        default_factory=lambda: ClipConfig(
            embed_dim=192,
            vision=VitConfig(64, 8, 192, 6, 6, 768, "quick_gelu"),
            text=TextConfig(1024, 32, 128, 4, 4, 512, "quick_gelu"),
        )
    )
    crop: CropConfig = CropConfig()
    vocabulary: PositiveInt = 1024
    steps: PositiveInt = 3000
    batch: PositiveInt = 256
    crops: PositiveInt = 8
    patch_weight: NonNegativeFloat = 1.0
    patch_templates: PositiveInt = 6
    optim: OptimConfig = OptimConfig(learning_rate=1e-3, warmup_steps=200, weight_decay=0.1, b2=0.98, clip_norm=1.0)
    ema: Decay = 0.998

    def __post_init__(self) -> None:
        """Raises UserError for images that are both trained on and held out, and batches of parts of images."""
        check_disjoint(self.data, self.held)
        if self.batch % self.crops:
            raise UserError(f"batch: {self.batch} is no multiple of crops={self.crops}; choose one")


def check(config: Config) -> None:
    """Raises UserError for scenes that are missing or damaged."""
    check_scenes((*config.data, *config.held))


def stages(config: Config) -> list[Stage]:
    """Returns tokenizer, train, export (Hugging Face layout) and, with held-out images, check."""
    words = [config.data, config.vocabulary, config.seed]
    tokenizer = Stage("tokenizer", functools.partial(_tokenizer, config), words, alone=True)
    return trainer_stages(
        config, functools.partial(_training, config), _write, exported=config.model, before=[tokenizer],
        check=_check if config.held else None, checked=config.held,
    )  # fmt: skip


def plan(config: Config) -> Plan:
    """Returns parameters, FLOPs and memory at the configured sizes, for a tokenizer that fills its vocabulary."""
    text = dataclasses.replace(config.model.text, vocab_size=config.vocabulary)
    labels = np.zeros((64, 64), np.uint8)
    facts = facts_of(labels, labels, dict.fromkeys(("domain", "style", "weather", "time", "street"), 0))
    scene = {"image": np.zeros((64, 64, 3), np.uint8), "labels": labels, "instances": labels, "facts": facts}
    bank = len(templates("imagenet80"))
    frozen = {
        "prompts": jax.ShapeDtypeStruct((bank, len(CLASSES), text.context), jnp.int32),
        "needs": jax.ShapeDtypeStruct((bank, len(TAGS)), bool),
    }
    model = dataclasses.replace(config.model, text=text)
    task = _task(config, model, frozen, [scene], functools.partial(_no_words, context=text.context))
    notes = (f"an image gives {config.crops} crops",)
    return trainer_plan(config, task, stages(config), parts=("vision", "text"), notes=notes)


def _tokenizer(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    """Learns the vocabulary from captions as the trainer will see them, and from every template with every class."""
    scenes, bank = Scenes(config.data), templates("imagenet80")
    texts = _prompts(bank)

    def collect(captions: Sequence[str]) -> np.ndarray:
        texts.extend(captions)
        return _no_words(captions)

    crops = Crops(config.crop, bank, collect, 8, _grid(config.model))
    rng = np.random.default_rng((config.seed, 1))
    for _ in track(range(400), "captions for the tokenizer"):
        crops(scenes[int(rng.integers(len(scenes)))], rng)
    tokenizer = train_tokenizer(texts, config.vocabulary, folder)
    return {"entries": len(tokenizer), "texts": len(texts)}


def _no_words(texts: Sequence[str], context: int = 1) -> np.ndarray:
    return np.zeros((len(texts), context), np.int32)


def _prompts(bank: Sequence[str]) -> list[str]:
    """Returns each template with each class, by template."""
    return [template.format(name) for template in bank for name in CLASSES]


def _with_tokenizer(config: Config, folder: Path) -> tuple[ClipConfig, Tokenizer]:
    """Returns the network's configuration with vocabulary and special ids of the tokenizer, and the tokenizer."""
    from transformers import CLIPTokenizer

    words = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    text = dataclasses.replace(
        config.model.text, vocab_size=len(words), eos_token_id=words.eos_token_id, bos_token_id=words.bos_token_id
    )
    return dataclasses.replace(config.model, text=text), Tokenizer(folder, words.eos_token_id, len(words))


def _grid(model: ClipConfig) -> int:
    """Returns how many patches a crop has along a side."""
    if not isinstance(model.vision, VitConfig):
        raise UserError("model.vision: only vision transformers are trained here; give patch_size, width, heads")
    return model.vision.side


def make_objective(graphdef: nnx.GraphDef, model: ClipConfig, patch_weight: float, patch_templates: int) -> Objective:
    """Returns the objective for batches with axes [images, crops, ...].

    `frozen` holds "prompts", ids of every template with every class [m, k, t], and "needs", see `template_needs`.
    """

    def objective(params: Any, state: TrainState, frozen: Any, batch: dict[str, Array], key: Array) -> Outcome:
        del state
        flat = {name: leaf.reshape(-1, *leaf.shape[2:]) for name, leaf in batch.items()}
        pixels = normalised(flat["pixels"], model.image_mean, model.image_std)
        clip = nnx.merge(graphdef, params)
        scale = jnp.exp(jnp.minimum(clip.logit_scale[...], MAX_SCALE))
        images, *readings = patch_features(clip.vision, pixels)
        value, metrics = contrastive_loss(
            images, clip.text(flat["ids"]), scale, also_true(flat["present"], flat["stated"])
        )
        metrics = metrics | {"scale": scale, "contrastive": value}
        if patch_weight:
            drawn, mine = chosen_templates(key, frozen["needs"], flat["present"], patch_templates)
            ids = frozen["prompts"][drawn]
            names = clip.text(ids.reshape(-1, ids.shape[-1])).reshape(*ids.shape[:2], -1)[mine]
            parts = [patch_text_loss(patches, names, flat["patches"], scale) for patches in readings]
            value += patch_weight * sum(part for part, _ in parts) / len(parts)
            metrics |= {"patch_loss": parts[0][0], "patch_accuracy": parts[0][1]}
        return Outcome(value, metrics, {})

    return objective


def also_true(present: Bool[Array, "b tags"], stated: Bool[Array, "b tags"]) -> Bool[Array, "b b"]:
    """Returns at [i, j] whether everything that caption j states is true of image i."""
    missing = (~present).astype(jnp.float32) @ stated.astype(jnp.float32).T
    return missing < 0.5


def _task(config: Config, model: ClipConfig, frozen: Any, scenes: Sequence[Any], tokenize: Tokenize) -> Task:
    def make(rngs: nnx.Rngs) -> Clip:
        return Clip(model, rngs=rngs)

    transform = Crops(config.crop, templates("imagenet80"), tokenize, config.crops, _grid(model))
    return Task(
        name="clip",
        objective=make_objective(abstract(make)[0], model, config.patch_weight, config.patch_templates),
        init=functools.partial(init, make),
        optim=config.optim,
        streams=Stream(scenes, transform, config.batch // config.crops),
        frozen=frozen,
        teacher_decay=config.ema,
    )


def _training(config: Config, done: dict[str, Path]) -> Task:
    (model, tokenizer), bank = _with_tokenizer(config, done["tokenizer"]), templates("imagenet80")
    context = model.text.context
    ids = tokenizer(_prompts(bank), context).reshape(len(bank), len(CLASSES), -1)
    frozen = {"prompts": ids, "needs": template_needs(bank, TAGS)}
    tokenize = functools.partial(tokenizer, limit=context, context=context)
    return _task(config, model, frozen, Scenes(config.data), tokenize)


def _write(config: Config, folder: Path, done: dict[str, Path], params: Any) -> None:
    model, tokenizer = _with_tokenizer(config, done["tokenizer"])
    save("clip", folder, model, params, tokenizer.files(), dtype=np.float16)


def _check(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    result = {str(root): zero_shot(done["export"], root, config.crop, config.seed) for root in config.held}
    write_json(folder / "zero-shot.json", result)
    return result


def zero_shot(
    model: str | Path, root: Path | Drawn, crop: CropConfig, seed: int = 0, most: int = 100
) -> dict[str, float]:
    """Returns how well "a photo of a {class}." tells the contents of crops of held-out images.

    {"top1": share of crops whose best class is present with at least `crop.least` of the crop, "chance": the same for
    the class that is present most often, "crops": their number}.
    """
    clip, scenes = load_clip(model), Scenes([root])
    crops = Crops(dataclasses.replace(crop, spoiled=0.0), templates("imagenet80"), _no_words, 8, 8)
    rng = np.random.default_rng((seed, 2))
    cropped = [crops(scenes[i], rng) for i in track(range(min(most, len(scenes))), f"zero-shot on {root}")]
    present = np.concatenate([row["present"] for row in cropped])[:, : len(CLASSES)]
    images = embed(clip, np.concatenate([row["pixels"] for row in cropped]))
    texts = np.asarray(unit(clip.encode_text(clip.tokenize([f"a photo of a {name}." for name in CLASSES]))))
    best = (images @ texts.T).argmax(1)
    return {
        "top1": float(present[np.arange(len(best)), best].mean()),
        "chance": float(present.mean(0).max()),
        "crops": len(best),
    }
