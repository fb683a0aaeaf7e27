"""DINOv2's table under transformers' names, and its configuration out of and into JSON."""

from pathlib import Path

from fmda.models.dino import IMAGENET_MEAN, IMAGENET_STD
from fmda.models.dinov2 import Dinov2Config
from fmda.weights.clip import image_processor
from fmda.weights.files import config_file
from fmda.weights.layers import torch_rows
from fmda.weights.reader import MISSING, Fields, Keys, written
from fmda.weights.table import Export, Names, Row, Table, row
from fmda.weights.transforms import BATCH, BATCH_TOKEN, PAIR_BIAS, PAIR_WEIGHT

PLAIN, REGISTERS = "dinov2", "dinov2_with_registers"
_COUNT = "num_register_tokens"
_KEYS: Keys = {
    "image_size": ("image_size", Fields.size, 224),
    "patch_size": ("patch_size", Fields.size, MISSING),
    "width": ("hidden_size", Fields.size, 768),
    "layers": ("num_hidden_layers", Fields.size, 12),
    "heads": ("num_attention_heads", Fields.size, 12),
    "mlp_ratio": ("mlp_ratio", Fields.size, 4),
    "gated": ("use_swiglu_ffn", Fields.flag, False),
    "norm_eps": ("layer_norm_eps", Fields.number, 1e-6),
    "drop_path": ("drop_path_rate", Fields.share, 0.0),
}
"""Of transformers' Dinov2Config."""
_FIXED = {
    "num_channels": (3,),
    "hidden_act": ("gelu",),
    "qkv_bias": (True,),
    "use_mask_token": (True,),
    "hidden_dropout_prob": (0.0,),
    "attention_probs_dropout_prob": (0.0,),
}


def rows(gated: bool, source: str = "", target: str = "") -> tuple[Row, ...]:
    """Returns the rows of transformers' Dinov2Model and Dinov2WithRegistersModel below the stored and our prefix."""
    theirs, ours, tokens = f"{source}encoder.layer.{{i}}", f"{target}blocks/{{i}}", f"{source}embeddings"
    pair = (f"{ours}/mlp/gate", f"{ours}/mlp/up")
    mlp = (
        row(f"{theirs}.mlp.weights_in.weight", tuple(f"{part}/kernel" for part in pair), PAIR_WEIGHT),
        row(f"{theirs}.mlp.weights_in.bias", tuple(f"{part}/bias" for part in pair), PAIR_BIAS),
        *torch_rows([(f"{theirs}.mlp.weights_out", f"{ours}/mlp/down", "linear")]),
    )  # fmt: skip
    if not gated:
        names = (("fc1", "up"), ("fc2", "down"))
        mlp = torch_rows((f"{theirs}.mlp.{stored}", f"{ours}/mlp/{name}", "linear") for stored, name in names)
    return (
        row(f"{tokens}.cls_token", f"{target}class_token", BATCH_TOKEN),
        row(f"{tokens}.mask_token", f"{target}mask_token", BATCH),
        row(f"{tokens}.register_tokens", f"{target}registers", BATCH),
        row(f"{tokens}.position_embeddings", f"{target}position", BATCH),
        row(f"{theirs}.layer_scale1.lambda1", f"{ours}/scale1/gamma"),
        row(f"{theirs}.layer_scale2.lambda1", f"{ours}/scale2/gamma"),
        *mlp,
        *torch_rows(
            (
                (f"{tokens}.patch_embeddings.projection", f"{target}patch", "conv"),
                (f"{theirs}.norm1", f"{ours}/norm1", "norm"),
                *(
                    (f"{theirs}.attention.attention.{part}", f"{ours}/attention/{part}", "linear")
                    for part in ("query", "key", "value")
                ),
                (f"{theirs}.attention.output.dense", f"{ours}/attention/out", "linear"),
                (f"{theirs}.norm2", f"{ours}/norm2", "norm"),
                (f"{source}layernorm", f"{target}norm_post", "norm"),
            )
        ),
    )


def encoder_config(fields: Fields) -> Dinov2Config:
    """Returns the network of a Dinov2Config or a Dinov2WithRegistersConfig, `maps` by a key of our own.

    Raises UserError for one that cannot be built.
    """
    fields.only(_FIXED)
    kind = fields.word("model_type", MISSING, (PLAIN, REGISTERS))
    registers = fields.size(_COUNT, 4) if kind == REGISTERS else 0
    values = fields.of(_KEYS)
    fields.divides("num_attention_heads", values["heads"], values["width"], "hidden_size")
    layers = values["layers"]
    quarters = tuple(sorted({-(-layers * part // 4) for part in (1, 2, 3, 4)}))
    maps = fields.sizes("maps", quarters)
    if list(maps) != sorted(set(maps)) or maps[-1] > layers:
        raise fields.fault("maps", f"ascending numbers of blocks up to {layers}")
    return Dinov2Config(registers=registers, maps=maps, **values)


def encoder_value(config: Dinov2Config) -> dict:
    """Returns the JSON object that `encoder_config` and transformers read."""
    kind, count = (REGISTERS, {_COUNT: config.registers}) if config.registers else (PLAIN, {})
    return written(config, _KEYS, _FIXED) | count | {"model_type": kind, "maps": list(config.maps)}


def read(file: Path, names: Names) -> tuple[Dinov2Config, Table]:
    """Returns the configuration beside a weight file, and the table."""
    config = encoder_config(Fields.read(config_file(file)))
    return config, _table(config)


def export(config: Dinov2Config, layout: str | None = None) -> Export:
    """Returns the files of a saved network, as transformers' Dinov2Model or Dinov2WithRegistersModel opens them."""
    name = "Dinov2WithRegistersModel" if config.registers else "Dinov2Model"
    size = {"height": config.image_size, "width": config.image_size}
    objects = {
        "config.json": encoder_value(config) | {"architectures": [name]},
        "preprocessor_config.json": image_processor("Bit", size, 3, IMAGENET_MEAN, IMAGENET_STD),
    }
    return Export("model.safetensors", _table(config), objects)


def _table(config: Dinov2Config) -> Table:
    return Table(rows(config.gated), "transformers' DINOv2")
