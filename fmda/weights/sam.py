"""SAM's configurations: out of and into transformers' JSON, and out of the shapes that its authors' files hold."""

import math
from pathlib import Path
from typing import Any

from fmda.errors import UserError
from fmda.models.dino import IMAGENET_MEAN, IMAGENET_STD
from fmda.models.sam import SamConfig, SamVitConfig, TinyVitConfig
from fmda.models.sam.decoder import MASKS, REDUCTION
from fmda.weights.clip import image_processor
from fmda.weights.files import config_file
from fmda.weights.reader import Fields, Keys, written
from fmda.weights.sam_tables import HF_SAM, SAM, mobile_sam
from fmda.weights.table import Export, Names, Table, count_numbers

KIND, MOBILE = "sam", "mobile_sam"
BARE = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
"""A name that only the authors' layouts have."""
_ENCODER: Keys = {
    "image_size": ("image_size", Fields.size, 1024),
    "patch_size": ("patch_size", Fields.size, 16),
    "width": ("hidden_size", Fields.size, 768),
    "layers": ("num_hidden_layers", Fields.size, 12),
    "heads": ("num_attention_heads", Fields.size, 12),
    "window": ("window_size", Fields.size, 14),
    "channels": ("output_channels", Fields.size, 256),
    "norm_eps": ("layer_norm_eps", Fields.number, 1e-6),
}
"""Of transformers' SamVisionConfig."""
_ENCODER_FIXED = {
    "num_channels": (3,),
    "hidden_act": ("gelu",),
    "qkv_bias": (True,),
    "use_abs_pos": (True,),
    "use_rel_pos": (True,),
    "attention_dropout": (0.0,),
}
_PROMPTS: Keys = {"mask_channels": ("mask_input_channels", Fields.size, 16)}
_PROMPTS_FIXED = {"num_point_embeddings": (4,), "hidden_act": ("gelu",), "layer_norm_eps": (1e-6,)}
_DECODER: Keys = {
    "layers": ("num_hidden_layers", Fields.size, 2),
    "heads": ("num_attention_heads", Fields.size, 8),
    "mlp_width": ("mlp_dim", Fields.size, 2048),
    "iou_width": ("iou_head_hidden_dim", Fields.size, 256),
    "decoder_eps": ("layer_norm_eps", Fields.number, 1e-6),
}
"""Of transformers' SamMaskDecoderConfig."""
_DECODER_FIXED = {
    "hidden_act": ("relu",),
    "attention_downsample_rate": (REDUCTION,),
    "num_multimask_outputs": (MASKS - 1,),
    "iou_head_depth": (3,),
}
_PARTS = ("vision", "prompt_encoder", "mask_decoder")
_DEFAULTS = {"hidden_size": 256, "image_size": 1024, "patch_size": 16}
"""Of what prompt encoder and decoder repeat of the image encoder."""


_AUTHORS: Keys = {
    "heads": ("num_attention_heads", Fields.size, 8),
    "decoder_eps": ("layer_norm_eps", Fields.number, 1e-5),
}
"""What the shapes of the authors' layouts do not show, by keys of ours."""


def read(file: Path, names: Names) -> tuple[SamConfig, Table]:
    """Returns the configuration beside a weight file, or that of its shapes, and the table of its stored names."""
    if BARE in names:
        return authors(file, names)
    fields = Fields.read(config_file(file))
    encoder, prompts, decoder = (fields.section(f"{part}_config") for part in _PARTS)
    encoder.only(_ENCODER_FIXED)
    prompts.only(_PROMPTS_FIXED)
    decoder.only(_DECODER_FIXED)
    values = encoder.of(_ENCODER)
    encoder.divides("num_attention_heads", values["heads"], values["width"], "hidden_size")
    encoder.divides("patch_size", values["patch_size"], values["image_size"], "image_size")
    same = {"hidden_size": values["channels"], "image_size": values["image_size"], "patch_size": values["patch_size"]}
    for section, key in [(decoder, "hidden_size"), *((prompts, key) for key in same)]:
        if section.size(key, _DEFAULTS[key]) != same[key]:
            raise section.fault(key, f"{same[key]}, as in vision_config")
    rest = prompts.of(_PROMPTS) | decoder.of(_DECODER)
    decoder.divides("num_attention_heads", rest["heads"], values["channels"] // REDUCTION, "half of hidden_size")
    whole = encoder.values.get("global_attn_indexes", [2, 5, 8, 11])
    if not (isinstance(whole, list) and all(isinstance(one, int) and 0 <= one < values["layers"] for one in whole)):
        raise encoder.fault("global_attn_indexes", f"a list of numbers of blocks, from 0 to {values['layers'] - 1}")
    mlp = encoder.size_or_null("mlp_dim", int(values["width"] * encoder.number("mlp_ratio", 4.0)))
    return SamConfig(SamVitConfig(whole=tuple(whole), mlp_width=mlp, **values), **rest), HF_SAM


def authors(file: Path, names: Names) -> tuple[SamConfig, Table]:
    """Returns the configuration and the table of a network under its authors' names, or under MobileSAM's.

    Sizes follow from shapes. What no shape shows is as in the published checkpoints, unless a config.json beside the
    file says otherwise. Raises UserError for names or shapes of another network.
    """
    path = config_file(file)
    fields = Fields.read(path) if path.is_file() else Fields({}, path, "correct the file")
    try:
        tiny = "image_encoder.patch_embed.seq.0.c.weight" in names
        config = SamConfig(
            _tiny_from_shapes(names, fields) if tiny else _vit_from_shapes(names),
            names["prompt_encoder.mask_downscaling.3.weight"][0],
            count_numbers(names, "mask_decoder.transformer.layers."),
            mlp_width=names["mask_decoder.transformer.layers.0.mlp.lin1.weight"][0],
            iou_width=names["mask_decoder.iou_prediction_head.layers.0.weight"][0],
            **fields.of(_AUTHORS),
        )
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"{file}: names or shapes are not those of SAM or MobileSAM ({error}); take it as it was published"
        ) from None
    encoder = config.encoder
    return config, mobile_sam(encoder) if isinstance(encoder, TinyVitConfig) else SAM


def _vit_from_shapes(names: Names) -> SamVitConfig:
    source = "image_encoder"
    width, _, patch, _ = names[f"{source}.patch_embed.proj.weight"]
    side, layers = names[f"{source}.pos_embed"][1], count_numbers(names, f"{source}.blocks.")
    head = names[f"{source}.blocks.0.attn.rel_pos_h"][1]
    reach = [(names[f"{source}.blocks.{i}.attn.rel_pos_h"][0] + 1) // 2 for i in range(layers)]
    return SamVitConfig(
        side * patch, patch, width, layers, width // head, names[f"{source}.blocks.0.mlp.lin1.weight"][0],
        min(reach), tuple(i for i, one in enumerate(reach) if one == side), names[f"{source}.neck.0.weight"][0],
    )  # fmt: skip


def _tiny_from_shapes(names: Names, fields: Fields) -> TinyVitConfig:
    source = "image_encoder.layers"
    biases = [names[f"{source}.{stage}.blocks.0.attn.attention_biases"] for stage in (1, 2, 3)]
    widths = [names["image_encoder.patch_embed.seq.2.c.weight"][0]]
    widths += [names[f"{source}.{stage}.downsample.conv3.c.weight"][0] for stage in (0, 1, 2)]
    depths = [count_numbers(names, f"{source}.{stage}.blocks.") for stage in range(4)]
    return TinyVitConfig(
        fields.size("image_size", 1024), (widths[0], widths[1], widths[2], widths[3]),
        (depths[0], depths[1], depths[2], depths[3]), (biases[0][0], biases[1][0], biases[2][0]),
        (math.isqrt(biases[0][1]), math.isqrt(biases[1][1]), math.isqrt(biases[2][1])),
        names["image_encoder.neck.0.weight"][0],
    )  # fmt: skip


def export(config: SamConfig, layout: str | None = None) -> Export:
    """Returns the files of a saved network, as transformers' SamModel opens them, or under MobileSAM's names."""
    encoder = config.encoder
    if isinstance(encoder, TinyVitConfig):
        value: dict[str, Any] = {"model_type": MOBILE, "image_size": encoder.image_size}
        return Export("model.safetensors", mobile_sam(encoder), {"config.json": value | written(config, _AUTHORS, {})})
    prompts = {"hidden_size": encoder.channels, "image_size": encoder.image_size, "patch_size": encoder.patch_size}
    parts: tuple[dict[str, Any], ...] = (
        written(encoder, _ENCODER, _ENCODER_FIXED)
        | {"mlp_dim": encoder.mlp_width, "global_attn_indexes": list(encoder.whole)}
        | {"num_pos_feats": encoder.channels // 2},
        written(config, _PROMPTS, _PROMPTS_FIXED) | prompts,
        written(config, _DECODER, _DECODER_FIXED) | {"hidden_size": encoder.channels},
    )
    value = {"architectures": ["SamModel"], "model_type": KIND} | {
        f"{part}_config": section for part, section in zip(_PARTS, parts, strict=True)
    }
    processor = image_processor("Sam", {"longest_edge": encoder.image_size}, 2, IMAGENET_MEAN, IMAGENET_STD) | {
        "processor_class": "SamProcessor",
        "do_pad": True,
        "pad_size": {"height": encoder.image_size, "width": encoder.image_size},
        "do_convert_rgb": True,
    }
    return Export("model.safetensors", HF_SAM, {"config.json": value, "preprocessor_config.json": processor})
