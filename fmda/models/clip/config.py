"""Shapes of the CLIP towers, as frozen dataclasses."""

from dataclasses import dataclass, field

from fmda.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VitConfig:
    """A vision transformer (Dosovitskiy et al. 2021). `image_size` is the side its position table was trained for."""

    image_size: PositiveInt = 224
    patch_size: PositiveInt = 16
    width: PositiveInt = 768
    layers: PositiveInt = 12
    heads: PositiveInt = 12
    mlp_width: PositiveInt = 3072
    activation: str = "quick_gelu"
    norm_eps: PositiveFloat = 1e-5
    pre_norm: bool = True
    """CLIP normalises the tokens before the first block; DINO and plain ViTs do not."""
    patch_bias: bool = False
    position_offset: NonNegativeFloat = 0.0
    """Added to the side of the new grid when positions are resized, as DINO's own code does (0.1)."""

    @property
    def side(self) -> int:
        """Patches along one side of the position table."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class ResNetConfig:
    """CLIP's ModifiedResNet (Radford et al. 2021, 2.4): deep stem, average-pooled strides, attention pool."""

    image_size: PositiveInt = 224
    layers: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (3, 4, 6, 3)
    width: PositiveInt = 64
    heads: PositiveInt = 32

    @property
    def channels(self) -> tuple[int, int, int, int]:
        """Channels of the four stage outputs, at strides 4, 8, 16, 32."""
        return (4 * self.width, 8 * self.width, 16 * self.width, 32 * self.width)


@dataclass(frozen=True)
class ConvNextConfig:
    """A ConvNeXt trunk (Liu et al. 2022) with OpenCLIP's projection MLP."""

    image_size: PositiveInt = 320
    depths: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (3, 3, 27, 3)
    channels: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (192, 384, 768, 1536)
    head_width: PositiveInt = 1536
    activation: str = "gelu"
    norm_eps: PositiveFloat = 1e-6


@dataclass(frozen=True)
class TextConfig:
    """CLIP's causal text transformer.

    `eos_token_id` says where the sentence is read off: 2 (what old configuration files hold) means the place of the
    largest id, any other value the first place with that id.
    """

    vocab_size: PositiveInt = 49408
    context: PositiveInt = 77
    width: PositiveInt = 512
    layers: PositiveInt = 12
    heads: PositiveInt = 8
    mlp_width: PositiveInt = 2048
    activation: str = "quick_gelu"
    norm_eps: PositiveFloat = 1e-5
    eos_token_id: NonNegativeInt = 2
    bos_token_id: NonNegativeInt = 49406


@dataclass(frozen=True)
class ClipConfig:
    """Both towers, the width of the joint space, and the normalisation of the images (RGB in [0, 1])."""

    embed_dim: PositiveInt = 512
    vision: VitConfig | ResNetConfig | ConvNextConfig = field(default_factory=VitConfig)
    text: TextConfig = field(default_factory=TextConfig)
    image_mean: tuple[float, float, float] = OPENAI_MEAN
    image_std: tuple[float, float, float] = OPENAI_STD
