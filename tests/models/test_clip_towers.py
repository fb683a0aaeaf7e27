import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fmda import trees
from fmda.errors import UserError
from fmda.models.clip import (
    Clip,
    ClipConfig,
    ConvNextConfig,
    ResNetConfig,
    TextConfig,
    TextTransformer,
    VitConfig,
    vision_tower,
)
from fmda.models.module import abstract, init, parameter_count

VIT = VitConfig(image_size=32, patch_size=8, width=32, layers=2, heads=4, mlp_width=64)
RESNET = ResNetConfig(image_size=64, layers=(1, 2, 1, 1), width=8, heads=4)
CONVNEXT = ConvNextConfig(image_size=64, depths=(1, 1, 2, 1), channels=(8, 16, 24, 32), head_width=24)
TEXT = TextConfig(vocab_size=50, context=12, width=24, layers=2, heads=4, mlp_width=48, eos_token_id=49)
CONFIG = ClipConfig(embed_dim=16, vision=VIT, text=TEXT)


def build(config=CONFIG, dtype=jnp.float32):
    def make(rngs):
        return Clip(config, dtype=dtype, rngs=rngs)

    return make


@pytest.fixture(scope="module")
def clip():
    graphdef, _ = abstract(build())
    return nnx.merge(graphdef, init(build(), jax.random.key(0)))


def abstract_tower(vision, method="__call__"):
    """A function of pixels that traces the tower without ever drawing a parameter."""
    graphdef, shapes = abstract(lambda rngs: vision_tower(vision, 16, rngs=rngs))

    def call(pixels):
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return getattr(nnx.merge(graphdef, zeros), method)(pixels)

    return call


def images(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def test_parameters_are_a_plain_tree_of_the_abstract_shapes():
    _, shapes = abstract(build())
    params = init(build(), jax.random.key(0))
    assert type(params["vision"]["blocks"][0]["attention"]["query"]) is dict
    assert {k: v.shape for k, v in trees.flatten(params).items()} == {
        k: v.shape for k, v in trees.flatten(shapes).items()
    }


def test_equal_builds_have_equal_graphs():
    assert hash(abstract(build())[0]) == hash(abstract(build())[0])


@pytest.mark.parametrize("vision", [VIT, RESNET, CONVNEXT], ids=["vit", "resnet", "convnext"])
@pytest.mark.parametrize("size", [(64, 64), (40, 96)])
def test_every_tower_takes_images_of_other_sizes(vision, size):
    assert jax.eval_shape(abstract_tower(vision), images(2, *size, 3)).shape == (2, 16)


@pytest.mark.parametrize("vision", [VIT, RESNET, CONVNEXT], ids=["vit", "resnet", "convnext"])
def test_towers_compute_and_return_in_their_dtype(vision):
    graphdef, shapes = abstract(build(ClipConfig(16, vision, TEXT), jnp.bfloat16))
    pixels, ids = images(2, vision.image_size, vision.image_size, 3), jnp.zeros((3, 5), jnp.int32)

    def forward(params, pixels, ids):
        clip = nnx.merge(graphdef, params)
        return clip.vision(pixels), clip.text(ids)

    image, text = jax.eval_shape(forward, shapes, pixels, ids)
    assert (image.dtype, text.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert set(product_dtypes(jax.make_jaxpr(forward)(shapes, pixels, ids).jaxpr)) == {jnp.dtype(jnp.bfloat16)}


def product_dtypes(jaxpr):
    """Yields the input dtypes of every matrix product and convolution in a program, inner programs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield from (variable.aval.dtype for variable in equation.invars)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", None)
            if inner is not None:
                yield from product_dtypes(inner)


@pytest.mark.parametrize("vision", [RESNET, CONVNEXT], ids=["resnet", "convnext"])
def test_stages_have_strides_and_channels_of_the_configuration(vision):
    maps = jax.eval_shape(abstract_tower(vision, "stages"), images(1, 64, 96, 3))
    assert [m.shape for m in maps] == [
        (1, 64 // stride, 96 // stride, channels)
        for stride, channels in zip((4, 8, 16, 32), vision.channels, strict=True)
    ]


@pytest.mark.parametrize("vision", [VIT, RESNET, CONVNEXT], ids=["vit", "resnet", "convnext"])
def test_an_image_below_one_patch_is_a_user_error(vision):
    with pytest.raises(UserError, match="4x40 pixels is smaller"):
        jax.eval_shape(abstract_tower(vision), images(1, 4, 40, 3))


def test_tokens_count_and_remainder(clip):
    assert clip.vision.grid(45, 32) == (5, 4)
    tokens = clip.vision.tokens(images(1, 45, 32, 3))
    assert tokens.shape == (1, 21, 32)
    np.testing.assert_array_equal(tokens, clip.vision.tokens(images(1, 45, 32, 3)[:, :40]))


def test_positions_are_untouched_at_the_trained_size_and_shift_with_an_offset(clip):
    table = clip.vision.position[...]
    np.testing.assert_array_equal(clip.vision.positions(4, 4), table)
    plain, shifted = clip.vision.positions(8, 6), clip.vision.positions(8, 6, offset=0.1)
    np.testing.assert_array_equal(plain[0], table[0])
    assert 0 < float(jnp.abs(plain - shifted).max()) < 0.1


def test_call_is_tokens_blocks_norm_and_projection_of_the_class_token(clip):
    x = clip.vision.tokens(images(2, 32, 32, 3))
    for block in clip.vision.blocks:
        x = x + block.attention(block.norm1(x))
        x = x + block.mlp.down(x_up(block, x))
    by_hand = clip.vision.projection(clip.vision.norm_post(x[:, 0]))
    np.testing.assert_allclose(clip.vision(images(2, 32, 32, 3)), by_hand, atol=1e-6)


def x_up(block, x):
    y = block.mlp.up(block.norm2(x))
    return y * jax.nn.sigmoid(1.702 * y)


def test_a_short_context_is_exact_and_padding_changes_nothing(clip):
    short = jnp.array([[48, 3, 7, 49]])
    padded = jnp.array([[48, 3, 7, 49, 0, 0, 0, 0, 0, 0, 0, 0]])
    other = jnp.array([[48, 3, 7, 49, 49, 9, 8, 7, 6, 5, 4, 3]])
    np.testing.assert_allclose(clip.text(short), clip.text(padded), atol=1e-6)
    np.testing.assert_array_equal(clip.text(padded), clip.text(other))


def test_the_end_is_the_first_end_token_or_the_largest_id():
    ids = jnp.array([[1, 40, 49, 49, 0], [1, 49, 2, 3, 0], [1, 2, 3, 4, 5]])
    ends = {}
    for eos in (2, 49, 40):
        tower = TextTransformer(TextConfig(50, 12, 8, 0, 2, 16, eos_token_id=eos), 4, rngs=nnx.Rngs(0))
        ends[eos] = tower.end(ids).tolist()
    assert ends == {2: [2, 1, 4], 49: [2, 1, 0], 40: [1, 0, 0]}


def test_too_long_a_text_is_a_user_error(clip):
    with pytest.raises(UserError, match="13 tokens, but the model has 12"):
        clip.text(jnp.zeros((1, 13), jnp.int32))


def test_statistics_are_not_counted_as_parameters():
    def make(rngs):
        return vision_tower(RESNET, 16, rngs=rngs)

    _, shapes = abstract(make)
    statistics = trees.count(trees.select(shapes, "*/mean")) + trees.count(trees.select(shapes, "*/var"))
    assert statistics > 0
    assert parameter_count(make) == trees.count(shapes) - statistics
