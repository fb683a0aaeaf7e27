"""The Mix Transformer's tables (transformers, OpenMMLab), and its configuration out of and into JSON."""

from pathlib import Path

from fmda.models.dino import IMAGENET_MEAN, IMAGENET_STD
from fmda.models.mit import MitConfig
from fmda.weights.clip import image_processor
from fmda.weights.files import config_file
from fmda.weights.layers import Layer, torch_rows
from fmda.weights.reader import Fields, Keys, written
from fmda.weights.table import Export, Names, Row, Table, drop, row
from fmda.weights.transforms import PAIR_BIAS, PAIR_WEIGHT

PREFIX = "segformer."


def _four(fields: Fields, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    return fields.sizes(key, default, count=4)


KEYS: Keys = {
    "widths": ("hidden_sizes", _four, (32, 64, 160, 256)),
    "depths": ("depths", _four, (2, 2, 2, 2)),
    "heads": ("num_attention_heads", _four, (1, 2, 5, 8)),
    "reductions": ("sr_ratios", _four, (8, 4, 2, 1)),
    "patches": ("patch_sizes", _four, (7, 3, 3, 3)),
    "strides": ("strides", _four, (4, 2, 2, 2)),
    "mlp_ratios": ("mlp_ratios", _four, (4, 4, 4, 4)),
    # transformers itself leaves this key unread and takes 1e-5 for every norm; the weights were trained with 1e-6
    "norm_eps": ("layer_norm_eps", Fields.number, 1e-6),
    "drop_path": ("drop_path_rate", Fields.share, 0.1),
}
"""Of transformers' SegformerConfig."""
FIXED = {
    "num_channels": (3,),
    "num_encoder_blocks": (4,),
    "hidden_act": ("gelu",),
    "reshape_last_stage": (True,),
}


def layers(source: str, target: str) -> tuple[Layer, ...]:
    """Returns the lines of transformers' SegformerModel below the stored and our prefix."""
    theirs, ours = f"{source}encoder.block.{{i}}.{{j}}", f"{target}levels/{{i}}/blocks/{{j}}"
    return (
        (f"{source}encoder.patch_embeddings.{{i}}.proj", f"{target}levels/{{i}}/patch/conv", "conv"),
        (f"{source}encoder.patch_embeddings.{{i}}.layer_norm", f"{target}levels/{{i}}/patch/norm", "norm"),
        (f"{theirs}.layer_norm_1", f"{ours}/norm1", "norm"),
        *(
            (f"{theirs}.attention.self.{part}", f"{ours}/attention/{part}", "linear")
            for part in ("query", "key", "value")
        ),
        (f"{theirs}.attention.self.sr", f"{ours}/attention/reduce/conv", "conv"),
        (f"{theirs}.attention.self.layer_norm", f"{ours}/attention/reduce/norm", "norm"),
        (f"{theirs}.attention.output.dense", f"{ours}/attention/out", "linear"),
        (f"{theirs}.layer_norm_2", f"{ours}/norm2", "norm"),
        (f"{theirs}.mlp.dense1", f"{ours}/mlp/up", "linear"),
        (f"{theirs}.mlp.dwconv.dwconv", f"{ours}/mlp/depthwise", "conv"),
        (f"{theirs}.mlp.dense2", f"{ours}/mlp/down", "linear"),
        (f"{source}encoder.layer_norm.{{i}}", f"{target}levels/{{i}}/norm", "norm"),
    )


def openmmlab_rows(source: str, target: str) -> tuple[Row, ...]:
    """Returns the rows of OpenMMLab's backbone below the stored and our prefix; it counts stages from 1."""
    rows: list[Row] = []
    for stage in range(4):
        number, level = stage + 1, f"{target}levels/{stage}"
        theirs, ours = f"{source}block{number}.{{j}}", f"{level}/blocks/{{j}}"
        pair = (f"{ours}/attention/key", f"{ours}/attention/value")
        rows += [
            row(f"{theirs}.attn.kv.weight", tuple(f"{part}/kernel" for part in pair), PAIR_WEIGHT),
            row(f"{theirs}.attn.kv.bias", tuple(f"{part}/bias" for part in pair), PAIR_BIAS),
            *torch_rows(
                (
                    (f"{source}patch_embed{number}.proj", f"{level}/patch/conv", "conv"),
                    (f"{source}patch_embed{number}.norm", f"{level}/patch/norm", "norm"),
                    (f"{theirs}.norm1", f"{ours}/norm1", "norm"),
                    (f"{theirs}.attn.q", f"{ours}/attention/query", "linear"),
                    (f"{theirs}.attn.sr", f"{ours}/attention/reduce/conv", "conv"),
                    (f"{theirs}.attn.norm", f"{ours}/attention/reduce/norm", "norm"),
                    (f"{theirs}.attn.proj", f"{ours}/attention/out", "linear"),
                    (f"{theirs}.norm2", f"{ours}/norm2", "norm"),
                    (f"{theirs}.mlp.fc1", f"{ours}/mlp/up", "linear"),
                    (f"{theirs}.mlp.dwconv.dwconv", f"{ours}/mlp/depthwise", "conv"),
                    (f"{theirs}.mlp.fc2", f"{ours}/mlp/down", "linear"),
                    (f"{source}norm{number}", f"{level}/norm", "norm"),
                )
            ),
        ]
    return tuple(rows)


HEAD: tuple[Layer, ...] = (
    ("decode_head.linear_c.{i}.proj", "head/embed/levels/{i}", "linear"),
    ("decode_head.linear_fuse", "head/fuse", "conv"),
    ("decode_head.batch_norm", "head/norm", "batch_norm"),
    ("decode_head.classifier", "head/classifier", "conv"),
)
"""Of transformers' SegformerForSemanticSegmentation."""

BACKBONE = Table(torch_rows(layers("", "")), "transformers' SegformerModel")
WITHIN = Table(
    (
        *torch_rows(layers(PREFIX, "")),
        drop("classifier.weight"),
        drop("classifier.bias"),
        *(drop(line.source) for line in torch_rows(HEAD)),
    ),
    "transformers' SegFormer",
)
"""The encoder in a classifier, or in a segmentation network, of transformers."""


def encoder_config(fields: Fields) -> MitConfig:
    """Returns the encoder of a SegformerConfig. Raises UserError for one that cannot be built."""
    fields.only(FIXED)
    config = MitConfig(**fields.of(KEYS))
    for width, heads in zip(config.widths, config.heads, strict=True):
        fields.divides("num_attention_heads", heads, width, "the width of its stage")
    return config


def read(file: Path, names: Names) -> tuple[MitConfig, Table]:
    """Returns the configuration beside a weight file, and the table of the layout that its stored names have."""
    config = encoder_config(Fields.read(config_file(file)))
    return config, WITHIN if any(name.startswith(PREFIX) for name in names) else BACKBONE


def export(config: MitConfig, layout: str | None = None) -> Export:
    """Returns the files of a saved encoder, as transformers' SegformerModel opens them."""
    value = written(config, KEYS, FIXED) | {"architectures": ["SegformerModel"], "model_type": "segformer"}
    return Export("model.safetensors", BACKBONE, {"config.json": value, "preprocessor_config.json": processor()})


def processor() -> dict:
    """Returns the content of transformers' preprocessor_config.json for a SegFormer."""
    size = {"height": 512, "width": 512}
    return image_processor("Segformer", size, 2, IMAGENET_MEAN, IMAGENET_STD)
