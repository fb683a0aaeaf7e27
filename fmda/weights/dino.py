"""DINO's tables and configurations, as its authors (and timm) and Hugging Face store it."""

import math
from dataclasses import replace
from pathlib import Path

from fmda.errors import UserError
from fmda.models.clip import VitConfig
from fmda.models.dino import IMAGENET_MEAN, IMAGENET_STD, POSITION_OFFSET, vit_config
from fmda.weights.clip import VIT_KEYS, image_processor, read_vit
from fmda.weights.layers import torch_rows
from fmda.weights.reader import Fields, Keys, written
from fmda.weights.table import Export, Names, Table, drop, row
from fmda.weights.transforms import BATCH, BATCH_TOKEN, QKV_BIAS, QKV_WEIGHT

_PARTS = tuple(f"blocks/{{i}}/attention/{part}" for part in ("query", "key", "value"))

DINO = Table(
    (
        row("cls_token", "class_token", BATCH_TOKEN),
        row("pos_embed", "position", BATCH),
        row("blocks.{i}.attn.qkv.weight", tuple(f"{part}/kernel" for part in _PARTS), QKV_WEIGHT),
        row("blocks.{i}.attn.qkv.bias", tuple(f"{part}/bias" for part in _PARTS), QKV_BIAS),
        *torch_rows(
            (
                ("patch_embed.proj", "patch", "conv"),
                ("blocks.{i}.norm1", "blocks/{i}/norm1", "norm"),
                ("blocks.{i}.attn.proj", "blocks/{i}/attention/out", "linear"),
                ("blocks.{i}.norm2", "blocks/{i}/norm2", "norm"),
                ("blocks.{i}.mlp.fc1", "blocks/{i}/mlp/up", "linear"),
                ("blocks.{i}.mlp.fc2", "blocks/{i}/mlp/down", "linear"),
                ("norm", "norm_post", "norm"),
            )
        ),
    ),
    layout="DINO",
)
"""facebookresearch/dino and timm."""

_LAYER = "encoder.layer.{i}"

HF_VIT = Table(
    (
        row("embeddings.cls_token", "class_token", BATCH_TOKEN),
        row("embeddings.position_embeddings", "position", BATCH),
        *torch_rows(
            (
                ("embeddings.patch_embeddings.projection", "patch", "conv"),
                (f"{_LAYER}.layernorm_before", "blocks/{i}/norm1", "norm"),
                *(
                    (f"{_LAYER}.attention.attention.{part}", f"blocks/{{i}}/attention/{part}", "linear")
                    for part in ("query", "key", "value")
                ),
                (f"{_LAYER}.attention.output.dense", "blocks/{i}/attention/out", "linear"),
                (f"{_LAYER}.layernorm_after", "blocks/{i}/norm2", "norm"),
                (f"{_LAYER}.intermediate.dense", "blocks/{i}/mlp/up", "linear"),
                (f"{_LAYER}.output.dense", "blocks/{i}/mlp/down", "linear"),
                ("layernorm", "norm_post", "norm"),
            )
        ),
        # A layer that transformers adds and self-supervised checkpoints never trained.
        drop("pooler.dense.weight"),
        drop("pooler.dense.bias"),
    ),
    layout="Hugging Face ViT",
)
"""transformers.ViTModel."""

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
        return replace(read_vit(fields, _KEYS), pre_norm=False, patch_bias=True), HF_VIT
    return replace(_config_of(names, file.parent), position_offset=POSITION_OFFSET), DINO


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
    return Export("model.safetensors", HF_VIT, objects)
