"""The table of EfficientNet-Lite0 with SegFormer's head, and its configuration out of and into JSON."""

from pathlib import Path

from fmda.models.efficientnet_lite import EfficientNetLiteConfig
from fmda.models.lite_segmenter import LiteSegmenterConfig
from fmda.weights import efficientnet_lite, mit
from fmda.weights.files import config_file
from fmda.weights.layers import torch_rows
from fmda.weights.reader import IMAGENET, Fields, Keys, written
from fmda.weights.table import Export, Names, Table

KIND = "efficientnet-lite-segformer"
_FIXED = {"encoder": ("efficientnet-lite0",)}
_KEYS: Keys = {
    "width": ("decoder_hidden_size", Fields.size, 64),
    "classes": ("num_classes", Fields.size, 19),
    "dropout": ("classifier_dropout_prob", Fields.share, 0.1),
}
_LAYERS = (*efficientnet_lite.layers("backbone.", "encoder/"), *mit.HEAD)
TABLE = Table(torch_rows(_LAYERS), "EfficientNet-Lite SegFormer")


def read(file: Path, names: Names) -> tuple[LiteSegmenterConfig, Table]:
    """Returns the configuration beside a weight file (of its name, or config.json), and the table."""
    fields = Fields.read(config_file(file))
    fields.only(_FIXED)
    return LiteSegmenterConfig(EfficientNetLiteConfig(classes=0), **fields.of(_KEYS)), TABLE


def export(config: LiteSegmenterConfig, layout: str | None = None) -> Export:
    """Returns the files of a saved network, the encoder under its package's names."""
    value = written(config, _KEYS, _FIXED) | {
        "model_type": KIND,
        **IMAGENET,
    }
    return Export("model.safetensors", TABLE, {"config.json": value})
