"""Networks of checkpoints by family: a folder, a model of the package, or a hub id, to a network ready for use."""

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from fmda.errors import UserError
from fmda.models.dinoiser import HEADS_FILE, Heads
from fmda.models.sd_unet import Remat
from fmda.weights.checkpoint import family_of, open_checkpoint
from fmda.weights.efficientnet_lite import packaged_weights
from fmda.weights.network import Loaded, restore
from fmda.weights.registry import FAMILIES
from fmda.weights.source import PARTS, resolve


def part_folder(source: str | os.PathLike[str], part: str, revision: str | None = None) -> Path:
    """Returns the folder of one network of a Stable Diffusion: the source itself, or its subfolder of that name.

    Raises UserError where neither holds a configuration.
    """
    folder = resolve(source, revision, "diffusers")
    if (folder / part).is_dir():
        return folder / part
    if (folder / "model_index.json").is_file():
        raise UserError(f"{folder}: has no folder '{part}'; copy or download the whole checkpoint again")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds neither {part}/ nor config.json; give a folder in diffusers' layout")
    return folder


def _load(
    family: str, source: str | os.PathLike[str], revision: str | None, dtype: DTypeLike, **options: Any
) -> Loaded:
    folder = part_folder(source, family, revision) if family in PARTS else resolve(source, revision)
    return restore(open_checkpoint(family, folder), dtype, **options)


def load_clip(source: str | os.PathLike[str], revision: str | None = None, dtype: DTypeLike = jnp.float32) -> Loaded:
    """Returns the CLIP of a folder, of a model that comes with the package, or of a hub id.

    Its methods: `encode_image(pixels)`, normalised RGB [B, H, W, 3] -> [B, D]; `encode_text(ids)`, [B, T] -> [B, D],
    both projected and not L2-normalised, float32; `tokenize(texts)`. Layouts: Hugging Face (`config.json` with
    model.safetensors, its sharded form, or flax_model.msgpack) and OpenCLIP (`open_clip_config.json` with
    open_clip_model.safetensors). Parameters are kept, and the towers compute, in `dtype`. Raises UserError for anything
    missing, surplus, misshapen or damaged; a folder without tokenizer files loads, and only `tokenize` raises.
    """
    return _load("clip", source, revision, dtype)


def load_dino(source: str | os.PathLike[str], revision: str | None = None, dtype: DTypeLike = jnp.float32) -> Loaded:
    """Returns the DINO of a folder, of a model that comes with the package, or of a hub id.

    Its method `last_layer(pixels, part=)` returns queries, keys or values of the last block per patch, [B, h, w, width]
    float32, of ImageNet-normalised pixels. Read are Hugging Face's ViT (`facebook/dino-vitb16`) and the names of
    facebookresearch/dino and timm. Raises UserError as `load_clip`.
    """
    return _load("dino", source, revision, dtype)


def load_dinov2(source: str | os.PathLike[str], revision: str | None = None, dtype: DTypeLike = jnp.float32) -> Loaded:
    """Returns the DINOv2 of a folder or a hub id (`facebook/dinov2-base`, `facebook/dinov2-with-registers-large`).

    Its method `stages(pixels)` returns maps of ImageNet-normalised pixels [B, H, W, 3], all at the stride of a patch,
    by default after each quarter of the blocks. Raises UserError as `load_clip`.
    """
    return _load("dinov2", source, revision, dtype)


def load_mit(source: str | os.PathLike[str], revision: str | None = None, dtype: DTypeLike = jnp.float32) -> Loaded:
    """Returns the Mix Transformer of a folder or a hub id: of `nvidia/mit-b5`, or of a whole SegFormer.

    Its method `stages(pixels)` returns the maps at strides 4, 8, 16 and 32 of ImageNet-normalised pixels [B, H, W, 3].
    Raises UserError as `load_clip`.
    """
    return _load("mit", source, revision, dtype)


def load_resnet(source: str | os.PathLike[str], revision: str | None = None, dtype: DTypeLike = jnp.float32) -> Loaded:
    """Returns the ResNet of a folder or a hub id (`timm/resnet101.tv_in1k`, `microsoft/resnet-50`).

    Its method `stages(pixels)` returns the four maps of ImageNet-normalised pixels [B, H, W, 3]; called, it returns
    ImageNet's logits. Read are the names of torchvision, timm, OpenMMLab (V1c) and transformers. Raises UserError as
    `load_clip`.
    """
    return _load("resnet", source, revision, dtype)


def load_efficientnet_lite(
    source: str | os.PathLike[str] | None = None, revision: str | None = None, dtype: DTypeLike = jnp.float32
) -> Loaded:
    """Returns the EfficientNet-Lite0 of a folder or a hub id, by default that of the installed extra `small`.

    Its method `stages(pixels)` returns the maps at strides 4 to 32 of ImageNet-normalised pixels [B, H, W, 3]; called,
    it returns ImageNet's logits. Raises UserError as `load_clip`.
    """
    return _load("efficientnet_lite", packaged_weights().parent if source is None else source, revision, dtype)


def load_unet(
    source: str | os.PathLike[str],
    revision: str | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: Remat = "none",
) -> Loaded:
    """Returns the UNet of a folder (its own, or a whole checkpoint's), a model of the package, or a hub id.

    Called with latents [B, h, w, 4], timesteps [B] (or one) and context [B, T, C] it returns noise or velocity
    [B, h, w, 4], float32. Read are Flax msgpack and safetensors, whole or in shards. Parameters are kept, and the
    network computes, in `dtype`; `remat` as in `UNet`. Raises UserError as `load_clip`.
    """
    return _load("unet", source, revision, dtype, remat=remat)


def load_vae(source: str | os.PathLike[str], revision: str | None = None, dtype: DTypeLike = jnp.float32) -> Loaded:
    """Returns the autoencoder of a folder, a model of the package, or a hub id, as `load_unet`.

    Its methods: `encode(images)`, [B, H, W, 3] in [-1, 1] -> (mean, logvar); `decode(latents)` -> images, float32.
    """
    return _load("vae", source, revision, dtype)


def load_text_encoder(
    source: str | os.PathLike[str], revision: str | None = None, dtype: DTypeLike = jnp.float32
) -> Loaded:
    """Returns the text encoder of a folder, a model of the package, or a hub id, as `load_unet`.

    Called with ids [B, T] it returns the last hidden state [B, T, C] after the final norm, float32.
    """
    return _load("text_encoder", source, revision, dtype)


def load_sam(source: str | os.PathLike[str], revision: str | None = None, dtype: DTypeLike = jnp.float32) -> Loaded:
    """Returns the Segment Anything of a folder or a hub id (`facebook/sam-vit-base`).

    Its methods: `encode(pixels)`, normalised RGB [B, S, S, 3] whose longest side is S, 1024, with zeros after it ->
    embedding [B, h, w, 256]; `decode(embedding, points, labels, boxes, masks)`, p prompts of n points on each image,
    [B, p, n, 2] and [B, p, n] -> (mask logits [B, p, 4, 4h, 4w], predicted IoU [B, p, 4]), both float32. Boxes and
    masks may be left out, see `fmda.models.sam.Sam.decode`. Read are transformers' SamModel and, as model.safetensors,
    its authors' and MobileSAM's names. Raises UserError as `load_clip`.
    """
    return _load("sam", source, revision, dtype)


def load_segmentation(
    source: str | os.PathLike[str],
    revision: str | None = None,
    dtype: DTypeLike = jnp.float32,
    *,
    masks: bool = False,
) -> Loaded:
    """Returns the segmentation network of a folder, a weight file, a model of the package, or a hub id.

    Called with normalised RGB pixels [B, H, W, 3] it returns class logits [B, h, w, K], float32. Read are ESPNetv2,
    transformers' SegFormer, DAFormer, HRDA and DeepLabV2 under OpenMMLab's names, EfficientNet-Lite0 with SegFormer's
    head, and DINOv2 with a linear or DAFormer's head (`NAME.safetensors` with `NAME.json`, or model.safetensors with
    config.json). With `masks` a Mask2Former is, too, which returns what `load_mask2former` says. Raises UserError as
    `load_clip`, and for a network that does not segment.
    """
    file = Path(source).expanduser()
    single = file if file.suffix == ".safetensors" and file.is_file() else None
    folder = file.parent if single else resolve(source, revision)
    family = family_of(folder, single)
    known = [name for name, row in FAMILIES.items() if row.segments or (masks and row.masks)]
    if family not in known:
        raise UserError(
            f"{source}: holds a network of family '{family}', which does not segment; known: {', '.join(known)}"
        )
    return restore(open_checkpoint(family, folder, single), dtype)


def load_mask2former(
    source: str | os.PathLike[str], revision: str | None = None, dtype: DTypeLike = jnp.float32
) -> Loaded:
    """Returns the Mask2Former of a folder or a hub id.

    Called with normalised RGB pixels [B, H, W, 3] it returns class logits [B, Q, K + 1], "no object" last, and mask
    logits [B, Q, h, w] at stride 4, float32; `models.mask2former.semantic_scores` makes class scores of them. Read are
    transformers' names, on a ResNet, and those of CLOUDS, on CLIP's ConvNeXt or ResNet. Raises UserError as
    `load_clip`.
    """
    return _load("mask2former", source, revision, dtype)


def load_heads(folder: str | Path, width: int) -> Heads:
    """Returns CLIP-DINOiser's heads {"obj_proj", "bkg_decoder"}, each {"kernel" [k, k, width, out], "bias" [out]}.

    Reads `dinoiser.safetensors` in `folder` (or the file itself). Raises UserError for a missing file, for arrays that
    are missing, surplus or misshapen, and for heads of a tower of another width.
    """
    path = Path(folder) / HEADS_FILE if Path(folder).is_dir() else Path(folder)
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; CLIP-DINOiser needs its two heads, obj_proj and bkg_decoder, trained on this CLIP; "
            "heads= names their folder"
        )
    opened = open_checkpoint("dinoiser", path.parent, path)
    if opened.config.width != width:
        raise UserError(
            f"{path}: its heads read a tower {opened.config.width} wide, not {width}; they belong to another checkpoint"
        )
    return restore(opened, on_host=True).params
