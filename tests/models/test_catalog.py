import pytest
from flax import nnx

from fmda import trees
from fmda.models.catalog import CATALOG, DiffusionConfig
from fmda.models.clip import ConvNext, TextTransformer, VisionTransformer
from fmda.models.module import parameter_count
from fmda.weights.checkpoint import network_graph
from fmda.weights.registry import FAMILIES

# As printed by the models' authors and counted in the released files.
PUBLISHED = {
    "openai-vit-b32": 151_277_313,
    "openai-vit-b16": 149_620_737,
    "openai-vit-l14": 427_616_513,
    "openai-vit-l14-336": 427_944_193,
    "openai-rn50": 102_007_137,
    "openai-rn101": 119_688_033,
    "laion-vit-b16": 149_620_737,
    "laion-vit-h14": 986_109_441,
    "dino-vit-b16": 85_798_656,
}


def builder(family, config):
    return lambda rngs: FAMILIES[family].build(config, rngs=rngs)


@pytest.mark.parametrize("name", [e.name for e in CATALOG.values() if not isinstance(e.config, DiffusionConfig)])
def test_full_size_parameter_count_is_exact(name):
    count = sum(parameter_count(builder(*network)) for network in CATALOG[name].networks.items())
    assert count == CATALOG[name].parameters == PUBLISHED.get(name, count)


@pytest.mark.parametrize(
    ("name", "unet", "text_encoder"),
    [("stable-diffusion-v1-4", 859_520_964, 123_060_480), ("stable-diffusion-2", 865_910_724, 340_387_840)],
)
def test_each_network_of_stable_diffusion_has_its_published_size(name, unet, text_encoder):
    counts = {part: trees.count(network_graph(part, config)[1]) for part, config in CATALOG[name].networks.items()}
    assert counts == {"unet": unet, "vae": 83_653_863, "text_encoder": text_encoder}
    assert sum(counts.values()) == CATALOG[name].parameters


def test_trunk_and_towers_have_their_published_sizes():
    config = CATALOG["laion-convnext-l-320"].config
    # Published: 199.77 M for the image tower, 152.0 M for the text tower.
    assert parameter_count(lambda rngs: ConvNext(config.vision, 768, rngs=rngs)) == 199_770_816
    assert parameter_count(lambda rngs: TextTransformer(config.text, 768, rngs=rngs)) == 152_001_792
    assert 199_770_816 + 152_001_792 + 1 == CATALOG["laion-convnext-l-320"].parameters


def test_stage_channels_are_those_that_dense_methods_expect():
    assert CATALOG["openai-rn50"].config.vision.channels == (256, 512, 1024, 2048)
    assert CATALOG["laion-convnext-l-320"].config.vision.channels == (192, 384, 768, 1536)


def test_a_dino_entry_builds_a_plain_vision_transformer():
    model = nnx.merge(*network_graph("dino", CATALOG["dino-vit-s8"].config))
    assert isinstance(model, VisionTransformer)
    assert model.norm_pre is None and model.projection is None
