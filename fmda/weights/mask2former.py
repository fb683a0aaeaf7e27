"""Mask2Former's tables: transformers' names, and those of the original code with CLIP's towers, as CLOUDS releases it.

The second layout needs no configuration file, apart from the number of heads where it is not 8: shapes show the rest.
"""

import math
from pathlib import Path
from typing import Any

from fmda.errors import UserError
from fmda.models.clip import ConvNextConfig, ResNetConfig
from fmda.models.mask2former import HeadConfig, Mask2FormerConfig
from fmda.models.resnet import ResNetEncoderConfig
from fmda.weights import clip_tables, resnet
from fmda.weights.files import read_json
from fmda.weights.layers import Layer, torch_rows
from fmda.weights.reader import Fields, Keys, written
from fmda.weights.table import Export, Names, Row, Table, count_numbers, drop, row
from fmda.weights.transforms import QKV_BIAS, QKV_WEIGHT

KIND, CLOUDS_KIND = "mask2former", "clouds-mask2former"
BARE = "sem_seg_head.predictor.query_feat.weight"
"""A stored name of the original code's Mask2Former."""
_PIXEL, _DECODER, _LAYER = "head/pixel", "head/decoder", "head/decoder/layers/{i}"
_PARTS = ("query", "key", "value")


def _packed(source: str, target: str) -> tuple[Row, ...]:
    """Returns the rows of torch.nn.MultiheadAttention."""
    return (
        row(f"{source}.in_proj_weight", tuple(f"{target}/{part}/kernel" for part in _PARTS), QKV_WEIGHT),
        row(f"{source}.in_proj_bias", tuple(f"{target}/{part}/bias" for part in _PARTS), QKV_BIAS),
        *torch_rows([(f"{source}.out_proj", f"{target}/out", "linear")]),
    )


def _pixel_layers(source: str, norms: tuple[str, str], linears: tuple[str, str]) -> list[Layer]:
    """Returns a layer of the pixel decoder behind a prefix."""
    target = f"{_PIXEL}/layers/{{i}}"
    (norm1, norm2), (up, down) = norms, linears
    parts = {"sampling_offsets": "offsets", "attention_weights": "weights", "value_proj": "value", "output_proj": "out"}
    return [
        *((f"{source}.self_attn.{name}", f"{target}/attention/{ours}", "linear") for name, ours in parts.items()),
        (f"{source}.{norm1}", f"{target}/norm1", "norm"),
        (f"{source}.{norm2}", f"{target}/norm2", "norm"),
        (f"{source}.{up}", f"{target}/up", "linear"),
        (f"{source}.{down}", f"{target}/down", "linear"),
    ]


def _transformers() -> Table:
    pixel, decoder = "model.pixel_level_module.decoder", "model.transformer_module"
    layer = f"{decoder}.decoder.layers.{{i}}"
    attention = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
    norms = {"cross_attn_layer_norm": "norm1", "self_attn_layer_norm": "norm2", "final_layer_norm": "norm3"}
    layers: list[Layer] = [
        *resnet.hugging_face_layers("model.pixel_level_module.encoder.", "encoder/"),
        (f"{pixel}.level_embed", f"{_PIXEL}/level", "array"),
        *_pixel_layers(f"{pixel}.encoder.layers.{{i}}", ("self_attn_layer_norm", "final_layer_norm"), ("fc1", "fc2")),
        *((f"{layer}.self_attn.{name}", f"{_LAYER}/attention/{ours}", "linear") for name, ours in attention.items()),
        *((f"{layer}.{name}", f"{_LAYER}/{ours}", "norm") for name, ours in norms.items()),
        (f"{layer}.fc1", f"{_LAYER}/up", "linear"),
        (f"{layer}.fc2", f"{_LAYER}/down", "linear"),
        (f"{decoder}.queries_features", f"{_DECODER}/queries", "embedding"),
        (f"{decoder}.queries_embedder", f"{_DECODER}/positions", "embedding"),
        (f"{decoder}.level_embed", f"{_DECODER}/level", "embedding"),
        (f"{decoder}.decoder.layernorm", f"{_DECODER}/norm", "norm"),
        (f"{decoder}.decoder.mask_predictor.mask_embedder.{{i}}.0", f"{_DECODER}/mask/layers/{{i}}", "linear"),
        ("class_predictor", f"{_DECODER}/classifier", "linear"),
        (f"{pixel}.mask_projection", f"{_PIXEL}/mask", "conv"),
    ]
    pairs = {"input_projections.{i}": "project/{i}", "adapter_1": "lateral", "layer_1": "merge"}
    for name, ours in pairs.items():
        layers += [
            (f"{pixel}.{name}.0", f"{_PIXEL}/{ours}/conv", "conv"),
            (f"{pixel}.{name}.1", f"{_PIXEL}/{ours}/norm", "norm"),
        ]
    rows = (*torch_rows(layers), *_packed(f"{layer}.cross_attn", f"{_LAYER}/cross"), drop("criterion.empty_weight"))
    return Table(rows, "transformers' Mask2Former")


TRANSFORMERS = _transformers()


def _original_head() -> tuple[Row, ...]:
    pixel, decoder = "sem_seg_head.pixel_decoder", "sem_seg_head.predictor"
    cross, inner, last = (
        f"{decoder}.transformer_{part}_layers.{{i}}" for part in ("cross_attention", "self_attention", "ffn")
    )
    text = f"{_DECODER}/classifier"
    layers: list[Layer] = [
        (f"{pixel}.input_proj.{{i}}.0", f"{_PIXEL}/project/{{i}}/conv", "conv"),
        (f"{pixel}.input_proj.{{i}}.1", f"{_PIXEL}/project/{{i}}/norm", "norm"),
        (f"{pixel}.transformer.level_embed", f"{_PIXEL}/level", "array"),
        *_pixel_layers(f"{pixel}.transformer.encoder.layers.{{i}}", ("norm1", "norm2"), ("linear1", "linear2")),
        (f"{pixel}.adapter_1", f"{_PIXEL}/lateral/conv", "conv"),
        (f"{pixel}.adapter_1.norm", f"{_PIXEL}/lateral/norm", "norm"),
        (f"{pixel}.layer_1", f"{_PIXEL}/merge/conv", "conv"),
        (f"{pixel}.layer_1.norm", f"{_PIXEL}/merge/norm", "norm"),
        (f"{pixel}.mask_features", f"{_PIXEL}/mask", "conv"),
        (f"{cross}.norm", f"{_LAYER}/norm1", "norm"),
        (f"{inner}.norm", f"{_LAYER}/norm2", "norm"),
        (f"{last}.linear1", f"{_LAYER}/up", "linear"),
        (f"{last}.linear2", f"{_LAYER}/down", "linear"),
        (f"{last}.norm", f"{_LAYER}/norm3", "norm"),
        (f"{decoder}.decoder_norm", f"{_DECODER}/norm", "norm"),
        (f"{decoder}.query_feat", f"{_DECODER}/queries", "embedding"),
        (f"{decoder}.query_embed", f"{_DECODER}/positions", "embedding"),
        (f"{decoder}.level_embed", f"{_DECODER}/level", "embedding"),
        (f"{decoder}.mask_embed.layers.{{i}}", f"{_DECODER}/mask/layers/{{i}}", "linear"),
        (f"{decoder}.class_embed", text, "linear"),
        (f"{decoder}.class_embed.layers.{{i}}", f"{text}/mlp/layers/{{i}}", "linear"),
        (f"{decoder}._mask_pooling_proj.0", f"{text}/norm", "norm"),
        (f"{decoder}._mask_pooling_proj.1", f"{text}/project", "linear"),
        (f"{decoder}.logit_scale", f"{text}/logit_scale", "array"),
        # ours: the original code has no queries from text
        (f"{decoder}.text_query", f"{_DECODER}/text_queries/query", "linear"),
        (f"{decoder}.text_position", f"{_DECODER}/text_queries/position", "linear"),
    ]
    return (
        *torch_rows(layers),
        *_packed(f"{cross}.multihead_attn", f"{_LAYER}/cross"),
        *_packed(f"{inner}.self_attn", f"{_LAYER}/attention"),
        *map(drop, ("criterion.empty_weight", "pixel_mean", "pixel_std")),
    )


def _original(config: Mask2FormerConfig) -> Table:
    """Returns the table of the original code's names; CLIP's text tower may be there and is not read."""
    towers = {ResNetConfig: clip_tables.OPEN_CLIP_RESNET, ConvNextConfig: clip_tables.OPEN_CLIP_CONVNEXT}
    rows = []
    for one in towers[type(config.encoder)].rows:
        source = f"backbone.clip_model.{one.source}"
        vision = all(target.startswith("vision/") for target in one.targets)
        targets = tuple(target.replace("vision/", "encoder/", 1) for target in one.targets) if vision else ()
        rows.append(Row(source, targets, one.transform))
    # the embedding of "no object" is stored without a text classifier, too
    void = "void_embedding.weight"
    text = config.head.text_classes
    rows.append(row(void, f"{_DECODER}/classifier/void") if text else drop(void))
    return Table((*_original_head(), *rows), "CLOUDS' Mask2Former")


_KEYS: Keys = {
    "width": ("feature_size", Fields.size, 256),
    "mask_width": ("mask_feature_size", Fields.size, 256),
    "heads": ("num_attention_heads", Fields.size, 8),
    "pixel_layers": ("encoder_layers", Fields.size, 6),
    "pixel_hidden": ("encoder_feedforward_dim", Fields.size, 1024),
    "hidden": ("dim_feedforward", Fields.size, 2048),
    "queries": ("num_queries", Fields.size, 100),
}
_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("relu",),
    "pre_norm": (False,),
    "enforce_input_projection": (False,),
    "common_stride": (4,),
    "feature_strides": ([4, 8, 16, 32],),
    "dropout": (0.0,),
}


def read(file: Path, names: Names) -> tuple[Mask2FormerConfig, Table]:
    """Returns the configuration that config.json, or the names and shapes, show, and the table of the layout.

    Raises UserError for an encoder that is not built here.
    """
    if any(name.startswith("sem_seg_head.") for name in names):
        config = _original_config(file, names)
        return config, _original(config)
    fields = Fields.read(file.with_name("config.json"), "take a Mask2Former on a ResNet, or CLOUDS' weights")
    fields.only(_FIXED)
    backbone = fields.section("backbone_config")
    if backbone.values.get("model_type") != "resnet":
        raise backbone.fault("model_type", "'resnet', which alone can be built")
    values = fields.of(_KEYS)
    fields.divides("num_attention_heads", values["heads"], values["width"], "feature_size")
    if fields.size("hidden_dim", 256) != values["width"] or values["width"] % 32:
        raise fields.fault("hidden_dim", f"feature_size, {values['width']}, and a multiple of 32")
    head = HeadConfig(
        classes=names["class_predictor.bias"][0] - 1, layers=fields.size("decoder_layers", 10) - 1, **values
    )
    return Mask2FormerConfig(resnet.hugging_face_config(backbone), head), TRANSFORMERS


def export(config: Mask2FormerConfig, layout: str | None = None) -> Export:
    """Returns the files of a saved network: transformers' layout with a ResNet, else CLOUDS' without the text tower.

    Raises UserError for text classes or queries on a ResNet, which transformers' Mask2Former does not have.
    """
    head = config.head
    if not isinstance(config.encoder, ResNetEncoderConfig):
        value = {"model_type": CLOUDS_KIND, "num_attention_heads": head.heads}
        return Export("model.safetensors", _original(config), {"config.json": value})
    if head.text_classes or head.fixed or head.points != 4:
        raise UserError("text classes, text queries and other than 4 points are stored with CLIP's encoders alone")
    labels = {str(index): f"LABEL_{index}" for index in range(head.classes)}
    stages = [f"stage{index}" for index in range(1, 5)]
    backbone = {key: allowed[0] for key, allowed in resnet.FIXED.items()} | {
        "model_type": "resnet",
        "depths": list(config.encoder.layers),
        "embedding_size": config.encoder.width,
        "hidden_sizes": list(config.encoder.channels),
        "out_features": stages,
    }
    value = written(head, _KEYS, _FIXED) | {
        "architectures": ["Mask2FormerForUniversalSegmentation"],
        "model_type": KIND,
        "hidden_dim": head.width,
        "decoder_layers": head.layers + 1,
        "backbone_config": backbone,
        "id2label": labels,
        "label2id": {label: int(index) for index, label in labels.items()},
    }
    return Export("model.safetensors", TRANSFORMERS, {"config.json": value})


def _original_config(file: Path, names: Names) -> Mask2FormerConfig:
    """Returns the configuration that names and shapes of the original code show."""
    json = file.with_name("config.json")
    heads = Fields(read_json(json) if json.is_file() else {}, json, "leave it out for 8").size("num_attention_heads", 8)
    pixel, decoder = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
    layer, mask = f"{pixel}transformer.encoder.layers.", f"{pixel}mask_features.weight"
    needed = (f"{layer}0.linear1.bias", f"{layer}0.self_attn.attention_weights.bias", mask)
    ffn = f"{decoder}transformer_ffn_layers."
    if missing := [name for name in (*needed, f"{ffn}0.linear1.bias") if name not in names]:
        raise UserError(f"{file}: has no {', '.join(missing)}; take the whole checkpoint of a Mask2Former")
    text_classes, fixed = f"{decoder}logit_scale" in names, f"{decoder}text_query.bias" in names
    classes = names.get(f"{decoder}class_embed.bias")
    text_width = HeadConfig.text_width
    if text_classes or fixed:
        text_width = (
            names[f"{decoder}class_embed.layers.2.weight"][0]
            if text_classes
            else names[f"{decoder}text_query.weight"][1]
        )
    head = HeadConfig(
        classes=HeadConfig.classes if classes is None else classes[0] - 1,
        width=names[mask][1],
        mask_width=names[mask][0],
        heads=heads,
        points=names[needed[1]][0] // (heads * 3),
        pixel_layers=count_numbers(names, layer),
        pixel_hidden=names[needed[0]][0],
        layers=count_numbers(names, ffn),
        hidden=names[f"{ffn}0.linear1.bias"][0],
        queries=HeadConfig.queries if fixed else names.get(BARE, (HeadConfig.queries,))[0],
        text_classes=text_classes,
        fixed=fixed,
        text_width=text_width,
    )
    encoder, embed_dim = _tower(file, names)
    return Mask2FormerConfig(encoder, head, embed_dim)


def _tower(file: Path, names: Names) -> tuple[ResNetConfig | ConvNextConfig, int]:
    """Returns the configuration of the image tower that names and shapes show, and its outputs."""
    tower = "backbone.clip_model.visual."
    if f"{tower}trunk.stem.0.weight" in names:
        stages = [f"{tower}trunk.stages.{stage}.blocks." for stage in range(4)]
        a, b, c, d = (names[f"{stage}0.conv_dw.bias"][0] for stage in stages)
        embed_dim, head_width = names[f"{tower}head.mlp.fc2.weight"]
        e, f, g, h = (count_numbers(names, stage) for stage in stages)
        return ConvNextConfig(depths=(e, f, g, h), channels=(a, b, c, d), head_width=head_width), embed_dim
    position, stem = names.get(f"{tower}attnpool.positional_embedding"), names.get(f"{tower}conv1.weight")
    if position is None or stem is None:
        raise UserError(f"{file}: holds neither CLIP's ConvNeXt nor its ResNet; take CLOUDS' weights of one of them")
    a, b, c, d = (count_numbers(names, f"{tower}layer{stage}.") for stage in range(1, 5))
    width = 2 * stem[0]
    config = ResNetConfig(32 * math.isqrt(position[0] - 1), (a, b, c, d), width, heads=width // 2)
    return config, names[f"{tower}attnpool.c_proj.bias"][0]
