"""Configurations of Stable Diffusion's networks out of and into the JSON files of diffusers' layout."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from fmda.errors import UserError, did_you_mean
from fmda.models.clip import TextConfig
from fmda.models.sd_unet import UNetConfig
from fmda.models.sd_vae import VaeConfig
from fmda.weights.clip_configs import HF_TEXT, activation
from fmda.weights.files import read_json

Json = dict[str, Any]

_UNET_CLASSES = ("UNet2DConditionModel", "FlaxUNet2DConditionModel")
_VAE_CLASSES = ("AutoencoderKL", "FlaxAutoencoderKL")
TEXT_MODEL = "clip_text_model"
"""`model_type` of a text encoder's configuration."""

# What a file may say without changing the network that is built here; None of it may say anything else.
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
_TEXT_SIZES = (
    "vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "intermediate_size",
)  # fmt: skip
_TAKE = "give a Stable Diffusion 1.x or 2.x checkpoint"
_CROSS_DOWN, _DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
_UPWARDS = {_CROSS_DOWN: "CrossAttnUpBlock2D", _DOWN: "UpBlock2D"}


def part_of_class(name: Any, path: Path) -> str:
    """Returns "unet" or "vae" for a `_class_name`. Raises UserError for any other class."""
    for part, classes in (("unet", _UNET_CLASSES), ("vae", _VAE_CLASSES)):
        if name in classes:
            return part
    raise UserError(
        f"{path}: _class_name '{name}' cannot be built{did_you_mean(str(name), (_UNET_CLASSES[0], _VAE_CLASSES[0]))}"
    )


def _opened(folder: Path, classes: tuple[str, ...], fixed: Json) -> tuple[Json, Path]:
    """Returns the object in `config.json` after checking that it describes what can be built here."""
    path = folder / "config.json"
    config = read_json(path)
    kind = config.get("_class_name")
    if kind not in classes:
        raise UserError(f"{path}: _class_name is '{kind}', not '{classes[0]}'; give the folder of that network")
    for key, allowed in fixed.items():
        if key in config and config[key] not in allowed:
            raise UserError(
                f"{path}: {key} is {config[key]!r}, and only {' or '.join(map(repr, allowed))} can be built; {_TAKE}"
            )
    return config, path


def _sizes(config: Json, path: Path, **defaults: int) -> dict[str, int]:
    """Returns the sizes under these keys, each with its default. Raises UserError for what is no size."""
    found = {key: default if config.get(key) is None else config[key] for key, default in defaults.items()}
    return _checked(found, path)


def _checked(sizes: Json, path: Path) -> dict[str, int]:
    """Returns the sizes as they are. Raises UserError for what is no size."""
    for key, value in sizes.items():
        if not _is_size(value):
            raise UserError(f"{path}: {key} is {value!r}, not one whole number above 0; {_TAKE}")
    return sizes


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _number(config: Json, path: Path, key: str, default: float) -> float:
    """Returns the number under a key. Raises UserError where it is none, or not finite, or not above 0."""
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"{path}: {key} is {value!r}, not one finite number above 0; {_TAKE}")
    return value


def _widths(config: Json, path: Path, default: tuple[int, ...], groups: int) -> tuple[int, ...]:
    """Returns the width of each level.

    Raises UserError for what is no list of sizes, and for widths that the groups of a GroupNorm do not divide.
    """
    widths = config.get("block_out_channels", list(default))
    if not isinstance(widths, list) or not widths or not all(map(_is_size, widths)):
        raise UserError(f"{path}: block_out_channels is {widths!r}, not a list of whole numbers above 0; {_TAKE}")
    if any(width % groups for width in widths):
        raise UserError(f"{path}: block_out_channels {widths} are no multiples of norm_num_groups, {groups}; {_TAKE}")
    return tuple(widths)


def read_unet(folder: Path) -> UNetConfig:
    """Returns the configuration in a UNet's folder. Raises UserError for a network of another kind or shape."""
    config, path = _opened(folder, _UNET_CLASSES, _UNET_FIXED)
    if config.get("in_channels") == 9:
        raise UserError(
            f"{path}: in_channels is 9, this is an inpainting UNet, which also reads a mask and a masked image; "
            "give a text-to-image checkpoint (4 channels)"
        )
    sizes = _sizes(
        config, path, in_channels=4, out_channels=4, layers_per_block=2, cross_attention_dim=1280, norm_num_groups=32,
        sample_size=64,
    )  # fmt: skip
    channels = _widths(config, path, (320, 640, 1280, 1280), sizes["norm_num_groups"])
    down = config.get("down_block_types", [_CROSS_DOWN] * 3 + [_DOWN])
    up = config.get("up_block_types", [_UPWARDS[_DOWN]] + [_UPWARDS[_CROSS_DOWN]] * 3)
    if (
        not isinstance(down, list)
        or len(down) != len(channels)
        or any(name not in (_CROSS_DOWN, _DOWN) for name in down)
        or up != [_UPWARDS[name] for name in reversed(down)]
    ):
        raise UserError(
            f"{path}: down_block_types {down!r} and up_block_types {up!r} with {len(channels)} widths "
            f"cannot be built; {_TAKE}"
        )
    attention = tuple(name == _CROSS_DOWN for name in down)
    key = "attention_head_dim" if config.get("num_attention_heads") is None else "num_attention_heads"
    named = config.get(key, 8)
    heads = tuple(named) if isinstance(named, list) else (named,) * len(channels)
    # the middle attends too, with the heads of the last level
    attending = zip(channels, heads, (*attention[:-1], True), strict=False)
    if (
        len(heads) != len(channels)
        or not all(map(_is_size, heads))
        or any(attends and width % count for width, count, attends in attending)
    ):
        raise UserError(f"{path}: {key} {named!r} does not fit block_out_channels {list(channels)}; {_TAKE}")
    linear = config.get("use_linear_projection", False)
    if not isinstance(linear, bool):
        raise UserError(f"{path}: use_linear_projection is {linear!r}, neither true nor false; {_TAKE}")
    flax = config["_class_name"].startswith("Flax")
    return UNetConfig(
        in_channels=sizes["in_channels"],
        out_channels=sizes["out_channels"],
        channels=channels,
        layers=sizes["layers_per_block"],
        attention=attention,
        heads=heads,
        context_width=sizes["cross_attention_dim"],
        linear_projection=linear,
        groups=sizes["norm_num_groups"],
        # the first releases of 1.x name 32, and diffusers' pipeline does not believe them either
        sample_size=max(64, sizes["sample_size"]) if _before_0_9(config) else sizes["sample_size"],
        # each library's own arithmetic, so that a checkpoint gives here what it gave there
        gate="gelu_tanh" if flax else "gelu",
        transformer_eps=1e-5 if flax else 1e-6,
    )


def _before_0_9(config: Json) -> bool:
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
        "_class_name": _UNET_CLASSES[0],
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.layers,
        "down_block_types": down,
        "up_block_types": [_UPWARDS[name] for name in reversed(down)],
        "attention_head_dim": config.heads[0] if len(set(config.heads)) == 1 else list(config.heads),
        "cross_attention_dim": config.context_width,
        "use_linear_projection": config.linear_projection,
        "norm_num_groups": config.groups,
        "sample_size": config.sample_size,
    }


def read_vae(folder: Path) -> VaeConfig:
    """Returns the configuration in an autoencoder's folder. Raises UserError for another kind or shape."""
    config, path = _opened(folder, _VAE_CLASSES, _VAE_FIXED)
    sizes = _sizes(config, path, layers_per_block=1, latent_channels=4, norm_num_groups=32, sample_size=32)
    channels = _widths(config, path, (64,), sizes["norm_num_groups"])
    down, up = ["DownEncoderBlock2D"] * len(channels), ["UpDecoderBlock2D"] * len(channels)
    if config.get("down_block_types", down) != down or config.get("up_block_types", up) != up:
        raise UserError(f"{path}: its down_block_types or up_block_types cannot be built; {_TAKE}")
    return VaeConfig(
        channels=channels,
        layers=sizes["layers_per_block"],
        latent_channels=sizes["latent_channels"],
        scale=_number(config, path, "scaling_factor", 0.18215),
        groups=sizes["norm_num_groups"],
        sample_size=sizes["sample_size"],
    )


def write_vae(config: VaeConfig) -> Json:
    """Returns the `config.json` object that diffusers' AutoencoderKL opens."""
    fixed = {key: allowed[0] for key, allowed in _VAE_FIXED.items()}
    return fixed | {
        "_class_name": _VAE_CLASSES[0],
        "block_out_channels": list(config.channels),
        "layers_per_block": config.layers,
        "down_block_types": ["DownEncoderBlock2D"] * len(config.channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(config.channels),
        "latent_channels": config.latent_channels,
        "scaling_factor": config.scale,
        "norm_num_groups": config.groups,
        "sample_size": config.sample_size,
    }


def read_text_encoder(folder: Path) -> TextConfig:
    """Returns the configuration in a text encoder's folder. Raises UserError for another kind or shape."""
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type") != TEXT_MODEL:
        raise UserError(
            f"{path}: model_type is '{config.get('model_type')}', not '{TEXT_MODEL}'; "
            "give the text_encoder folder of a Stable Diffusion checkpoint"
        )
    text: Json = {**HF_TEXT, **config}
    sizes = _checked({key: text[key] for key in _TEXT_SIZES}, path)
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if width % heads:
        raise UserError(f"{path}: num_attention_heads {heads} does not divide hidden_size, {width}; {_TAKE}")
    if not isinstance(text["hidden_act"], str):
        raise UserError(f"{path}: hidden_act is {text['hidden_act']!r}, not the name of an activation; {_TAKE}")
    return TextConfig(
        vocab_size=sizes["vocab_size"],
        context=sizes["max_position_embeddings"],
        width=width,
        layers=sizes["num_hidden_layers"],
        heads=heads,
        mlp_width=sizes["intermediate_size"],
        activation=activation(text["hidden_act"], path),
        norm_eps=_number(text, path, "layer_norm_eps", 1e-5),
        eos_token_id=text["eos_token_id"],
        bos_token_id=text["bos_token_id"],
    )


def write_text_encoder(config: TextConfig) -> Json:
    """Returns the `config.json` object that transformers' CLIPTextModel opens."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": TEXT_MODEL,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": config.activation,
        "layer_norm_eps": config.norm_eps,
        "eos_token_id": config.eos_token_id,
        "bos_token_id": config.bos_token_id,
        "projection_dim": config.width,
        "attention_dropout": 0.0,
    }
