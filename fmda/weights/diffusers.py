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
    "freq_shift": (0,),
    "center_input_sample": (False,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,),
    "dual_cross_attention": (False,),
    "transformer_layers_per_block": (1,),
    "downsample_padding": (1,),
    "norm_eps": (1e-5,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "addition_embed_type": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "mid_block_scale_factor": (1,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "cross_attention_norm": (None,),
    "mid_block_only_cross_attention": (None, False),
    "reverse_transformer_layers_per_block": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
}
_VAE_FIXED: Json = {
    "act_fn": ("silu",),
    "out_channels": (3,),
    "in_channels": (3,),
    "shift_factor": (None,),
    "latents_mean": (None,),
    "latents_std": (None,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "mid_block_add_attention": (True,),
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


def _opened(folder: Path, key: str, kinds: tuple[str, ...], fixed: Json) -> Fields:
    """Returns the fields of `config.json` after checking that they describe what can be built here."""
    fields = Fields.read(folder / "config.json", _TAKE)
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


def read_unet(folder: Path) -> UNetConfig:
    """Returns the configuration in a UNet's folder. Raises UserError for a network of another kind or shape."""
    fields = _opened(folder, "_class_name", UNET_CLASSES, _UNET_FIXED)
    config = fields.values
    if config.get("in_channels") == 9:
        raise UserError(
            f"{fields.where}: in_channels is 9, this is an inpainting UNet, which also reads a mask and a masked "
            "image; give a text-to-image checkpoint (4 channels)"
        )
    channels, groups = _widths(fields, (320, 640, 1280, 1280))
    down = config.get("down_block_types", [_CROSS_DOWN] * 3 + [_DOWN])
    if (
        not isinstance(down, list)
        or len(down) != len(channels)
        or any(name not in (_CROSS_DOWN, _DOWN) for name in down)
    ):
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
    return UNetConfig(
        **fields.of(_UNET_KEYS),
        channels=channels,
        attention=attention,
        heads=heads,
        groups=groups,
        # the first releases of 1.x name 32, which diffusers' pipeline overrides too
        sample_size=max(64, sample_size) if _before_0_9(config) else sample_size,
        # each library's own arithmetic, so that a checkpoint gives here what it gave there
        gate="gelu_tanh" if flax else "gelu",
        transformer_eps=1e-5 if flax else 1e-6,
    )


def _before_0_9(config: Mapping[str, Any]) -> bool:
    """Returns whether a configuration names a release of diffusers before 0.9."""
    numbers = re.match(r"(\d+)(?:\.(\d+))?", str(config.get("_diffusers_version", "")))
    return numbers is not None and (int(numbers[1]), int(numbers[2] or 0)) < (0, 9)


def saved_unet(config: UNetConfig) -> UNetConfig:
    """Returns the configuration that a UNet has when what `write_unet` gives is read: PyTorch's arithmetic."""
    return replace(config, gate="gelu", transformer_eps=1e-6)


def write_unet(config: UNetConfig) -> Json:
    """Returns the `config.json` object that diffusers' UNet2DConditionModel opens, which computes as `saved_unet`."""
    down = [_CROSS_DOWN if attends else _DOWN for attends in config.attention]
    fixed = {key: allowed[0] for key, allowed in _UNET_FIXED.items()}
    return fixed | {
        "_class_name": UNET_CLASSES[0],
        **written(config, _UNET_KEYS),
        "block_out_channels": list(config.channels),
        "down_block_types": down,
        "up_block_types": [_UPWARDS[name] for name in reversed(down)],
        "attention_head_dim": config.heads[0] if len(set(config.heads)) == 1 else list(config.heads),
        "norm_num_groups": config.groups,
        "sample_size": config.sample_size,
    }


def read_vae(folder: Path) -> VaeConfig:
    """Returns the configuration in an autoencoder's folder. Raises UserError for another kind or shape."""
    fields = _opened(folder, "_class_name", VAE_CLASSES, _VAE_FIXED)
    channels, groups = _widths(fields, (64,))
    levels = len(channels)
    fields.only(
        {"down_block_types": (["DownEncoderBlock2D"] * levels,), "up_block_types": (["UpDecoderBlock2D"] * levels,)}
    )
    return VaeConfig(channels=channels, groups=groups, **fields.of(_VAE_KEYS))


def write_vae(config: VaeConfig) -> Json:
    """Returns the `config.json` object that diffusers' AutoencoderKL opens."""
    fixed = {key: allowed[0] for key, allowed in _VAE_FIXED.items()}
    return fixed | {
        "_class_name": VAE_CLASSES[0],
        "block_out_channels": list(config.channels),
        **written(config, _VAE_KEYS),
        "down_block_types": ["DownEncoderBlock2D"] * len(config.channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(config.channels),
        "norm_num_groups": config.groups,
    }


def read_text_encoder(folder: Path) -> TextConfig:
    """Returns the configuration in a text encoder's folder. Raises UserError for another kind or shape."""
    return read_text(_opened(folder, "model_type", (TEXT_MODEL,), {}))


def write_text_encoder(config: TextConfig) -> Json:
    """Returns the `config.json` object that transformers' CLIPTextModel opens."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": TEXT_MODEL,
        **written(config, TEXT_KEYS),
        "projection_dim": config.width,
        "attention_dropout": 0.0,
    }


def unet_layout(file: Path, names: Names) -> tuple[UNetConfig, Table]:
    """Returns the configuration of a UNet's weight file and the table of its layout."""
    config, flax = read_unet(file.parent), file.suffix == ".msgpack"
    return config, (diffusers_tables.FLAX_UNET if flax else diffusers_tables.UNET)[config.linear_projection]


def vae_layout(file: Path, names: Names) -> tuple[VaeConfig, Table]:
    """Returns the configuration of an autoencoder's weight file and the table of its layout."""
    if file.suffix == ".msgpack":
        return read_vae(file.parent), diffusers_tables.FLAX_VAE
    old = any(".proj_attn." in name for name in names)
    return read_vae(file.parent), diffusers_tables.OLD_VAE if old else diffusers_tables.VAE


def text_layout(file: Path, names: Names) -> tuple[TextConfig, Table]:
    """Returns the configuration of a text encoder's weight file and the table of its layout."""
    if file.suffix == ".msgpack":
        return read_text_encoder(file.parent), diffusers_tables.FLAX_TEXT_ENCODER
    bare = any(name.startswith("encoder.layers.") for name in names)
    return read_text_encoder(file.parent), diffusers_tables.BARE_TEXT_ENCODER if bare else diffusers_tables.TEXT_ENCODER


def export_unet(config: UNetConfig, layout: str | None = None) -> Export:
    """Returns the files of a saved UNet."""
    table = diffusers_tables.UNET[config.linear_projection]
    return Export("diffusion_pytorch_model.safetensors", table, {"config.json": write_unet(config)})


def export_vae(config: VaeConfig, layout: str | None = None) -> Export:
    """Returns the files of a saved autoencoder."""
    return Export("diffusion_pytorch_model.safetensors", diffusers_tables.VAE, {"config.json": write_vae(config)})


def export_text(config: TextConfig, layout: str | None = None) -> Export:
    """Returns the files of a saved text encoder."""
    return Export("model.safetensors", diffusers_tables.TEXT_ENCODER, {"config.json": write_text_encoder(config)})
