"""ESPNetv2's table, and its configuration out of and into JSON."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fmda import trees
from fmda.models.espnet_v2 import BRANCHES, LEAST_SIDE, NARROW, SCALES, WIDE, EspNetV2Config
from fmda.trees import Tree
from fmda.weights.files import config_file
from fmda.weights.layers import Layer, torch_rows
from fmda.weights.reader import IMAGENET, Fields, is_size, written
from fmda.weights.table import Export, Names, Table

KIND = "espnetv2-seg"
_WIDE = ("level2_0", "level3_0", "level3", "level4_0")
_FIXED: dict[str, tuple[Any, ...]] = {
    "branches": (BRANCHES,),
    "dilations": ({**dict.fromkeys(_WIDE, list(WIDE)), "level4": list(NARROW)},),
    "input_reinforcement": (True,),
    "pyramid_scales": (list(SCALES),),
    "pyramid_min_size": (LEAST_SIDE,),
    "norm": ("batch",),
    "activation": ("prelu-per-channel",),
    "align_corners": (True,),
}


def _conv_norm(source: str, target: str, conv: str, norm: str, act: str = "") -> tuple[Layer, ...]:
    layers = [(f"{source}.{conv}", f"{target}/conv", "conv"), (f"{source}.{norm}", f"{target}/norm", "batch_norm")]
    return (*layers, *([(f"{source}.{act}", f"{target}/act", "prelu")] if act else []))


def _norm_act(source: str, target: str, norm: str, act: str) -> tuple[Layer, ...]:
    return ((f"{source}.{norm}", f"{target}/norm", "batch_norm"), (f"{source}.{act}", f"{target}/act", "prelu"))


def _pyramid(source: str, target: str) -> tuple[Layer, ...]:
    return (
        *_conv_norm(f"{source}.proj_1x1", f"{target}/reduce", "conv", "bn", "act"),
        (f"{source}.spp_dw.{{j}}.conv", f"{target}/branches/{{j}}", "conv"),
        *_norm_act(f"{source}.br_after_cat", f"{target}/joined", "bn", "act"),
        *_conv_norm(f"{source}.conv_1x1_exp", f"{target}/expand", "conv", "bn"),
        (f"{source}.module_act", f"{target}/act", "prelu"),
    )


def _layers() -> tuple[Layer, ...]:
    down = "base_net.level{i}_0"
    layers: list[Layer] = [
        *_conv_norm("base_net.level1", "encoder/stem", "conv", "bn", "act"),
        *_pyramid(f"{down}.eesp", "encoder/down{i}/pyramid"),
        *_conv_norm(f"{down}.inp_reinf.0", "encoder/down{i}/image", "conv", "bn", "act"),
        *_conv_norm(f"{down}.inp_reinf.1", "encoder/down{i}/image_out", "conv", "bn"),
        (f"{down}.act", "encoder/down{i}/act", "prelu"),
        *_pyramid("base_net.level3.{i}", "encoder/blocks3/{i}"),
        *_pyramid("base_net.level4.{i}", "encoder/blocks4/{i}"),
    ]
    for step in range(4):
        source, target = f"bu_dec_l{step + 1}", f"head/pool/{step}"
        layers += [
            *_conv_norm(f"{source}.projection_layer", f"{target}/project", "cbr.0", "cbr.1", "cbr.2"),
            (f"{source}.stages.{{i}}", f"{target}/scales/{{i}}", "conv"),
            *_norm_act(f"{source}.merge_layer.0", f"{target}/joined", "br.0", "br.1"),
            *_conv_norm(f"{source}.merge_layer.2", f"{target}/mix", "cbr.0", "cbr.1", "cbr.2"),
            (f"{source}.merge_layer.3", f"{target}/out", "conv"),
            *_norm_act(f"{source}.br", f"{target}/out_act", "br.0", "br.1"),
        ]
    for step in range(3):
        source, target = f"merge_enc_dec_l{step + 2}", f"head/skip/{step}"
        layers += [
            (f"{source}.wt_layer.1", f"{target}/gate", "conv"),
            *_conv_norm(f"{source}.expansion_layer", f"{target}/expand", "cbr.0", "cbr.1", "cbr.2"),
            *_norm_act(f"bu_br_l{step + 2}", f"{target}/sum", "0", "1"),
        ]
    return tuple(layers)


TABLE = Table(torch_rows(_layers()), "ESPNetv2")


def read(file: Path, names: Names) -> tuple[EspNetV2Config, Table]:
    """Returns the configuration beside a weight file (of its name, or config.json), and the table."""
    fields = Fields.read(config_file(file))
    if fields.values.get("model_type") != KIND:
        raise fields.fault("model_type", f"'{KIND}'")
    fields.only(_FIXED)
    c1, c2, c3, c4 = channels = fields.sizes("encoder_channels", count=4)
    steps = (c2 - c1, c3 - c2, c4 - c3)
    if c1 % BRANCHES or any(width <= 0 or width % BRANCHES**2 for width in (*steps, c3, c4)):
        raise fields.fault("encoder_channels", f"rising widths in steps of {BRANCHES**2}, the last two multiples of it")
    repeats = fields.values.get("encoder_repeats", [0, 3, 7])
    if not (isinstance(repeats, list) and len(repeats) == 3 and repeats[0] == 0 and all(map(is_size, repeats[1:]))):
        raise fields.fault("encoder_repeats", "0 and two whole numbers above 0")
    *decoder, last = fields.sizes("decoder_channels", (64, 48, 32, 20), count=4)
    classes = fields.size("num_classes", last)
    if classes != last or classes < 2:
        raise fields.fault("num_classes", f"at least 2, and the last of decoder_channels, {last}")
    unused = fields.values.get("unused_classes", [])
    if not isinstance(unused, list) or len(unused) >= classes or unused != list(range(classes - len(unused), classes)):
        raise fields.fault("unused_classes", f"a list of the last of {classes} classes, or empty")
    config = EspNetV2Config(
        (channels[0], c2, c3, c4), (repeats[1], repeats[2]), (decoder[0], decoder[1], decoder[2]), classes,
        len(unused), fields.size("pyramid_channels", min(classes // 2, 16)), fields.number("norm_eps", 1e-5),
    )  # fmt: skip
    return config, TABLE


def export(config: EspNetV2Config, layout: str | None = None) -> Export:
    """Returns the files of a saved network, under the names of the published weights."""
    value = written(config, {}, _FIXED) | {
        "model_type": KIND,
        "encoder_channels": list(config.channels),
        "encoder_repeats": [0, *config.repeats],
        "decoder_channels": [*config.decoder, config.classes],
        "pyramid_channels": config.pyramid,
        "num_classes": config.classes,
        "unused_classes": list(range(config.classes - config.unused, config.classes)),
        "norm_eps": config.eps,
        **IMAGENET,
    }
    return Export("model.safetensors", TABLE, {"config.json": value})


def without_unused(config: EspNetV2Config, params: Tree) -> tuple[EspNetV2Config, Tree]:
    """Returns the network without the logits that stand for no class; those of the classes are the same."""
    used = config.classes - config.unused
    last = "head/pool/3/out/"
    flat = {path: leaf[..., :used] if path.startswith(last) else leaf for path, leaf in trees.flatten(params).items()}
    return replace(config, classes=used, unused=0), trees.unflatten(flat)
