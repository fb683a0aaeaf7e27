"""CLIP-DINOiser's two convolutions under the names of its authors (PyTorch's) and under ours."""

from pathlib import Path

from fmda.errors import UserError
from fmda.models.dinoiser import HEADS_FILE, HeadsConfig
from fmda.weights.layers import torch_rows
from fmda.weights.table import Export, Names, Table, row

_HEADS = ("obj_proj", "bkg_decoder")

TORCH = Table(torch_rows((head, head, "conv") for head in _HEADS), "CLIP-DINOiser heads")
PLAIN = Table(
    (row(f"{head}/{leaf}", f"{head}/{leaf}") for head in _HEADS for leaf in ("kernel", "bias")),
    "CLIP-DINOiser heads, our names",
)


def read(file: Path, names: Names) -> tuple[HeadsConfig, Table]:
    """Returns the sizes of the heads, from the shapes of their arrays, and the table of the layout."""
    plain = any("/" in name for name in names)
    shape = names.get("obj_proj/kernel" if plain else "obj_proj.weight", ())
    if len(shape) != 4:
        raise UserError(f"{file}: holds no obj_proj of CLIP-DINOiser; these heads belong to another network")
    width, channels = shape[2:] if plain else (shape[1], shape[0])
    return HeadsConfig(width, channels), PLAIN if plain else TORCH


def export(config: HeadsConfig, layout: str | None = None) -> Export:
    """Returns the file of saved heads, under CLIP-DINOiser's names."""
    return Export(HEADS_FILE, TORCH, {})
