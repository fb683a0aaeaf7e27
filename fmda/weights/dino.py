"""DINO's configurations, in the names of its authors (and timm), whose sizes the arrays tell, and of Hugging Face."""

import math
from dataclasses import replace
from pathlib import Path

from fmda.errors import UserError
from fmda.models.clip import VitConfig
from fmda.models.dino import IMAGENET_MEAN, IMAGENET_STD, POSITION_OFFSET, vit_config
from fmda.weights import dino_tables
from fmda.weights.clip import VIT_KEYS, image_processor, read_vit
from fmda.weights.reader import Fields, Keys, written
from fmda.weights.table import Export, Names, Table

_KEYS: Keys = {
    **VIT_KEYS,
    "patch_size": ("patch_size", Fields.size, 16),
    "activation": ("hidden_act", VIT_KEYS["activation"][1], "gelu"),
    "norm_eps": ("layer_norm_eps", Fields.number, 1e-12),
}
"""Of transformers' ViTConfig."""


def read(file: Path, names: Names) -> tuple[VitConfig, Table]:
    """Returns the configuration beside a weight file, and the table of the layout that its stored names have."""
    if any(name.startswith("embeddings.") for name in names):
        fields = Fields.read(file.with_name("config.json"))
        if fields.values.get("model_type") != "vit":
            raise fields.fault("model_type", "'vit'")
        return replace(read_vit(fields, _KEYS), pre_norm=False, patch_bias=True), dino_tables.HF_VIT
    return replace(_config_of(names, file.parent), position_offset=POSITION_OFFSET), dino_tables.DINO


def _config_of(names: Names, folder: Path) -> VitConfig:
    """Returns the sizes of a network with heads of size 64, from the shapes of its arrays."""
    try:
        width, _, patch_size, _ = names["patch_embed.proj.weight"]
        side = math.isqrt(names["pos_embed"][1] - 1)
        mlp_width = names["blocks.0.mlp.fc1.weight"][0]
    except (KeyError, ValueError, IndexError):
        raise UserError(
            f"{folder}: no vision transformer's names (patch_embed.proj.weight, pos_embed, blocks.0...); "
            "give the backbone's weights alone, without a prefix"
        ) from None
    layers = len({name.split(".")[1] for name in names if name.startswith("blocks.")})
    return vit_config(patch_size, width, layers=layers, mlp_width=mlp_width, image_size=side * patch_size)


def export(config: VitConfig, layout: str | None = None) -> Export:
    """Returns the files of a saved DINO, as transformers' ViTModel opens them.

    Raises UserError for a vision transformer that is not plain.
    """
    if config.pre_norm or not config.patch_bias:
        raise UserError("DINO has no norm before its blocks, and a bias in its patches; not so this network")
    value = written(config, _KEYS, {}) | {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "num_channels": 3,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    size = {"height": config.image_size, "width": config.image_size}
    objects = {
        "config.json": value,
        "preprocessor_config.json": image_processor("ViT", size, 2, IMAGENET_MEAN, IMAGENET_STD),
    }
    return Export("model.safetensors", dino_tables.HF_VIT, objects)
