"""Configurations of Stable Diffusion's networks out of and into diffusers' JSON, and which table their names need."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fmda.errors import UserError
from fmda.models.clip import TextConfig
from fmda.models.sd_unet import UNetConfig
from fmda.models.sd_vae import VaeConfig
from fmda.weights import diffusers_tables
from fmda.weights.clip import TEXT_KEYS, read_text
from fmda.weights.reader import Fields, Keys, written
from fmda.weights.source import DIFFUSION_FILES, TEXT_FILES
from fmda.weights.table import Export, Names, Table

Json = dict[str, Any]

UNET_CLASSES = ("UNet2DConditionModel", "FlaxUNet2DConditionModel")
VAE_CLASSES = ("AutoencoderKL", "FlaxAutoencoderKL")
TEXT_MODEL = "clip_text_model"
"""`model_type` of a text encoder's configuration."""

# Options of which only these values can be built here.
_UNET_FIXED: Json = {
    "act_fn": ("silu",),
    "flip_sin_to_cos": (True,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "freq_shift": (0,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "attention_type": ("default",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "mid_block_only_cross_attention": (None, False),
    **dict.fromkeys(("downsample_padding", "transformer_layers_per_block"), (1,)),
    **dict.fromkeys(("mid_block_scale_factor", "resnet_out_scale_factor"), (1,)),
    **dict.fromkeys(("center_input_sample", "only_cross_attention", "dual_cross_attention"), (False,)),
    "resnet_skip_time_act": (False,),
    **dict.fromkeys(
        (
            "class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim", "encoder_hid_dim_type",
            "time_cond_proj_dim", "time_embedding_dim", "time_embedding_act_fn", "timestep_post_act",
            "cross_attention_norm", "reverse_transformer_layers_per_block",
        ),
        (None,),
    ),
}  # fmt: skip
_VAE_FIXED: Json = {
    "act_fn": ("silu",),
    **dict.fromkeys(("in_channels", "out_channels"), (3,)),
    **dict.fromkeys(("shift_factor", "latents_mean", "latents_std"), (None,)),
    **dict.fromkeys(("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"), (True,)),
}
_UNET_KEYS: Keys = {
    "in_channels": ("in_channels", Fields.size, 4),
    "out_channels": ("out_channels", Fields.size, 4),
    "layers": ("layers_per_block", Fields.size, 2),
    "context_width": ("cross_attention_dim", Fields.size, 1280),
    "linear_projection": ("use_linear_projection", Fields.flag, False),
}
_VAE_KEYS: Keys = {
    "layers": ("layers_per_block", Fields.size, 1),
    "latent_channels": ("latent_channels", Fields.size, 4),
    "scale": ("scaling_factor", Fields.number, 0.18215),
    "sample_size": ("sample_size", Fields.size_or_null, 32),
}
_TAKE = "give a Stable Diffusion 1.x or 2.x checkpoint"
_CROSS_DOWN, _DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
_UPWARDS = {_CROSS_DOWN: "CrossAttnUpBlock2D", _DOWN: "UpBlock2D"}


def _opened(file: Path, key: str, kinds: tuple[str, ...], fixed: Json) -> Fields:
    """Returns the fields of the configuration beside a weight file, after checking that it can be built here."""
    fields = Fields.read(file.with_name("config.json"), _TAKE)
    if fields.values.get(key) not in kinds:
        raise fields.fault(key, f"'{kinds[0]}': this is another network's folder")
    fields.only(fixed)
    return fields


def _widths(fields: Fields, default: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Returns the width of each level and the groups of the GroupNorms, which divide them."""
    groups, widths = fields.size("norm_num_groups", 32), fields.sizes("block_out_channels", default)
    for width in widths:
        fields.divides("norm_num_groups", groups, width, "every one of block_out_channels")
    return widths, groups


def read_unet(file: Path, names: Names) -> tuple[UNetConfig, Table]:
    """Returns the configuration beside a UNet's weight file, and the table of its layout."""
    fields = _opened(file, "_class_name", UNET_CLASSES, _UNET_FIXED)
    config = fields.values
    if config.get("in_channels") == 9:
        raise UserError(
            f"{fields.where}: in_channels is 9, this is an inpainting UNet, which also reads a mask and a masked "
            "image; give a text-to-image checkpoint (4 channels)"
        )
    channels, groups = _widths(fields, (320, 640, 1280, 1280))
    down = config.get("down_block_types", [_CROSS_DOWN] * 3 + [_DOWN])
    if not isinstance(down, list) or len(down) != len(channels) or any(name not in (*_UPWARDS,) for name in down):
        raise fields.fault("down_block_types", f"{len(channels)} of '{_CROSS_DOWN}' or '{_DOWN}', which can be built")
    up = [_UPWARDS[name] for name in reversed(down)]
    fields.only({"up_block_types": (up,)})
    attention = tuple(name == _CROSS_DOWN for name in down)
    key = "attention_head_dim" if config.get("num_attention_heads") is None else "num_attention_heads"
    if isinstance(config.get(key), list):
        heads = fields.sizes(key, count=len(channels))
    else:
        heads = (fields.size(key, 8),) * len(channels)
    # the middle attends too, with the heads of the last level
    for width, count, attends in zip(channels, heads, (*attention[:-1], True), strict=True):
        if attends:
            fields.divides(key, count, width, "its level in block_out_channels")
    flax = config["_class_name"].startswith("Flax")
    sample_size = fields.size_or_null("sample_size", 64)
    unet = UNetConfig(
        **fields.of(_UNET_KEYS),
        channels=channels,
        attention=attention,
        heads=heads,
        groups=groups,
        # the first releases of 1.x name 32, which diffusers' pipeline overrides too
        sample_size=max(64, sample_size) if _before_0_9(config) else sample_size,
        # the arithmetic of the library that wrote the checkpoint, so that outputs agree
        gate="gelu_tanh" if flax else "gelu",
        transformer_eps=1e-5 if flax else 1e-6,
    )
    tables = diffusers_tables.FLAX_UNET if file.suffix == ".msgpack" else diffusers_tables.UNET
    return unet, tables[unet.linear_projection]


def _before_0_9(config: Mapping[str, Any]) -> bool:
    """Returns whether a configuration names a release of diffusers before 0.9."""
    numbers = re.match(r"(\d+)(?:\.(\d+))?", str(config.get("_diffusers_version", "")))
    return numbers is not None and (int(numbers[1]), int(numbers[2] or 0)) < (0, 9)


def saved_unet(config: UNetConfig) -> UNetConfig:
    """Returns the configuration that a UNet has after it was saved and loaded: PyTorch's arithmetic."""
    return replace(config, gate="gelu", transformer_eps=1e-6)


def export_unet(config: UNetConfig, layout: str | None = None) -> Export:
    """Returns the files of a saved UNet, as diffusers' UNet2DConditionModel opens them."""
    down = [_CROSS_DOWN if attends else _DOWN for attends in config.attention]
    value = written(config, _UNET_KEYS, _UNET_FIXED) | {
        "_class_name": UNET_CLASSES[0],
        "block_out_channels": list(config.channels),
        "down_block_types": down,
        "up_block_types": [_UPWARDS[name] for name in reversed(down)],
        "attention_head_dim": config.heads[0] if len(set(config.heads)) == 1 else list(config.heads),
        "norm_num_groups": config.groups,
        "sample_size": config.sample_size,
    }
    return Export(DIFFUSION_FILES[0], diffusers_tables.UNET[config.linear_projection], {"config.json": value})


def _vae_blocks(levels: int) -> Json:
    return {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}


def read_vae(file: Path, names: Names) -> tuple[VaeConfig, Table]:
    """Returns the configuration beside an autoencoder's weight file, and the table of its layout."""
    fields = _opened(file, "_class_name", VAE_CLASSES, _VAE_FIXED)
    channels, groups = _widths(fields, (64,))
    fields.only({key: (types,) for key, types in _vae_blocks(len(channels)).items()})
    config = VaeConfig(channels=channels, groups=groups, **fields.of(_VAE_KEYS))
    if file.suffix == ".msgpack":
        return config, diffusers_tables.FLAX_VAE
    old = any(".proj_attn." in name for name in names)
    return config, diffusers_tables.OLD_VAE if old else diffusers_tables.VAE


def export_vae(config: VaeConfig, layout: str | None = None) -> Export:
    """Returns the files of a saved autoencoder, as diffusers' AutoencoderKL opens them."""
    value = written(config, _VAE_KEYS, _VAE_FIXED) | {
        "_class_name": VAE_CLASSES[0],
        "block_out_channels": list(config.channels),
        **_vae_blocks(len(config.channels)),
        "norm_num_groups": config.groups,
    }
    return Export(DIFFUSION_FILES[0], diffusers_tables.VAE, {"config.json": value})


def read_text_encoder(file: Path, names: Names) -> tuple[TextConfig, Table]:
    """Returns the configuration beside a text encoder's weight file, and the table of its layout."""
    config = read_text(_opened(file, "model_type", (TEXT_MODEL,), {}))
    if file.suffix == ".msgpack":
        return config, diffusers_tables.FLAX_TEXT_ENCODER
    bare = any(name.startswith("encoder.layers.") for name in names)
    return config, diffusers_tables.BARE_TEXT_ENCODER if bare else diffusers_tables.TEXT_ENCODER


def export_text_encoder(config: TextConfig, layout: str | None = None) -> Export:
    """Returns the files of a saved text encoder, as transformers' CLIPTextModel opens them."""
    value = written(config, TEXT_KEYS, {}) | {
        "architectures": ["CLIPTextModel"],
        "model_type": TEXT_MODEL,
        "projection_dim": config.width,
        "attention_dropout": 0.0,
    }
    return Export(TEXT_FILES[0], diffusers_tables.TEXT_ENCODER, {"config.json": value})
