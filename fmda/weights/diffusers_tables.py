"""Names of Stable Diffusion's arrays as diffusers stores them, in PyTorch's and in Flax's releases."""

import re
from collections.abc import Iterable

from fmda.weights.clip_tables import hf_text_layers
from fmda.weights.layers import Layer, flax_rows, torch_rows
from fmda.weights.table import Table, drop

_ATTENTION = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "out"))


def _res_block(source: str, target: str) -> tuple[Layer, ...]:
    return (
        (f"{source}.norm1", f"{target}/norm1", "norm"),
        (f"{source}.conv1", f"{target}/conv1", "conv"),
        (f"{source}.time_emb_proj", f"{target}/time", "linear"),
        (f"{source}.norm2", f"{target}/norm2", "norm"),
        (f"{source}.conv2", f"{target}/conv2", "conv"),
        (f"{source}.conv_shortcut", f"{target}/shortcut", "conv"),
    )


def _transformer(source: str, target: str, projection: str) -> tuple[Layer, ...]:
    inner = f"{source}.transformer_blocks.0"
    layers: list[Layer] = [
        (f"{source}.norm", f"{target}/norm", "norm"),
        (f"{source}.proj_in", f"{target}/proj_in", projection),
        (f"{source}.proj_out", f"{target}/proj_out", projection),
        *((f"{inner}.norm{n}", f"{target}/norm{n}", "norm") for n in (1, 2, 3)),
        (f"{inner}.ff.net.0.proj", f"{target}/up", "linear"),
        (f"{inner}.ff.net.2", f"{target}/down", "linear"),
    ]
    for theirs, ours in (("attn1", "self_attention"), ("attn2", "cross_attention")):
        layers += [(f"{inner}.{theirs}.{name}", f"{target}/{ours}/{part}", "linear") for name, part in _ATTENTION]
    return tuple(layers)


def _unet(projection: str) -> tuple[Layer, ...]:
    return (
        ("conv_in", "conv_in", "conv"),
        ("time_embedding.linear_1", "time1", "linear"),
        ("time_embedding.linear_2", "time2", "linear"),
        *_res_block("down_blocks.{i}.resnets.{j}", "down/{i}/blocks/{j}"),
        *_transformer("down_blocks.{i}.attentions.{j}", "down/{i}/attentions/{j}", projection),
        ("down_blocks.{i}.downsamplers.0.conv", "down/{i}/resample/conv", "conv"),
        *_res_block("mid_block.resnets.0", "mid1"),
        *_transformer("mid_block.attentions.0", "mid_attention", projection),
        *_res_block("mid_block.resnets.1", "mid2"),
        *_res_block("up_blocks.{i}.resnets.{j}", "up/{i}/blocks/{j}"),
        *_transformer("up_blocks.{i}.attentions.{j}", "up/{i}/attentions/{j}", projection),
        ("up_blocks.{i}.upsamplers.0.conv", "up/{i}/resample/conv", "conv"),
        ("conv_norm_out", "norm_out", "norm"),
        ("conv_out", "conv_out", "conv"),
    )


_OLD_ATTENTION = (("query", "query"), ("key", "key"), ("value", "value"), ("proj_attn", "out"))


def _vae(attention: tuple[tuple[str, str], ...]) -> tuple[Layer, ...]:
    layers: list[Layer] = [("quant_conv", "quant", "conv"), ("post_quant_conv", "post_quant", "conv")]
    for half, way, resample in (("encoder", "down", "downsamplers"), ("decoder", "up", "upsamplers")):
        level = f"{half}.{way}_blocks.{{i}}"
        middle, ours = f"{half}.mid_block", f"{half}/mid"
        layers += [
            (f"{half}.conv_in", f"{half}/conv_in", "conv"),
            *_res_block(f"{level}.resnets.{{j}}", f"{half}/levels/{{i}}/blocks/{{j}}"),
            (f"{level}.{resample}.0.conv", f"{half}/levels/{{i}}/resample/conv", "conv"),
            *_res_block(f"{middle}.resnets.0", f"{ours}/block1"),
            (f"{middle}.attentions.0.group_norm", f"{ours}/attention/norm", "norm"),
            *((f"{middle}.attentions.0.{name}", f"{ours}/attention/{part}", "linear") for name, part in attention),
            *_res_block(f"{middle}.resnets.1", f"{ours}/block2"),
            (f"{half}.conv_norm_out", f"{half}/norm_out", "norm"),
            (f"{half}.conv_out", f"{half}/conv_out", "conv"),
        ]
    return tuple(layers)


def _joined(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """Returns the layers under Flax's names, in which numbers hang on by an underscore: `down_blocks_0.resnets_1`."""
    return tuple((re.sub(r"\.(\{\w\}|\d+)", r"_\1", source), target, kind) for source, target, kind in layers)


_PROJECTIONS = {False: "point_conv", True: "linear"}

UNET = {linear: Table(torch_rows(_unet(kind)), "diffusers UNet") for linear, kind in _PROJECTIONS.items()}
"""diffusers' UNet2DConditionModel, by `UNetConfig.linear_projection`."""

FLAX_UNET = {
    linear: Table(flax_rows(_joined(_unet(kind))), "diffusers UNet, Flax") for linear, kind in _PROJECTIONS.items()
}
"""diffusers' FlaxUNet2DConditionModel, by `UNetConfig.linear_projection`."""

VAE = Table(torch_rows(_vae(_ATTENTION)), "diffusers autoencoder")
"""diffusers' AutoencoderKL."""

OLD_VAE = Table(torch_rows(_vae(_OLD_ATTENTION)), "diffusers autoencoder, names before 0.18")
"""The same before release 0.18, as stable-diffusion-v1-4 holds it."""

FLAX_VAE = Table(flax_rows(_joined(_vae(_OLD_ATTENTION))), "diffusers autoencoder, Flax")
"""diffusers' FlaxAutoencoderKL."""

TEXT_ENCODER = Table(
    (*torch_rows(hf_text_layers("")), drop("text_model.embeddings.position_ids")),
    layout="Hugging Face text encoder",
)
"""transformers' CLIPTextModel before release 5, which later ones open too."""

BARE_TEXT_ENCODER = Table(
    (
        *torch_rows((source.removeprefix("text_model."), target, kind) for source, target, kind in hf_text_layers("")),
        drop("embeddings.position_ids"),
    ),
    layout="Hugging Face text encoder, bare names",
)
"""The same since release 5, whose names do not begin with "text_model."."""

FLAX_TEXT_ENCODER = Table(flax_rows(hf_text_layers("")), "Hugging Face text encoder, Flax")
"""transformers' FlaxCLIPTextModel."""
