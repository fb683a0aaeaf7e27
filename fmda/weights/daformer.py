"""DAFormer's and HRDA's tables under OpenMMLab's names, and their configuration out of and into JSON."""

from pathlib import Path

from fmda.models.daformer import DaFormerConfig
from fmda.models.hrda import HrdaConfig
from fmda.weights import mit
from fmda.weights.files import config_file
from fmda.weights.layers import Layer, torch_rows
from fmda.weights.reader import IMAGENET, Fields, Keys, written
from fmda.weights.table import Export, Names, Table, row
from fmda.weights.transforms import REVERSED_FUSION

KIND, HRDA_KIND = "daformer", "hrda"
KEYS: Keys = {
    "width": ("decoder_hidden_size", Fields.size, 256),
    "dilations": ("dilations", Fields.sizes, (1, 6, 12, 18)),
    "classes": ("num_classes", Fields.size, 19),
    "dropout": ("classifier_dropout_prob", Fields.share, 0.1),
}

HRDA_KEYS: Keys = {**KEYS, "fixed_attention": ("fixed_attention", Fields.share_or_null, None)}


def _unit(source: str, target: str) -> tuple[Layer, ...]:
    return (f"{source}.conv", f"{target}/conv", "conv"), (f"{source}.bn", f"{target}/norm", "batch_norm")


def _ends(source: str, target: str) -> tuple[Layer, ...]:
    return (
        (f"{source}embed_layers.{{i}}.proj", f"{target}/embed/levels/{{i}}", "linear"),
        (f"{source}conv_seg", f"{target}/classifier", "conv"),
    )


def head(source: str) -> tuple[Layer, ...]:
    """Returns the lines of DAFormer's head below the stored prefix; a linear head is its `conv_seg` alone."""
    branch = f"{source}fuse_layer.aspp_modules.{{i}}"
    return (
        *_ends(source, "head"),
        *_unit(branch, "head/branches/{i}"),
        *_unit(f"{branch}.depthwise_conv", "head/branches/{i}/depthwise"),
        *_unit(f"{branch}.pointwise_conv", "head/branches/{i}/pointwise"),
        *_unit(f"{source}fuse_layer.bottleneck", "head/fuse"),
    )


_ENCODER = mit.openmmlab_rows("backbone.", "encoder/")
_ATTENTION = "decode_head.scale_attention."
TABLE = Table((*_ENCODER, *torch_rows(head("decode_head."))), "DAFormer")
HRDA_TABLE = Table(
    (
        *_ENCODER,
        *torch_rows(head("decode_head.head.")),
        *torch_rows(_ends(_ATTENTION, "attention")),
        row(f"{_ATTENTION}fuse_layer.conv.weight", "attention/fuse/kernel", REVERSED_FUSION),
        *torch_rows([(f"{_ATTENTION}fuse_layer.bn", "attention/norm", "batch_norm")]),
    ),
    "HRDA",
)


def read(file: Path, names: Names) -> tuple[DaFormerConfig, Table]:
    """Returns the configuration beside a weight file (of its name, or config.json), and DAFormer's table."""
    fields = _fields(file, KIND)
    return DaFormerConfig(mit.encoder_config(fields), **fields.of(KEYS)), TABLE


def read_hrda(file: Path, names: Names) -> tuple[HrdaConfig, Table]:
    """Returns the configuration beside a weight file (of its name, or config.json), and HRDA's table."""
    fields = _fields(file, HRDA_KIND)
    return HrdaConfig(mit.encoder_config(fields), **fields.of(HRDA_KEYS)), HRDA_TABLE


def export(config: DaFormerConfig, layout: str | None = None) -> Export:
    """Returns the files of a saved DAFormer, as OpenMMLab names its weights."""
    return Export("model.safetensors", TABLE, {"config.json": _value(config, KEYS, KIND)})


def export_hrda(config: HrdaConfig, layout: str | None = None) -> Export:
    """Returns the files of a saved HRDA, as OpenMMLab names its weights."""
    return Export("model.safetensors", HRDA_TABLE, {"config.json": _value(config, HRDA_KEYS, HRDA_KIND)})


def _fields(file: Path, kind: str) -> Fields:
    fields = Fields.read(config_file(file))
    if fields.values.get("model_type") != kind:
        raise fields.fault("model_type", f"'{kind}'")
    return fields


def _value(config: DaFormerConfig, keys: Keys, kind: str) -> dict:
    return written(config.encoder, mit.KEYS, mit.FIXED) | written(config, keys, {}) | {
        "model_type": kind,
        **IMAGENET,
    }  # fmt: skip
