"""Names of a plain vision transformer's arrays, as DINO's authors (and timm) and Hugging Face store it."""

from fmda.weights.layers import torch_rows
from fmda.weights.table import Table, drop, row
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
