"""The SAM stage: segment-anything in ONNX, without jax. Label maps are refined by its masks."""

from fmda.sam.automatic import automatic_masks
from fmda.sam.refine import Evidence, Improved, Refined, Roles, refine
from fmda.sam.stage import Embedding, Masks, Prompt, SamStage

__all__ = [
    "Embedding", "Evidence", "Improved", "Masks", "Prompt", "Refined", "Roles", "SamStage", "automatic_masks", "refine",
]  # fmt: skip
