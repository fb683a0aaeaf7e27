"""CLIP-DINOiser's two heads on disk: `dinoiser.safetensors`, beside the weights of the CLIP they were trained on."""

from pathlib import Path

import jax
import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import load_file

from fmda.errors import UserError
from fmda.models.dinoiser import HEADS_FILE, Heads
from fmda.weights.files import write_safetensors

_NAMES = ("obj_proj", "bkg_decoder")


def load_heads(folder: str | Path, width: int) -> Heads:
    """Returns CLIP-DINOiser's heads {"obj_proj", "bkg_decoder"}, each {"kernel" [k, k, width, out], "bias" [out]}.

    Reads `dinoiser.safetensors` in `folder` (or the file itself), with our names or torch's (`obj_proj.weight`, OIHW).
    Raises UserError for a missing file, a missing, surplus or misshapen tensor; all of them are listed.
    """
    path = Path(folder) / HEADS_FILE if Path(folder).is_dir() else Path(folder)
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; CLIP-DINOiser needs its two heads, obj_proj and bkg_decoder, trained on this CLIP; "
            "heads= names their folder"
        )
    try:
        flat = load_file(str(path))
    except Exception as fault:  # the reader has an exception type of its own
        raise UserError(f"{path}: not a safetensors file ({fault}); convert it first") from None
    tensors: dict[str, np.ndarray] = {}
    for name, value in flat.items():
        if name.endswith(".weight"):
            name, value = name.removesuffix(".weight") + "/kernel", value.transpose(2, 3, 1, 0)
        tensors[name.replace(".", "/")] = np.ascontiguousarray(value, np.float32)
    wanted = {f"{head}/{leaf}" for head in _NAMES for leaf in ("kernel", "bias")}
    faults = [f"missing {n}" for n in sorted(wanted - set(tensors))]
    faults += [f"superfluous {n}" for n in sorted(set(tensors) - wanted)]
    for head, side in (("obj_proj", 3), ("bkg_decoder", 1)):
        kernel = tensors.get(f"{head}/kernel")
        if kernel is not None and kernel.shape[:3] != (side, side, width):
            faults.append(f"{head}/kernel is {list(kernel.shape)}, not [{side}, {side}, {width}, ...]")
    if faults:
        raise UserError(f"{path}: {'; '.join(faults)}; these heads belong to another checkpoint")
    return {h: {leaf: tensors[f"{h}/{leaf}"] for leaf in ("kernel", "bias")} for h in _NAMES}


def save_heads(folder: str | Path, heads: Heads, dtype: DTypeLike = np.float32) -> Path:
    """Writes the heads as `dinoiser.safetensors` in `folder`; returns the file."""
    path = Path(folder) / HEADS_FILE
    flat = {f"{h}/{leaf}": np.asarray(jax.device_get(a), dtype) for h in heads for leaf, a in heads[h].items()}
    write_safetensors(path, flat)
    return path
