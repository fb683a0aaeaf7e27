"""Shape of a Mask2Former."""

from dataclasses import dataclass

from fmda.models.clip.config import OPENAI_MEAN, OPENAI_STD, ConvNextConfig, ResNetConfig
from fmda.models.dino import IMAGENET_MEAN, IMAGENET_STD
from fmda.models.resnet import ResNetEncoderConfig


@dataclass(frozen=True)
class HeadConfig:
    """Pixel decoder and transformer decoder; the defaults are those of CLOUDS.

    Attributes:
        classes: without "no object".
        width: channels of tokens and queries, a multiple of 32.
        mask_width: channels of the mask features.
        heads: attention heads, in both decoders.
        points: samples of a head in a level (pixel decoder).
        pixel_layers, pixel_hidden: layers of the pixel decoder, and channels between their two linear layers.
        layers, hidden: the same of the transformer decoder.
        queries: number of learned queries; with `fixed` there is one per class.
        text_classes: whether queries are classified by text embeddings, as in FC-CLIP, and not by a linear layer.
        fixed: whether query k is made of class k's text embedding and stands for that class, as in tqdm.
        text_width: channels of the text embeddings, where they are used.
    """

    classes: int = 19
    width: int = 256
    mask_width: int = 256
    heads: int = 8
    points: int = 4
    pixel_layers: int = 6
    pixel_hidden: int = 1024
    layers: int = 9
    hidden: int = 2048
    queries: int = 100
    text_classes: bool = False
    fixed: bool = False
    text_width: int = 768


@dataclass(frozen=True)
class Mask2FormerConfig:
    """Encoder and head.

    Attributes:
        encoder: a ResNet, or one of CLIP's convolutional towers, which always normalise by stored statistics.
        head: the decoders.
        embed_dim: outputs of CLIP's tower; not used with a ResNet.
    """

    encoder: ResNetEncoderConfig | ResNetConfig | ConvNextConfig = ConvNextConfig()
    head: HeadConfig = HeadConfig()
    embed_dim: int = 768

    @property
    def classes(self) -> int:
        """Classes without "no object"."""
        return self.head.classes

    @property
    def image(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and standard deviation of RGB in 0..1 that images are normalised by: ImageNet's or CLIP's."""
        if isinstance(self.encoder, ResNetEncoderConfig):
            return IMAGENET_MEAN, IMAGENET_STD
        return OPENAI_MEAN, OPENAI_STD
