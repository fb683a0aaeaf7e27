"""CLIP's configurations out of and into JSON, and which table its stored names need."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmda.errors import UserError
from fmda.models.clip import ClipConfig, ConvNextConfig, ResNetConfig, TextConfig, VitConfig
from fmda.models.clip.config import OPENAI_MEAN, OPENAI_STD
from fmda.nn.activation import ACTIVATIONS
from fmda.weights import clip_tables
from fmda.weights.reader import MISSING, Fields, Keys, written
from fmda.weights.table import Export, Names, Table

CONVNEXTS: dict[str, tuple[tuple[int, int, int, int], tuple[int, int, int, int]]] = {
    "convnext_tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "convnext_base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnext_large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "convnext_xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
}
"""Depths and channels of the trunks by their names in timm."""


def _activation(fields: Fields, key: str, default: str) -> str:
    return fields.word(key, default, ACTIVATIONS)


def _token_id(fields: Fields, key: str, default: int) -> int:
    # Old files hold ids that the vocabulary lacks; only the tokenizer's are checked.
    return fields.index(key, default, 2**31)


def _transformer_keys(width: int, heads: int, mlp_width: int) -> Keys:
    return {
        "width": ("hidden_size", Fields.size, width),
        "layers": ("num_hidden_layers", Fields.size, 12),
        "heads": ("num_attention_heads", Fields.size, heads),
        "mlp_width": ("intermediate_size", Fields.size, mlp_width),
        "activation": ("hidden_act", _activation, "quick_gelu"),
        "norm_eps": ("layer_norm_eps", Fields.number, 1e-5),
    }


VIT_KEYS: Keys = {
    "image_size": ("image_size", Fields.size, 224),
    "patch_size": ("patch_size", Fields.size, 32),
    **_transformer_keys(768, 12, 3072),
}
"""Of transformers' CLIPVisionConfig."""

TEXT_KEYS: Keys = {
    "vocab_size": ("vocab_size", Fields.size, 49408),
    "context": ("max_position_embeddings", Fields.size, 77),
    **_transformer_keys(512, 8, 2048),
    "bos_token_id": ("bos_token_id", _token_id, 49406),
    "eos_token_id": ("eos_token_id", _token_id, 49407),
}
"""Of transformers' CLIPTextConfig."""


def read(file: Path, names: Names) -> tuple[ClipConfig, Table]:
    """Returns the configuration beside a weight file, and the table of the layout that its stored names have."""
    folder, flax = file.parent, file.suffix == ".msgpack"
    if not any((folder / name).is_file() for name in ("config.json", "open_clip_config.json")):
        raise UserError(
            f"{folder}: holds no config.json nor open_clip_config.json; copy it from where the weights come from"
        )
    # The names decide the layout: repositories store OpenCLIP's arrays under either file name.
    if any(name.startswith("visual.") for name in names):
        config = read_open_clip(folder)
        return config, open_clip_table(config)
    return read_hf(folder), clip_tables.HF_FLAX_CLIP if flax else clip_tables.HF_CLIP


def export(config: ClipConfig, layout: str | None = None) -> Export:
    """Returns the files of a saved CLIP: layout "hf", or "open_clip" as convolutional towers need; None chooses.

    Raises UserError for a tower that the layout does not know.
    """
    transformer = isinstance(config.vision, VitConfig)
    if layout == "open_clip" or (layout is None and not transformer):
        objects = {"open_clip_config.json": write_open_clip(config)}
        return Export("open_clip_model.safetensors", open_clip_table(config), objects)
    if not transformer:
        raise UserError("the layout 'hf' holds vision transformers only; choose 'open_clip'")
    side, width = config.vision.image_size, {"projection_dim": config.embed_dim}
    text = written(config.text, TEXT_KEYS, {}) | {"model_type": "clip_text_model", "pad_token_id": 0} | width
    vision = written(config.vision, VIT_KEYS, {}) | {"model_type": "clip_vision_model"} | width
    value = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        **width,
        "text_config": text,
        "vision_config": vision,
    }
    processor = image_processor("CLIP", {"shortest_edge": side}, 3, config.image_mean, config.image_std) | {
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_convert_rgb": True,
    }
    return Export(
        "model.safetensors", clip_tables.HF_CLIP, {"config.json": value, "preprocessor_config.json": processor}
    )


def image_processor(
    kind: str, size: dict[str, int], resample: int, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """Returns what every `preprocessor_config.json` of transformers holds; `resample` is Pillow's number."""
    return {
        "image_processor_type": f"{kind}ImageProcessor",
        "do_resize": True,
        "size": size,
        "resample": resample,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def open_clip_table(config: ClipConfig) -> Table:
    """Returns the table of OpenCLIP's names for the kind of image tower that `config` has."""
    tables = {ResNetConfig: clip_tables.OPEN_CLIP_RESNET, ConvNextConfig: clip_tables.OPEN_CLIP_CONVNEXT}
    return tables.get(type(config.vision), clip_tables.OPEN_CLIP_VIT)


def read_text(fields: Fields) -> TextConfig:
    """Returns the text tower of transformers' CLIPTextConfig; keys left out have its defaults."""
    config = TextConfig(**fields.of(TEXT_KEYS))
    fields.divides("num_attention_heads", config.heads, config.width, "hidden_size")
    return config


def read_vit(fields: Fields, keys: Keys) -> VitConfig:
    """Returns a vision transformer from Hugging Face's keys."""
    config = VitConfig(**fields.of(keys))
    fields.divides("num_attention_heads", config.heads, config.width, "hidden_size")
    if config.patch_size > config.image_size:
        raise fields.fault("patch_size", f"at most image_size, {config.image_size}")
    return config


def read_hf(folder: Path) -> ClipConfig:
    """Returns the configuration in `config.json`, with the image normalisation of `preprocessor_config.json` if there.

    Keys left out have the defaults of transformers' CLIPConfig. Raises UserError for a model of another kind.
    """
    fields = Fields.read(folder / "config.json")
    if fields.values.get("model_type") != "clip":
        raise fields.fault("model_type", "'clip'")
    # Early repositories repeat the sections under a second name, which then takes precedence.
    text, vision = (fields.section(f"{name}_config", f"{name}_config_dict") for name in ("text", "vision"))
    vision.only({"num_channels": (3,)})
    preprocessor = folder / "preprocessor_config.json"
    image = Fields.read(preprocessor) if preprocessor.is_file() else Fields({}, preprocessor, "")
    return ClipConfig(
        embed_dim=fields.size("projection_dim", 512),
        vision=read_vit(vision, VIT_KEYS),
        text=read_text(text),
        image_mean=image.triple("image_mean", OPENAI_MEAN, positive=False),
        image_std=image.triple("image_std", OPENAI_STD, positive=True),
    )


_OPEN_CLIP_TEXT: Keys = {
    "vocab_size": ("vocab_size", Fields.size, 49408),
    "context": ("context_length", Fields.size, 77),
    "width": ("width", Fields.size, 512),
    "layers": ("layers", Fields.size, 12),
    "heads": ("heads", Fields.size, 8),
}
_OPEN_CLIP_VIT: Keys = {
    "image_size": ("image_size", Fields.size, 224),
    "patch_size": ("patch_size", Fields.size, 16),
    "width": ("width", Fields.size, 768),
    "layers": ("layers", Fields.size, 12),
}
_OPEN_CLIP_KEYS = (
    {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"},
    {
        "image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio",
        "timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_drop", "timm_drop_path",
    },
    {*(key for key, _, _ in _OPEN_CLIP_TEXT.values()), "mlp_ratio"},
)  # fmt: skip
"""Known keys of the model, its `vision_cfg` and its `text_cfg`."""


def read_open_clip(folder: Path) -> ClipConfig:
    """Returns the configuration in `open_clip_config.json`.

    Raises UserError for options that would change the network in ways that are not built here.
    """
    fix = "use a ViT, RN50, RN101 or ConvNeXt with OpenCLIP's standard text tower"
    whole = Fields.read(folder / "open_clip_config.json", fix)
    model = whole.section("model_cfg") if "model_cfg" in whole.values else whole
    for name in ("vision_cfg", "text_cfg"):
        if not isinstance(model.values.get(name), dict):
            raise model.fault(name, "an object")
    vision, text = model.section("vision_cfg"), model.section("text_cfg")
    for fields, known in zip((model, vision, text), _OPEN_CLIP_KEYS, strict=True):
        if unknown := sorted(set(fields.values) - known):
            raise UserError(f"{whole.where}: {fields.prefix}{', '.join(unknown)} is not supported; {whole.fix}")
    embed_dim, act = model.size("embed_dim"), "quick_gelu" if model.flag("quick_gelu", False) else "gelu"
    sizes = text.of(_OPEN_CLIP_TEXT)
    text.divides("heads", sizes["heads"], sizes["width"], "width")
    image = whole.section("preprocess_cfg")
    return ClipConfig(
        embed_dim=embed_dim,
        vision=_open_clip_vision(vision, embed_dim, act),
        text=TextConfig(**sizes, mlp_width=int(sizes["width"] * text.number("mlp_ratio", 4.0)), activation=act),
        image_mean=image.triple("mean", OPENAI_MEAN, positive=False),
        image_std=image.triple("std", OPENAI_STD, positive=True),
    )


def _open_clip_vision(fields: Fields, embed_dim: int, act: str) -> VitConfig | ResNetConfig | ConvNextConfig:
    """Returns the image tower's configuration from OpenCLIP's `vision_cfg`."""
    image_size = fields.size("image_size", 224)
    if "timm_model_name" in fields.values:
        name = fields.word("timm_model_name", MISSING, CONVNEXTS)
        fields.only({"timm_proj": ("mlp",), "timm_pool": ("",)})
        if "timm_proj" not in fields.values:
            raise fields.fault("timm_proj", "'mlp' alone can be built")
        depths, channels = CONVNEXTS[name]
        return ConvNextConfig(image_size, depths, channels, head_width=2 * embed_dim)
    width, head_width = fields.size("width", 768), fields.size("head_width", 64)
    if isinstance(fields.values.get("layers"), list):
        a, b, c, d = fields.sizes("layers", count=4)
        fields.divides("head_width", head_width, width * 32, "32 times width")
        return ResNetConfig(image_size, (a, b, c, d), width, heads=width * 32 // head_width)
    fields.divides("head_width", head_width, width, "width")
    mlp_width = int(width * fields.number("mlp_ratio", 4.0))
    return VitConfig(**fields.of(_OPEN_CLIP_VIT), heads=width // head_width, mlp_width=mlp_width, activation=act)


def write_open_clip(config: ClipConfig) -> dict[str, Any]:
    """Returns the `open_clip_config.json` object. Raises ValueError for a tower that the format cannot represent."""
    vision, text = config.vision, config.text
    section: dict[str, Any]
    if isinstance(vision, ConvNextConfig):
        shape = (vision.depths, vision.channels)
        names = [name for name, known in CONVNEXTS.items() if known == shape]
        if not names or vision.head_width != 2 * config.embed_dim:
            raise ValueError(f"no name in timm for a ConvNeXt of {shape}")
        section = {"timm_model_name": names[0], "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "mlp"}
    elif isinstance(vision, ResNetConfig):
        head_width = vision.width * 32 // vision.heads
        section = {"layers": list(vision.layers), "width": vision.width, "head_width": head_width, "patch_size": None}
    else:
        section = written(vision, _OPEN_CLIP_VIT, {}) | {
            "head_width": vision.width // vision.heads,
            "mlp_ratio": vision.mlp_width / vision.width,
        }
    model = {
        "embed_dim": config.embed_dim,
        "quick_gelu": text.activation == "quick_gelu",
        "vision_cfg": section | {"image_size": vision.image_size},
        "text_cfg": written(text, _OPEN_CLIP_TEXT, {}) | {"mlp_ratio": text.mlp_width / text.width},
    }
    return {"model_cfg": model, "preprocess_cfg": {"mean": list(config.image_mean), "std": list(config.image_std)}}
