"""The families of checkpoints that can be read and written: one row each.

A new network needs its module in `models/`, a file here with its table and its configuration's reader and writer, and
a row. Loading, saving, verification, conversion and fingerprints follow from the row; see `network`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from fmda.errors import UserError
from fmda.models.clip import Clip, TextConfig, TextTransformer, VisionTransformer
from fmda.models.daformer import DaFormer
from fmda.models.deeplab_v2 import DeepLabV2
from fmda.models.dino import dino, last_layer
from fmda.models.dinoiser import HEADS_FILE, heads_module
from fmda.models.dinov2 import Dinov2
from fmda.models.dinov2_segmenter import Dinov2Segmenter
from fmda.models.efficientnet_lite import EfficientNetLite
from fmda.models.espnet_v2 import FACTOR, EspNetV2
from fmda.models.hrda import SIDES, Hrda
from fmda.models.lite_segmenter import LiteSegmenter
from fmda.models.mask2former import Mask2Former
from fmda.models.mit import Mit
from fmda.models.resnet import ResNetEncoder
from fmda.models.sam.network import Sam, check_pixels, check_prompts
from fmda.models.sd_unet import UNet
from fmda.models.sd_vae import Vae
from fmda.models.segformer import SegFormer
from fmda.trees import Tree
from fmda.weights import (
    clip,
    daformer,
    deeplab_v2,
    diffusers,
    dinoiser,
    dinov2,
    dinov2_segmenter,
    efficientnet_lite,
    espnet_v2,
    lite_segmenter,
    mask2former,
    mit,
    resnet,
    sam,
    segformer,
)
from fmda.weights import dino as dino_weights
from fmda.weights.source import DIFFUSION_FILES, TEXT_FILES, WEIGHT_FILES
from fmda.weights.table import Export, Names, Table

Outputs = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Family:
    """One family of checkpoints.

    Attributes:
        kinds: values of `_class_name`, the first of `architectures`, or `model_type` in its config.json, in this order.
        files: names of its weight files, best first.
        read: (weight file, {stored name: shape}) -> (configuration, table of the layout).
        export: (configuration, layout or None) -> what is written.
        build: (configuration, dtype=, rngs=, options) -> module.
        calls: public methods of `Loaded`: name -> function of the module and its inputs.
        check: (configuration, *inputs of a call) raises UserError for values that do not fit.
        saved: the configuration that a network has once it was saved and is loaded again.
        bare: a stored name that identifies weights without a config.json.
        tokenizer: whether a tokenizer may lie beside the weights.
        replay: (network, recorded inputs) -> outputs to compare with a record.
        segments: whether it maps pixels to class logits, for `load_segmentation`.
        masks: whether it predicts classes and masks of queries, which its `scores` joins to class scores.
        multiple: what the sides of an image must be multiples of, where it segments.
        without_unused: (configuration, parameters) without the logits that stand for no class, where it segments.
        relative: whether a record is compared relative to its largest value.
    """

    kinds: tuple[str, ...]
    files: tuple[str, ...]
    read: Callable[[Path, Names], tuple[Any, Table]]
    export: Callable[[Any, str | None], Export]
    build: Callable[..., nnx.Module]
    calls: Mapping[str, Callable[..., Any]]
    check: Mapping[str, Callable[..., None]] = field(default_factory=dict)
    saved: Callable[[Any], Any] = lambda config: config
    bare: str | None = None
    tokenizer: bool = False
    replay: Callable[[Any, Mapping[str, np.ndarray]], Outputs] | None = None
    segments: bool = False
    masks: bool = False
    multiple: int = 1
    without_unused: Callable[[Any, Tree], tuple[Any, Tree]] = lambda config, params: (config, params)
    relative: bool = True


def _text_tower(config: TextConfig, **options: Any) -> TextTransformer:
    return TextTransformer(config, None, **options)


def _hidden(model: TextTransformer, ids: Array) -> Array:
    return model.hidden(ids).astype(np.float32)


def _last_layer(model: VisionTransformer, pixels: Array, part: Any = "value") -> Array:
    return last_layer(model, pixels, part, position_offset=model.config.position_offset).astype(np.float32)


def _check_ids(config: TextConfig, ids: Array | np.ndarray) -> None:
    """Raises UserError for ids that are not [B, T], T above 0, or, where values are known, of another vocabulary."""
    if np.ndim(ids) != 2 or not np.shape(ids)[1]:
        raise UserError(f"ids: of shape {list(np.shape(ids))} where the text encoder reads [B, T]; take `tokenize`")
    if isinstance(ids, jax.core.Tracer) or not np.size(ids):
        return
    least, most = int(np.min(ids)), int(np.max(ids))
    if least < 0 or most >= config.vocab_size:
        raise UserError(
            f"ids: from {least} to {most} where the vocabulary has {config.vocab_size}; take its own tokenizer"
        )


def _replay_clip(network: Any, recorded: Mapping[str, np.ndarray]) -> Outputs:
    image = np.asarray(network.encode_image(recorded["pixel_values"].transpose(0, 2, 3, 1)))
    text = np.asarray(network.encode_text(recorded["input_ids"]))
    return {
        "image_embeds": image / np.linalg.norm(image, axis=-1, keepdims=True),
        "text_embeds": text / np.linalg.norm(text, axis=-1, keepdims=True),
    }


def _replay_unet(network: Any, recorded: Mapping[str, np.ndarray]) -> Outputs:
    latents = recorded["sample"].transpose(0, 2, 3, 1)
    out = network(latents, recorded["timesteps"], recorded["encoder_hidden_states"])
    return {"out": np.asarray(out).transpose(0, 3, 1, 2)}


def _replay_vae(network: Any, recorded: Mapping[str, np.ndarray]) -> Outputs:
    mean, logvar = map(np.asarray, network.encode(recorded["image"].transpose(0, 2, 3, 1)))
    decoded = np.asarray(network.decode(recorded["latents"].transpose(0, 2, 3, 1)))
    return {"mean": mean, "logvar": logvar, "decoded": decoded.transpose(0, 3, 1, 2)}


def _replay_text(network: Any, recorded: Mapping[str, np.ndarray]) -> Outputs:
    return {"last_hidden_state": np.asarray(network(recorded["input_ids"]))}


FAMILIES: dict[str, Family] = {
    "clip": Family(
        kinds=("clip",),
        files=WEIGHT_FILES,
        read=clip.read,
        export=clip.export,
        build=Clip,
        calls={"encode_image": Clip.encode_image, "encode_text": Clip.encode_text},
        check={"encode_text": lambda config, ids: _check_ids(config.text, ids)},
        tokenizer=True,
        replay=_replay_clip,
        relative=False,
    ),
    "dino": Family(
        kinds=("vit",),
        files=WEIGHT_FILES,
        read=dino_weights.read,
        export=dino_weights.export,
        build=dino,
        calls={"last_layer": _last_layer},
        bare="cls_token",
    ),
    "dinov2": Family(
        kinds=(dinov2.PLAIN, dinov2.REGISTERS),
        files=WEIGHT_FILES,
        read=dinov2.read,
        export=dinov2.export,
        build=Dinov2,
        calls={"stages": Dinov2.stages},
    ),
    "dinov2_segmenter": Family(
        kinds=(dinov2_segmenter.KIND,),
        files=WEIGHT_FILES,
        read=dinov2_segmenter.read,
        export=dinov2_segmenter.export,
        build=Dinov2Segmenter,
        calls={"__call__": Dinov2Segmenter.__call__},
        segments=True,
    ),
    "unet": Family(
        kinds=diffusers.UNET_CLASSES,
        files=DIFFUSION_FILES,
        read=diffusers.read_unet,
        export=diffusers.export_unet,
        build=UNet,
        calls={"__call__": UNet.__call__},
        saved=diffusers.saved_unet,
        replay=_replay_unet,
    ),
    "vae": Family(
        kinds=diffusers.VAE_CLASSES,
        files=DIFFUSION_FILES,
        read=diffusers.read_vae,
        export=diffusers.export_vae,
        build=Vae,
        calls={"encode": Vae.encode, "decode": Vae.decode},
        replay=_replay_vae,
    ),
    "text_encoder": Family(
        kinds=(diffusers.TEXT_MODEL,),
        files=TEXT_FILES,
        read=diffusers.read_text_encoder,
        export=diffusers.export_text_encoder,
        build=_text_tower,
        calls={"__call__": _hidden},
        check={"__call__": _check_ids},
        replay=_replay_text,
    ),
    "dinoiser": Family(
        kinds=(),
        files=(HEADS_FILE,),
        read=dinoiser.read,
        export=dinoiser.export,
        build=heads_module,
        calls={},
    ),
    "espnet_v2": Family(
        kinds=(espnet_v2.KIND,),
        files=WEIGHT_FILES,
        read=espnet_v2.read,
        export=espnet_v2.export,
        build=EspNetV2,
        calls={"__call__": EspNetV2.__call__},
        segments=True,
        multiple=FACTOR,
        without_unused=espnet_v2.without_unused,
    ),
    "mit": Family(
        kinds=("SegformerForImageClassification", "SegformerModel"),
        files=WEIGHT_FILES,
        read=mit.read,
        export=mit.export,
        build=Mit,
        calls={"stages": Mit.stages},
    ),
    "segformer": Family(
        kinds=(segformer.KIND,),
        files=WEIGHT_FILES,
        read=segformer.read,
        export=segformer.export,
        build=SegFormer,
        calls={"__call__": SegFormer.__call__},
        segments=True,
    ),
    "daformer": Family(
        kinds=(daformer.KIND,),
        files=WEIGHT_FILES,
        read=daformer.read,
        export=daformer.export,
        build=DaFormer,
        calls={"__call__": DaFormer.__call__},
        segments=True,
    ),
    "hrda": Family(
        kinds=(daformer.HRDA_KIND,),
        files=WEIGHT_FILES,
        read=daformer.read_hrda,
        export=daformer.export_hrda,
        build=Hrda,
        calls={"__call__": Hrda.__call__},
        segments=True,
        multiple=SIDES,
    ),
    "deeplab_v2": Family(
        kinds=(deeplab_v2.KIND,),
        files=WEIGHT_FILES,
        read=deeplab_v2.read,
        export=deeplab_v2.export,
        build=DeepLabV2,
        calls={"__call__": DeepLabV2.__call__},
        bare=deeplab_v2.BARE,
        segments=True,
    ),
    "mask2former": Family(
        kinds=(mask2former.KIND, mask2former.CLOUDS_KIND),
        files=WEIGHT_FILES,
        read=mask2former.read,
        export=mask2former.export,
        build=Mask2Former,
        calls={"__call__": Mask2Former.__call__},
        bare=mask2former.BARE,
        masks=True,
        multiple=32,
    ),
    "resnet": Family(
        kinds=(resnet.KIND,),
        files=WEIGHT_FILES,
        read=resnet.read,
        export=resnet.export,
        build=ResNetEncoder,
        calls={"__call__": ResNetEncoder.__call__, "stages": ResNetEncoder.stages},
        bare=resnet.BARE,
    ),
    "sam": Family(
        kinds=(sam.KIND, sam.MOBILE),
        files=WEIGHT_FILES,
        read=sam.read,
        export=sam.export,
        build=Sam,
        calls={"encode": Sam.encode, "decode": Sam.decode},
        check={"encode": check_pixels, "decode": check_prompts},
        bare=sam.BARE,
    ),
    "efficientnet_lite": Family(
        kinds=(),
        files=WEIGHT_FILES,
        read=efficientnet_lite.read,
        export=efficientnet_lite.export,
        build=EfficientNetLite,
        calls={"__call__": EfficientNetLite.__call__, "stages": EfficientNetLite.stages},
        bare=efficientnet_lite.BARE,
    ),
    "lite_segmenter": Family(
        kinds=(lite_segmenter.KIND,),
        files=WEIGHT_FILES,
        read=lite_segmenter.read,
        export=lite_segmenter.export,
        build=LiteSegmenter,
        calls={"__call__": LiteSegmenter.__call__},
        segments=True,
    ),
}
