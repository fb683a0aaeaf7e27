"""CLIP: text transformer, and image towers as vision transformer, ModifiedResNet or ConvNeXt."""

from fmda.models.clip.clip import Clip, vision_tower
from fmda.models.clip.config import ClipConfig, ConvNextConfig, ResNetConfig, TextConfig, VitConfig
from fmda.models.clip.convnext import ConvNext
from fmda.models.clip.text import TextTransformer
from fmda.models.clip.transformer import Block
from fmda.models.clip.vision import VisionTransformer

__all__ = [
    "Block",
    "Clip",
    "ClipConfig",
    "ConvNext",
    "ConvNextConfig",
    "ResNetConfig",
    "TextConfig",
    "TextTransformer",
    "VisionTransformer",
    "VitConfig",
    "vision_tower",
]
