"""DeepLabV2's tables under OpenMMLab's names, and its configuration out of and into JSON."""

from pathlib import Path

from fmda.errors import UserError
from fmda.models.deeplab_v2 import DeepLabV2Config
from fmda.weights import resnet
from fmda.weights.files import config_file
from fmda.weights.layers import torch_rows
from fmda.weights.reader import IMAGENET, Fields, Keys, written
from fmda.weights.table import Export, Names, Table

KIND = "deeplabv2"
BACKBONE = "backbone."
BARE = "decode_head.aspp_modules.0.conv.weight"
"""A stored name that identifies a DeepLabV2."""

_RATES = (6, 12, 18, 24)
_KEYS: Keys = {
    "strides": ("strides", lambda fields, *key: fields.sizes(*key, count=4), (1, 2, 1, 1)),
    "dilations": ("dilations", lambda fields, *key: fields.sizes(*key, count=4), (1, 1, 2, 4)),
    "rates": ("rates", Fields.sizes, None),
}
TABLES = {
    name: Table(
        torch_rows(
            [
                *resnet.layers(stem, BACKBONE, "encoder/"),
                ("decode_head.aspp_modules.{i}.conv", "head/branches/{i}", "conv"),
            ]
        ),
        "DeepLabV2",
    )
    for name, stem in resnet.STEMS.items()
}


def read(file: Path, names: Names) -> tuple[DeepLabV2Config, Table]:
    """Returns the configuration beside a weight file, if there is one, completed from the shapes, and the table.

    The head's rates are by default the first of 6, 12, 18, 24.
    """
    path = config_file(file)
    fields = Fields.read(path) if path.is_file() else Fields({}, file, "write rates into a config.json beside it")
    branches = sum(name.startswith("decode_head.aspp_modules.") and name.endswith(".conv.bias") for name in names)
    if not branches:
        raise UserError(f"{file}: no DeepLabV2's names (backbone.layer1..., {BARE}); give the whole network's weights")
    values = fields.of({**_KEYS, "rates": (*_KEYS["rates"][:2], _RATES[:branches])})
    if len(values["rates"]) != branches:
        raise fields.fault("rates", f"{branches} whole numbers above 0, one for each branch of the head")
    classes = names["decode_head.aspp_modules.0.conv.bias"][0]
    fields.only({"num_classes": (classes,)})
    config = DeepLabV2Config(resnet.config_of(names, file, BACKBONE), classes=classes, **values)
    return config, TABLES[resnet.stem_of(names, BACKBONE)]


def export(config: DeepLabV2Config, layout: str | None = None) -> Export:
    """Returns the files of a saved network, as OpenMMLab names its weights."""
    value = written(config, _KEYS, {}) | {
        "model_type": KIND,
        "num_classes": config.classes,
        **IMAGENET,
    }
    table = TABLES["stem.0.weight" if config.encoder.deep_stem else "conv1.weight"]
    return Export("model.safetensors", table, {"config.json": value})
