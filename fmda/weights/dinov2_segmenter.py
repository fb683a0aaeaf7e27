"""The table of DINOv2 with a head (transformers' and OpenMMLab's names), and its configuration out of and into JSON."""

from pathlib import Path

from fmda.models.dinov2_segmenter import Dinov2SegmenterConfig
from fmda.weights import daformer, dinov2
from fmda.weights.files import config_file
from fmda.weights.layers import torch_rows
from fmda.weights.reader import IMAGENET, Fields, Keys, written
from fmda.weights.table import Export, Names, Table

KIND = "dinov2-segmenter"
_KEYS: Keys = {
    "head": ("head", lambda fields, key, default: fields.word(key, default, ("linear", "daformer")), "daformer"),
    **daformer.KEYS,
}


def read(file: Path, names: Names) -> tuple[Dinov2SegmenterConfig, Table]:
    """Returns the configuration beside a weight file (of its name, or config.json), and the table."""
    fields = Fields.read(config_file(file))
    config = Dinov2SegmenterConfig(dinov2.encoder_config(fields.section("encoder")), **fields.of(_KEYS))
    return config, _table(config)


def export(config: Dinov2SegmenterConfig, layout: str | None = None) -> Export:
    """Returns the files of a saved network; "encoder" of its config.json is a configuration of transformers."""
    value = written(config, _KEYS, {}) | {
        "model_type": KIND,
        "encoder": dinov2.encoder_value(config.encoder),
        **IMAGENET,
    }
    return Export("model.safetensors", _table(config), {"config.json": value})


def _table(config: Dinov2SegmenterConfig) -> Table:
    encoder = dinov2.rows(config.encoder.gated, "backbone.", "encoder/")
    return Table((*encoder, *torch_rows(daformer.head("decode_head."))), "DINOv2 segmenter")
