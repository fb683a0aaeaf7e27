"""Names of CLIP's arrays in the three layouts that repositories hold."""

from fmda.weights.layers import Layer, flax_rows, torch_rows
from fmda.weights.table import Row, Table, drop, row
from fmda.weights.transforms import QKV_BIAS, QKV_WEIGHT

_PARTS = ("query", "key", "value")


def _hf_tower(source: str, target: str) -> tuple[Layer, ...]:
    """Returns the blocks of one tower under Hugging Face's names; `target` goes before ours."""
    theirs, ours = f"{source}.encoder.layers.{{i}}", f"{target}blocks/{{i}}"
    return (
        (f"{theirs}.layer_norm1", f"{ours}/norm1", "norm"),
        *((f"{theirs}.self_attn.{part[0]}_proj", f"{ours}/attention/{part}", "linear") for part in _PARTS),
        (f"{theirs}.self_attn.out_proj", f"{ours}/attention/out", "linear"),
        (f"{theirs}.layer_norm2", f"{ours}/norm2", "norm"),
        (f"{theirs}.mlp.fc1", f"{ours}/mlp/up", "linear"),
        (f"{theirs}.mlp.fc2", f"{ours}/mlp/down", "linear"),
    )


def hf_text_layers(target: str) -> tuple[Layer, ...]:
    """Returns the text tower without its projection; `target` goes before our names ("" or "text/")."""
    return (
        ("text_model.embeddings.token_embedding", f"{target}token_embedding/embedding", "embedding"),
        ("text_model.embeddings.position_embedding", f"{target}position", "embedding"),
        *_hf_tower("text_model", target),
        ("text_model.final_layer_norm", f"{target}norm_final", "norm"),
    )


_HF: tuple[Layer, ...] = (
    ("logit_scale", "logit_scale", "array"),
    ("vision_model.embeddings.class_embedding", "vision/class_token", "array"),
    ("vision_model.embeddings.patch_embedding", "vision/patch", "conv"),
    ("vision_model.embeddings.position_embedding", "vision/position", "embedding"),
    ("vision_model.pre_layrnorm", "vision/norm_pre", "norm"),  # their spelling
    *_hf_tower("vision_model", "vision/"),
    ("vision_model.post_layernorm", "vision/norm_post", "norm"),
    ("visual_projection", "vision/projection", "linear"),
    *hf_text_layers("text/"),
    ("text_projection", "text/projection", "linear"),
)

HF_CLIP = Table(
    (
        *torch_rows(_HF),
        # constant counters that releases before 4.31 stored
        drop("vision_model.embeddings.position_ids"),
        drop("text_model.embeddings.position_ids"),
    ),
    layout="Hugging Face CLIP",
)
"""transformers.CLIPModel, torch names."""

HF_FLAX_CLIP = Table(flax_rows(_HF), "Hugging Face CLIP, Flax")
"""transformers.FlaxCLIPModel, names joined by dots."""


def _open_clip_blocks(source: str, target: str) -> tuple[Row, ...]:
    """Returns the rows of one OpenCLIP transformer, whose query, key and value are packed in one array."""
    theirs, ours = f"{source}.resblocks.{{i}}", f"{target}/blocks/{{i}}"
    parts = [f"{ours}/attention/{part}" for part in _PARTS]
    return (
        row(f"{theirs}.attn.in_proj_weight", tuple(f"{part}/kernel" for part in parts), QKV_WEIGHT),
        row(f"{theirs}.attn.in_proj_bias", tuple(f"{part}/bias" for part in parts), QKV_BIAS),
        *torch_rows(
            (
                (f"{theirs}.ln_1", f"{ours}/norm1", "norm"),
                (f"{theirs}.attn.out_proj", f"{ours}/attention/out", "linear"),
                (f"{theirs}.ln_2", f"{ours}/norm2", "norm"),
                (f"{theirs}.mlp.c_fc", f"{ours}/mlp/up", "linear"),
                (f"{theirs}.mlp.c_proj", f"{ours}/mlp/down", "linear"),
            )
        ),
    )


_OPEN_CLIP_TEXT: tuple[Row, ...] = (
    row("logit_scale", "logit_scale"),
    row("positional_embedding", "text/position"),
    row("text_projection", "text/projection/kernel"),  # stored [width, embed] already
    row("token_embedding.weight", "text/token_embedding/embedding"),
    *torch_rows([("ln_final", "text/norm_final", "norm")]),
    *_open_clip_blocks("transformer", "text"),
    # constants that OpenAI's own archives carry beside the weights
    *map(drop, ("attn_mask", "input_resolution", "context_length", "vocab_size")),
)

OPEN_CLIP_VIT = Table(
    (
        *_OPEN_CLIP_TEXT,
        row("visual.class_embedding", "vision/class_token"),
        row("visual.positional_embedding", "vision/position"),
        row("visual.proj", "vision/projection/kernel"),
        *torch_rows(
            (
                ("visual.conv1", "vision/patch", "conv"),
                ("visual.ln_pre", "vision/norm_pre", "norm"),
                ("visual.ln_post", "vision/norm_post", "norm"),
            )
        ),
        *_open_clip_blocks("visual.transformer", "vision"),
    ),
    layout="OpenCLIP, vision transformer",
)
"""OpenCLIP and OpenAI, vision transformer."""


def _resnet_layers() -> tuple[Layer, ...]:
    """Returns the layers of the ModifiedResNet tower; stored stages count from 1."""
    layers: list[Layer] = []
    places = [("visual", "vision"), *((f"visual.layer{n + 1}.{{i}}", f"vision/blocks/{n}/{{i}}") for n in range(4))]
    for theirs, ours in places:
        for n in (1, 2, 3):
            layers += [
                (f"{theirs}.conv{n}", f"{ours}/conv{n}", "conv"),
                (f"{theirs}.bn{n}", f"{ours}/norm{n}", "batch_norm"),
            ]
    for theirs, ours in places[1:]:
        layers += [
            (f"{theirs}.downsample.0", f"{ours}/shortcut", "conv"),
            (f"{theirs}.downsample.1", f"{ours}/shortcut_norm", "batch_norm"),
        ]
    parts = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("c_proj", "out"))
    return (
        *layers,
        ("visual.attnpool.positional_embedding", "vision/pool/position", "array"),
        *((f"visual.attnpool.{theirs}", f"vision/pool/{ours}", "linear") for theirs, ours in parts),
    )


OPEN_CLIP_RESNET = Table((*_OPEN_CLIP_TEXT, *torch_rows(_resnet_layers())), "OpenCLIP, ModifiedResNet")
"""OpenCLIP and OpenAI, ModifiedResNet."""

_TRUNK = "visual.trunk.stages.{i}"
_BLOCK = _TRUNK + ".blocks.{j}"
_OUR_BLOCK = "vision/blocks/{i}/blocks/{j}"

OPEN_CLIP_CONVNEXT = Table(
    (
        *_OPEN_CLIP_TEXT,
        row(f"{_BLOCK}.gamma", f"{_OUR_BLOCK}/scale/gamma"),
        *torch_rows(
            (
                ("visual.trunk.stem.0", "vision/stem", "conv"),
                ("visual.trunk.stem.1", "vision/stem_norm", "norm"),
                (f"{_TRUNK}.downsample.0", "vision/blocks/{i}/norm", "norm"),
                (f"{_TRUNK}.downsample.1", "vision/blocks/{i}/downsample", "conv"),
                (f"{_BLOCK}.conv_dw", f"{_OUR_BLOCK}/depthwise", "conv"),
                (f"{_BLOCK}.norm", f"{_OUR_BLOCK}/norm", "norm"),
                (f"{_BLOCK}.mlp.fc1", f"{_OUR_BLOCK}/up", "linear"),
                (f"{_BLOCK}.mlp.fc2", f"{_OUR_BLOCK}/down", "linear"),
                ("visual.trunk.head.norm", "vision/norm_post", "norm"),
                ("visual.head.mlp.fc1", "vision/up", "linear"),
                ("visual.head.mlp.fc2", "vision/projection", "linear"),
            )
        ),
    ),
    layout="OpenCLIP, ConvNeXt",
)
"""OpenCLIP over a timm ConvNeXt with a projection MLP (`convnext_large_d_320`)."""
