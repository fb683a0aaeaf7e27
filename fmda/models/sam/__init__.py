"""Segment Anything (Kirillov et al. 2023): an image is encoded once, and prompts become masks.

`vit` and `tiny_vit` are image encoders, `prompts` encodes points, boxes and masks, `decoder` predicts masks.
"""

from fmda.models.sam.network import Sam, SamConfig
from fmda.models.sam.tiny_vit import TinyVitConfig
from fmda.models.sam.vit import SamVitConfig

__all__ = ["Sam", "SamConfig", "SamVitConfig", "TinyVitConfig"]
