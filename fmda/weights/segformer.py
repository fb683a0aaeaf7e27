"""SegFormer's table under transformers' names, and its configuration out of and into JSON."""

from pathlib import Path

from fmda.errors import UserError
from fmda.models.segformer import SegFormerConfig
from fmda.weights import mit
from fmda.weights.files import config_file
from fmda.weights.layers import torch_rows
from fmda.weights.reader import Fields, Keys, written
from fmda.weights.table import Export, Names, Table

KIND = "segformer"
_CLASSIFIER = "decode_head.classifier.weight"
_KEYS: Keys = {
    "width": ("decoder_hidden_size", Fields.size, 256),
    "dropout": ("classifier_dropout_prob", Fields.share, 0.1),
}
TABLE = Table(torch_rows((*mit.layers(mit.PREFIX, "encoder/"), *mit.HEAD)), "transformers' SegFormer")


def read(file: Path, names: Names) -> tuple[SegFormerConfig, Table]:
    """Returns the configuration beside a weight file, its number of classes from the stored shapes, and the table.

    Raises UserError for a checkpoint without a segmentation head.
    """
    if _CLASSIFIER not in names:
        raise UserError(f"{file}: has no {_CLASSIFIER}, so no segmentation head; load_mit opens an encoder")
    fields = Fields.read(config_file(file))
    classes = names[_CLASSIFIER][0]
    return SegFormerConfig(mit.encoder_config(fields), classes=classes, **fields.of(_KEYS)), TABLE


def export(config: SegFormerConfig, layout: str | None = None) -> Export:
    """Returns the files of a saved network, as transformers' SegformerForSemanticSegmentation opens them."""
    labels = {str(index): f"LABEL_{index}" for index in range(config.classes)}
    value = written(config.encoder, mit.KEYS, mit.FIXED) | written(config, _KEYS, {}) | {
        "architectures": ["SegformerForSemanticSegmentation"],
        "model_type": KIND,
        "id2label": labels,
        "label2id": {label: int(index) for index, label in labels.items()},
    }  # fmt: skip
    return Export("model.safetensors", TABLE, {"config.json": value, "preprocessor_config.json": mit.processor()})
