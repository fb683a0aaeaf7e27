"""ResNet's tables: the names of torchvision, timm, OpenMMLab and transformers. The shapes give the configuration."""

from pathlib import Path

from fmda.errors import UserError
from fmda.models.resnet import ResNetEncoderConfig
from fmda.weights.layers import Layer, torch_rows
from fmda.weights.reader import Fields
from fmda.weights.table import Export, Names, Table

KIND = "resnet"
BARE = "layer1.0.conv1.weight"
"""A stored name that identifies a ResNet."""


def _conv_norm(conv: str, norm: str, target: str) -> tuple[Layer, Layer]:
    return (conv, f"{target}/conv", "conv"), (norm, f"{target}/norm", "batch_norm")


def layers(stem: list[tuple[str, str]], source: str = "", target: str = "") -> list[Layer]:
    """Returns the layers under torchvision's names, behind prefixes; `stem` lists its convolutions and norms."""
    rows: list[Layer] = [(f"{source}fc", f"{target}classifier", "linear")]
    for index, (conv, norm) in enumerate(stem):
        rows += _conv_norm(f"{source}{conv}", f"{source}{norm}", f"{target}stem/{index}")
    for stage in range(4):
        block, ours = f"{source}layer{stage + 1}.{{i}}", f"{target}blocks/{stage}/{{i}}"
        for k in (1, 2, 3):
            rows += _conv_norm(f"{block}.conv{k}", f"{block}.bn{k}", f"{ours}/conv{k}")
        rows += _conv_norm(f"{block}.downsample.0", f"{block}.downsample.1", f"{ours}/shortcut")
    return rows


STEMS = {
    "conv1.weight": [("conv1", "bn1")],
    "conv1.0.weight": [("conv1.0", "conv1.1"), ("conv1.3", "conv1.4"), ("conv1.6", "bn1")],
    "stem.0.weight": [("stem.0", "stem.1"), ("stem.3", "stem.4"), ("stem.6", "stem.7")],
}
"""{stored name that tells the stem: its convolutions and norms}: torchvision's and timm's, timm's deep, OpenMMLab's."""

TABLES = {name: Table(torch_rows(layers(stem)), "ResNet") for name, stem in STEMS.items()}


def hugging_face_layers(source: str, target: str = "") -> list[Layer]:
    """Returns the layers of transformers' ResNetModel, behind prefixes."""
    stem = f"{source}embedder.embedder"
    rows: list[Layer] = [*_conv_norm(f"{stem}.convolution", f"{stem}.normalization", f"{target}stem/0")]
    block = f"{source}encoder.stages.{{i}}.layers.{{j}}"
    parts = [(f"{block}.layer.{k}", f"conv{k + 1}") for k in range(3)]
    for part, ours in [*parts, (f"{block}.shortcut", "shortcut")]:
        rows += _conv_norm(f"{part}.convolution", f"{part}.normalization", f"{target}blocks/{{i}}/{{j}}/{ours}")
    return rows


HUGGING_FACE = Table(
    torch_rows([*hugging_face_layers("resnet."), ("classifier.1", "classifier", "linear")]), "Hugging Face ResNet"
)
"""transformers.ResNetForImageClassification."""

FIXED = {
    "layer_type": ("bottleneck",),
    "hidden_act": ("relu",),
    "downsample_in_first_stage": (False,),
    "downsample_in_bottleneck": (False,),
}


def read(file: Path, names: Names) -> tuple[ResNetEncoderConfig, Table]:
    """Returns the configuration that names and shapes show, and the table of the layout that the names have."""
    if any(name.startswith("resnet.") for name in names):
        classes = names.get("classifier.1.bias", (0,))[0]
        return hugging_face_config(Fields.read(file.with_name("config.json")), classes), HUGGING_FACE
    return config_of(names, file), TABLES[stem_of(names)]


def hugging_face_config(fields: Fields, classes: int = 0) -> ResNetEncoderConfig:
    """Returns the configuration in transformers' keys. Raises UserError for a network that is not built here."""
    fields.only(FIXED)
    a, b, c, d = fields.sizes("depths", count=4)
    width = fields.size("embedding_size")
    if fields.sizes("hidden_sizes") != ResNetEncoderConfig(width=width).channels:
        raise fields.fault("hidden_sizes", f"4, 8, 16 and 32 times embedding_size, {width}")
    return ResNetEncoderConfig((a, b, c, d), width, classes=classes)


def stem_of(names: Names, prefix: str = "") -> str:
    """Returns the key in `STEMS` that the stored names have behind a prefix; torchvision's where they have none."""
    return next((stem for stem in STEMS if prefix + stem in names), "conv1.weight")


def config_of(names: Names, file: Path, prefix: str = "") -> ResNetEncoderConfig:
    """Returns the configuration of names in torchvision's style. Raises UserError where they are no bottlenecks'."""
    first = f"{prefix}layer1.0.conv3.weight"
    starts = [f"{prefix}layer{stage}." for stage in (1, 2, 3, 4)]
    a, b, c, d = (len({name[len(s) :].split(".")[0] for name in names if name.startswith(s)}) for s in starts)
    if first not in names or not all((a, b, c, d)):
        raise UserError(
            f"{file}: no ResNet of bottlenecks ({first} and four stages); take the weights of a ResNet-50 or deeper"
        )
    classes = names.get(f"{prefix}fc.bias", (0,))[0]
    return ResNetEncoderConfig((a, b, c, d), names[first][1], stem_of(names, prefix) != "conv1.weight", classes)


def export(config: ResNetEncoderConfig, layout: str | None = None) -> Export:
    """Returns the file of a saved ResNet, under the names of torchvision or, with a deep stem, OpenMMLab."""
    return Export("model.safetensors", TABLES["stem.0.weight" if config.deep_stem else "conv1.weight"], {})
