"""CLIP configurations out of and into the JSON files that repositories hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmda.errors import UserError, did_you_mean
from fmda.models.clip import ClipConfig, ConvNextConfig, ResNetConfig, TextConfig, VitConfig
from fmda.models.clip.config import OPENAI_MEAN, OPENAI_STD
from fmda.nn.activation import ACTIVATIONS
from fmda.weights.files import read_json

Json = Mapping[str, Any]

CONVNEXTS: dict[str, tuple[tuple[int, int, int, int], tuple[int, int, int, int]]] = {
    "convnext_tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "convnext_base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnext_large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "convnext_xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
}
"""Depths and channels of the trunks by their names in timm."""

HF_TEXT = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
    "bos_token_id": 49406,
}
_HF_VISION = {
    "image_size": 224,
    "patch_size": 32,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "num_channels": 3,
}


def activation(name: str, where: Path) -> str:
    """Returns `name` if we have that activation, else raises UserError."""
    if name not in ACTIVATIONS:
        raise UserError(f"{where}: activation '{name}' is not known{did_you_mean(name, ACTIVATIONS)}")
    return name


def read_hf(folder: Path) -> ClipConfig:
    """Returns the configuration in `config.json`, with the image normalisation of `preprocessor_config.json` if there.

    Keys left out have the defaults of transformers' CLIPConfig. Raises UserError for a model of another kind.
    """
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type") != "clip":
        raise UserError(
            f"{path}: model_type is '{config.get('model_type')}', not 'clip'; give the folder of a CLIP model"
        )
    # Early repositories repeat the sections under a second name, which then takes precedence.
    text = {**HF_TEXT, **(config.get("text_config") or {}), **(config.get("text_config_dict") or {})}
    vision = {**_HF_VISION, **(config.get("vision_config") or {}), **(config.get("vision_config_dict") or {})}
    if vision["num_channels"] != 3:
        raise UserError(f"{path}: num_channels is {vision['num_channels']}; only RGB towers (3) are supported")
    preprocessor = folder / "preprocessor_config.json"
    image = read_json(preprocessor) if preprocessor.is_file() else {}
    return ClipConfig(
        embed_dim=config.get("projection_dim", 512),
        vision=VitConfig(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            width=vision["hidden_size"],
            layers=vision["num_hidden_layers"],
            heads=vision["num_attention_heads"],
            mlp_width=vision["intermediate_size"],
            activation=activation(vision["hidden_act"], path),
            norm_eps=vision["layer_norm_eps"],
        ),
        text=TextConfig(
            vocab_size=text["vocab_size"],
            context=text["max_position_embeddings"],
            width=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            mlp_width=text["intermediate_size"],
            activation=activation(text["hidden_act"], path),
            norm_eps=text["layer_norm_eps"],
            eos_token_id=text["eos_token_id"],
            bos_token_id=text["bos_token_id"],
        ),
        image_mean=tuple(image.get("image_mean", OPENAI_MEAN)),
        image_std=tuple(image.get("image_std", OPENAI_STD)),
    )


def write_hf(config: ClipConfig) -> dict[str, Any]:
    """Returns the `config.json` object of a CLIP with a vision transformer, every field spelled out."""
    vision, text = config.vision, config.text
    if not isinstance(vision, VitConfig):
        raise ValueError("this layout holds vision transformers only")
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context,
            "hidden_size": text.width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "intermediate_size": text.mlp_width,
            "hidden_act": text.activation,
            "layer_norm_eps": text.norm_eps,
            "bos_token_id": text.bos_token_id,
            "eos_token_id": text.eos_token_id,
            "pad_token_id": 0,
            "projection_dim": config.embed_dim,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_size": vision.width,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "intermediate_size": vision.mlp_width,
            "hidden_act": vision.activation,
            "layer_norm_eps": vision.norm_eps,
            "projection_dim": config.embed_dim,
        },
    }


def preprocessor(config: ClipConfig) -> dict[str, Any]:
    """Returns the `preprocessor_config.json` object: sizes and normalisation as transformers reads them."""
    side = config.vision.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
        "do_convert_rgb": True,
    }


_OPEN_CLIP_KEYS = {
    "top": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"},
    "vision_cfg": {
        "image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio",
        "timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_drop", "timm_drop_path",
    },
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}  # fmt: skip


def read_open_clip(folder: Path) -> ClipConfig:
    """Returns the configuration in `open_clip_config.json`.

    Raises UserError for options that would change the network in ways that are not built here.
    """
    path = folder / "open_clip_config.json"
    whole = read_json(path)
    model = whole.get("model_cfg", whole)
    sections = {"top": model, "vision_cfg": model.get("vision_cfg"), "text_cfg": model.get("text_cfg")}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise UserError(f"{path}: '{name}' is missing; copy or download it again")
        unknown = sorted(set(section) - _OPEN_CLIP_KEYS[name])
        if unknown:
            raise UserError(
                f"{path}: {name} option {', '.join(unknown)} is not supported; "
                "use a ViT, RN50, RN101 or ConvNeXt model with OpenCLIP's standard text tower"
            )
    act = "quick_gelu" if model.get("quick_gelu") else "gelu"
    image = whole.get("preprocess_cfg") or {}
    text = model["text_cfg"]
    width = text.get("width", 512)
    return ClipConfig(
        embed_dim=model["embed_dim"],
        vision=_open_clip_vision(model["vision_cfg"], model["embed_dim"], act, path),
        text=TextConfig(
            vocab_size=text.get("vocab_size", 49408),
            context=text.get("context_length", 77),
            width=width,
            layers=text.get("layers", 12),
            heads=text.get("heads", 8),
            mlp_width=int(width * text.get("mlp_ratio", 4.0)),
            activation=act,
        ),
        image_mean=tuple(image.get("mean", OPENAI_MEAN)),
        image_std=tuple(image.get("std", OPENAI_STD)),
    )


def _open_clip_vision(vision: Json, embed_dim: int, act: str, path: Path) -> VitConfig | ResNetConfig | ConvNextConfig:
    """Returns the image tower's configuration from OpenCLIP's `vision_cfg`."""
    image_size = vision.get("image_size", 224)
    if "timm_model_name" in vision:
        name = vision["timm_model_name"]
        if name not in CONVNEXTS or vision.get("timm_proj") != "mlp" or vision.get("timm_pool", ""):
            raise UserError(
                f"{path}: image tower '{name}' is not supported{did_you_mean(name, CONVNEXTS)} "
                "(with timm_pool '' and timm_proj 'mlp')"
            )
        depths, channels = CONVNEXTS[name]
        return ConvNextConfig(image_size, depths, channels, head_width=2 * embed_dim)
    width = vision.get("width", 768)
    head_width = vision.get("head_width", 64)
    if isinstance(vision.get("layers", 12), list):
        return ResNetConfig(image_size, tuple(vision["layers"]), width, heads=width * 32 // head_width)
    return VitConfig(
        image_size=image_size,
        patch_size=vision.get("patch_size", 16),
        width=width,
        layers=vision.get("layers", 12),
        heads=width // head_width,
        mlp_width=int(width * vision.get("mlp_ratio", 4.0)),
        activation=act,
    )


def write_open_clip(config: ClipConfig) -> dict[str, Any]:
    """Returns the `open_clip_config.json` object of any tower. Raises ValueError where the format cannot say it."""
    vision, text = config.vision, config.text
    if isinstance(vision, ConvNextConfig):
        shape = (vision.depths, vision.channels)
        names = [name for name, known in CONVNEXTS.items() if known == shape]
        if not names or vision.head_width != 2 * config.embed_dim:
            raise ValueError(f"no name in timm for a ConvNeXt of {shape}")
        section: dict[str, Any] = {
            "timm_model_name": names[0],
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "mlp",
            "image_size": vision.image_size,
        }
    elif isinstance(vision, ResNetConfig):
        section = {
            "image_size": vision.image_size,
            "layers": list(vision.layers),
            "width": vision.width,
            "head_width": vision.width * 32 // vision.heads,
            "patch_size": None,
        }
    else:
        section = {
            "image_size": vision.image_size,
            "layers": vision.layers,
            "width": vision.width,
            "head_width": vision.width // vision.heads,
            "patch_size": vision.patch_size,
            "mlp_ratio": vision.mlp_width / vision.width,
        }
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "quick_gelu": text.activation == "quick_gelu",
            "vision_cfg": section,
            "text_cfg": {
                "context_length": text.context,
                "vocab_size": text.vocab_size,
                "width": text.width,
                "heads": text.heads,
                "layers": text.layers,
                "mlp_ratio": text.mlp_width / text.width,
            },
        },
        "preprocess_cfg": {"mean": list(config.image_mean), "std": list(config.image_std)},
    }
