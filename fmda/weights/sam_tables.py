"""SAM's tables: transformers' names and those of its authors, for every kind of image encoder."""

from fmda.models.sam.tiny_vit import TinyVitConfig
from fmda.weights.layers import Layer, torch_rows
from fmda.weights.table import Row, Table, drop, row
from fmda.weights.transforms import BATCH, QKV_BIAS, QKV_WEIGHT, qkv_by_head

_ATTENTIONS = (
    ("self_attn", "self_attention"),
    ("cross_attn_token_to_image", "to_image"),
    ("cross_attn_image_to_token", "to_tokens"),
)


def _vit(source: str, blocks: str, patch: str, norm: str, neck: tuple[str, ...]) -> tuple[Row, ...]:
    """Returns the rows of the vision transformer, whose blocks are equal in both layouts but for their norms."""
    theirs, ours = f"{source}.{blocks}.{{i}}", "encoder/blocks/{i}"
    qkv = tuple(f"{ours}/attention/{part}" for part in ("query", "key", "value"))
    return (
        row(f"{source}.pos_embed", "encoder/position", BATCH),
        row(f"{theirs}.attn.qkv.weight", tuple(f"{part}/kernel" for part in qkv), QKV_WEIGHT),
        row(f"{theirs}.attn.qkv.bias", tuple(f"{part}/bias" for part in qkv), QKV_BIAS),
        row(f"{theirs}.attn.rel_pos_h", f"{ours}/attention/rows"),
        row(f"{theirs}.attn.rel_pos_w", f"{ours}/attention/columns"),
        *torch_rows(
            (
                (f"{source}.{patch}", "encoder/patch", "conv"),
                (f"{theirs}.{norm}1", f"{ours}/norm1", "norm"),
                (f"{theirs}.attn.proj", f"{ours}/attention/out", "linear"),
                (f"{theirs}.{norm}2", f"{ours}/norm2", "norm"),
                (f"{theirs}.mlp.lin1", f"{ours}/mlp/up", "linear"),
                (f"{theirs}.mlp.lin2", f"{ours}/mlp/down", "linear"),
                *_neck(source, neck),
            )
        ),
    )


def _neck(source: str, names: tuple[str, ...]) -> list[Layer]:
    parts = (("project", "conv"), ("norm1", "norm"), ("conv", "conv"), ("norm2", "norm"))
    return [
        (f"{source}.neck.{name}", f"encoder/neck/{part}", kind) for name, (part, kind) in zip(names, parts, strict=True)
    ]


def _transformer(norm: str, final_norm: str) -> list[Layer]:
    """Returns the layers of the decoder's transformer, whose norms alone are named differently."""
    theirs, ours, final = "mask_decoder.transformer", "decoder/blocks/{i}", "final_attn_token_to_image"
    pairs = [(f"{theirs}.layers.{{i}}.{stored}", f"{ours}/{name}") for stored, name in _ATTENTIONS]
    projections = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out"))
    return [
        *(
            (f"{source}.{stored}", f"{target}/{name}", "linear")
            for source, target in [*pairs, (f"{theirs}.{final}", "decoder/final")]
            for stored, name in projections
        ),
        *((f"{theirs}.layers.{{i}}.{norm}{n}", f"{ours}/norm{n}", "norm") for n in (1, 2, 3, 4)),
        (f"{theirs}.layers.{{i}}.mlp.lin1", f"{ours}/mlp/up", "linear"),
        (f"{theirs}.layers.{{i}}.mlp.lin2", f"{ours}/mlp/down", "linear"),
        (f"{theirs}.{final_norm}", "decoder/final_norm", "norm"),
    ]


def _heads(first: str, second: str, last: str) -> list[Layer]:
    """Returns the layers of the heads of masks and IoU, by the stored names of their three layers."""
    places = (("output_hypernetworks_mlps.{i}", "mask_heads/{i}"), ("iou_prediction_head", "iou_head"))
    return [
        (f"mask_decoder.{stored}.{layer}", f"decoder/{name}/layers/{n}", "linear")
        for stored, name in places
        for n, layer in enumerate((first, second, last))
    ]


def _tokens(points: str) -> tuple[Row, ...]:
    """Returns the rows of the learned vectors; `points` is the stored name of those of labels."""
    return (
        row(f"prompt_encoder.{points}.{{i}}.weight", "prompts/labels/{i}", BATCH),
        row("prompt_encoder.not_a_point_embed.weight", "prompts/nothing", BATCH),
        row("prompt_encoder.no_mask_embed.weight", "prompts/no_mask", BATCH),
        row("mask_decoder.iou_token.weight", "decoder/iou_token"),
        row("mask_decoder.mask_tokens.weight", "decoder/mask_tokens"),
    )


_TRANSFORMERS = (
    *_tokens("point_embed"),
    row("shared_image_embedding.positional_embedding", "prompts/frequencies"),
    # the same array once more
    drop("prompt_encoder.shared_embedding.positional_embedding"),
    *torch_rows(
        (
            *_transformer("layer_norm", "layer_norm_final_attn"),
            *_heads("proj_in", "layers.0", "proj_out"),
            *((f"prompt_encoder.mask_embed.conv{n}", f"prompts/mask/conv{n}", "conv") for n in (1, 2, 3)),
            *((f"prompt_encoder.mask_embed.layer_norm{n}", f"prompts/mask/norm{n}", "norm") for n in (1, 2)),
            ("mask_decoder.upscale_conv1", "decoder/upscale1", "up_conv"),
            ("mask_decoder.upscale_layer_norm", "decoder/upscale_norm", "norm"),
            ("mask_decoder.upscale_conv2", "decoder/upscale2", "up_conv"),
        )
    ),
)
_AUTHORS = (
    *_tokens("point_embeddings"),
    row("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", "prompts/frequencies"),
    *torch_rows(
        (
            *_transformer("norm", "norm_final_attn"),
            *_heads("layers.0", "layers.1", "layers.2"),
            ("prompt_encoder.mask_downscaling.0", "prompts/mask/conv1", "conv"),
            ("prompt_encoder.mask_downscaling.1", "prompts/mask/norm1", "norm"),
            ("prompt_encoder.mask_downscaling.3", "prompts/mask/conv2", "conv"),
            ("prompt_encoder.mask_downscaling.4", "prompts/mask/norm2", "norm"),
            ("prompt_encoder.mask_downscaling.6", "prompts/mask/conv3", "conv"),
            ("mask_decoder.output_upscaling.0", "decoder/upscale1", "up_conv"),
            ("mask_decoder.output_upscaling.1", "decoder/upscale_norm", "norm"),
            ("mask_decoder.output_upscaling.3", "decoder/upscale2", "up_conv"),
        )
    ),
)
_HF_NECK = ("conv1", "layer_norm1", "conv2", "layer_norm2")
_NECK = ("0", "1", "2", "3")

HF_SAM = Table(
    (*_vit("vision_encoder", "layers", "patch_embed.projection", "layer_norm", _HF_NECK), *_TRANSFORMERS),
    "transformers' SAM",
)
"""transformers.SamModel."""

SAM = Table((*_vit("image_encoder", "blocks", "patch_embed.proj", "norm", _NECK), *_AUTHORS), "SAM")
"""facebookresearch/segment-anything."""


def mobile_sam(config: TinyVitConfig) -> Table:
    """Returns the table of ChaoningZhang/MobileSAM: another encoder, whose projections lie head by head."""
    source, triple = "image_encoder", ("expand", "mix", "reduce")
    layers = [
        layer for n in (0, 2) for layer in _conv_norm(f"{source}.patch_embed.seq.{n}", f"encoder/stem{n // 2 + 1}")
    ]
    for n, part in enumerate(triple, 1):
        layers += _conv_norm(f"{source}.layers.0.blocks.{{i}}.conv{n}", f"encoder/convs/{{i}}/{part}")
        layers += _conv_norm(f"{source}.layers.{{i}}.downsample.conv{n}", f"encoder/steps/{{i}}/{part}")
    rows: list[Row] = []
    for stage, heads in enumerate(config.heads):
        theirs, ours = f"{source}.layers.{stage + 1}.blocks.{{i}}", f"encoder/stages/{stage}/{{i}}"
        qkv = tuple(f"{ours}/attention/{part}" for part in ("query", "key", "value"))
        weight, bias = qkv_by_head(heads)
        rows += [
            row(f"{theirs}.attn.qkv.weight", tuple(f"{part}/kernel" for part in qkv), weight),
            row(f"{theirs}.attn.qkv.bias", tuple(f"{part}/bias" for part in qkv), bias),
            row(f"{theirs}.attn.attention_biases", f"{ours}/attention/bias"),
            drop(f"{theirs}.attn.attention_bias_idxs"),
        ]
        layers += [
            (f"{theirs}.attn.norm", f"{ours}/attention/norm", "norm"),
            (f"{theirs}.attn.proj", f"{ours}/attention/out", "linear"),
            *_conv_norm(f"{theirs}.local_conv", f"{ours}/local"),
            (f"{theirs}.mlp.norm", f"{ours}/mlp/norm", "norm"),
            (f"{theirs}.mlp.fc1", f"{ours}/mlp/up", "linear"),
            (f"{theirs}.mlp.fc2", f"{ours}/mlp/down", "linear"),
        ]
    # of the classifier that the encoder once was
    unused = [drop(f"{source}.{layer}.{leaf}") for layer in ("norm_head", "head") for leaf in ("weight", "bias")]
    return Table((*rows, *unused, *torch_rows((*layers, *_neck(source, _NECK))), *_AUTHORS), "MobileSAM")


def _conv_norm(source: str, target: str) -> list[Layer]:
    return [(f"{source}.c", f"{target}/conv", "conv"), (f"{source}.bn", f"{target}/norm", "batch_norm")]
