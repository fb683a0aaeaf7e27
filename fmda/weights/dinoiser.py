"""CLIP-DINOiser's two heads on disk: `dinoiser.safetensors`, beside the weights of the CLIP they were trained on."""

from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from fmda.errors import UserError
from fmda.models.dinoiser import HEADS_FILE, Heads, HeadsConfig
from fmda.weights.checkpoint import open_checkpoint
from fmda.weights.network import restore, save


def load_heads(folder: str | Path, width: int) -> Heads:
    """Returns CLIP-DINOiser's heads {"obj_proj", "bkg_decoder"}, each {"kernel" [k, k, width, out], "bias" [out]}.

    Reads `dinoiser.safetensors` in `folder` (or the file itself), with torch's names (`obj_proj.weight`, OIHW) or ours.
    Raises UserError for a missing file, for tensors that are missing, surplus or misshapen, and for heads of a tower of
    another width.
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


def save_heads(folder: str | Path, heads: Heads, dtype: DTypeLike = np.float32) -> Path:
    """Writes the heads as `dinoiser.safetensors` in `folder`, under torch's names; returns the file."""
    width, channels = np.shape(heads["obj_proj"]["kernel"])[2:]
    return save("dinoiser", folder, HeadsConfig(width, channels), heads, dtype=dtype) / HEADS_FILE
