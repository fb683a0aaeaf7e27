"""Mix Transformer, SegFormer, DAFormer, HRDA: parameter counts, drop path, files in both directions, bad input."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_diffusion import drawn, same

import fmda
from fmda import trees
from fmda.errors import UserError
from fmda.models.daformer import DaFormer, DaFormerConfig, DaFormerHead
from fmda.models.hrda import Hrda, HrdaConfig
from fmda.models.mit import Mit, MitConfig
from fmda.models.module import abstract, assembled, init, parameter_count, separated, statistics_of
from fmda.models.segformer import SegFormerConfig, SegFormerHead
from fmda.nn.drop import drop
from fmda.weights.check import verify
from fmda.weights.checkpoint import network_graph
from fmda.weights.load import load_mit
from fmda.weights.network import save

SMALL = MitConfig((8, 16, 24, 32), (1, 1, 2, 1), (1, 2, 3, 4))
NETWORKS = {
    "segformer": SegFormerConfig(SMALL, 16, 5),
    "daformer": DaFormerConfig(SMALL, 16, classes=5),
    "hrda": HrdaConfig(SMALL, 16, classes=5),
}


def test_parameter_counts_are_the_published_ones():
    widths = MitConfig().widths
    assert parameter_count(lambda rngs: DaFormerHead(widths, rngs=rngs)) == 3_712_275
    assert parameter_count(lambda rngs: SegFormerHead(widths, 256, 19, rngs=rngs)) == 530_707
    assert parameter_count(lambda rngs: DaFormer(DaFormerConfig(), rngs=rngs)) == 85_155_283
    assert parameter_count(lambda rngs: Hrda(HrdaConfig(), rngs=rngs)) == 85_155_283 + 530_707
    assert parameter_count(lambda rngs: Hrda(HrdaConfig(fixed_attention=0.5), rngs=rngs)) == 85_155_283


class Strided(nnx.Module):
    """Stands in for an encoder."""

    def stages(self, x, key=None):
        return (x[:, ::4, ::4],)


class Scaled(nnx.Module):
    """Stands in for a head."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, maps, key=None):
        return self.factor * maps[0]


def test_a_fixed_attention_is_that_of_a_head_of_zeros(tmp_path):
    pixels = jax.random.normal(jax.random.key(1), (1, 64, 64, 3))

    def fused(config):
        net = nnx.eval_shape(lambda: Hrda(config, rngs=nnx.Rngs(0)))
        net.encoder, net.head = Strided(), Scaled(1.0)
        if config.fixed_attention is None:
            net.attention = Scaled(0.0)
        return net.with_detail(pixels, jnp.array([8, 16])).fused

    learned, fixed = NETWORKS["hrda"], replace(NETWORKS["hrda"], fixed_attention=0.5)
    np.testing.assert_allclose(fused(fixed), fused(learned), atol=1e-6)
    assert abs(fused(replace(fixed, fixed_attention=0.25)) - fused(learned)).max() > 0.1
    folder = save("hrda", tmp_path, fixed, drawn(network_graph("hrda", fixed)[1]))
    assert fmda.load_segmentation(folder).config == fixed


def test_epsilons_and_drop_rates_have_their_places():
    net = nnx.eval_shape(lambda: Mit(MitConfig(depths=(2, 1, 1, 1)), rngs=nnx.Rngs(0)))
    block = net.levels[0].blocks[0]
    assert (block.norm1.epsilon, block.norm2.epsilon, net.levels[0].norm.epsilon) == (1e-6,) * 3
    assert (net.levels[0].patch.norm.epsilon, block.attention.reduce.norm.epsilon) == (1e-5,) * 2
    rates = [rate for level in net.levels for rate in level.rates]
    np.testing.assert_allclose(rates, [0, 0.025, 0.05, 0.075, 0.1])


def test_dropped_parts_share_one_draw_and_keep_the_mean():
    x = jnp.ones((1000, 3, 4))
    whole = np.asarray(drop(x, 0.25, (0,), jax.random.key(0)))
    assert set(np.unique(whole)) == {0.0, np.float32(1 / 0.75)} and (whole == whole[:, :1, :1]).all()
    assert abs(whole.mean() - 1) < 0.06
    channels = np.asarray(drop(x, 0.25, (0, -1), jax.random.key(0)))
    assert (channels == channels[:, :1]).all() and not (channels == channels[..., :1]).all()
    assert drop(x, 0.25, (0,), None) is x and drop(x, 0.0, (0,), jax.random.key(0)) is x


def test_keys_alone_decide_what_is_dropped():
    make = lambda rngs: DaFormer(replace(NETWORKS["daformer"], encoder=replace(SMALL, drop_path=0.9)), rngs=rngs)  # noqa: E731
    graphdef, _ = abstract(make)
    params, statistics = separated(graphdef, init(make, jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    run = jax.jit(lambda key: assembled(graphdef, params, statistics)(x, key))
    a, b, c, still = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1)), run(None)
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c) and not np.allclose(a, still)


def test_a_teacher_normalises_by_its_batch_and_a_student_hands_statistics_on():
    config = NETWORKS["daformer"]
    make = lambda rngs: DaFormer(config, rngs=rngs)  # noqa: E731
    graphdef, _ = abstract(make)
    params, statistics = separated(graphdef, init(make, jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))

    @jax.jit
    def step(params, statistics):
        def loss(params):
            module = assembled(graphdef, params, statistics, batch_statistics=True)
            logits = module(x)
            module(2 * x)  # a second forward pass in the same step moves the same statistics
            return (logits**2).mean(), (logits, statistics_of(module))

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, (logits, moved)), grads = step(params, statistics)
    assert len(trees.flatten(statistics)) == 2 * 8 and trees.flatten(moved).keys() == trees.flatten(statistics).keys()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    var = np.asarray(moved["head"]["fuse"]["norm"]["var"])
    assert (var < 1).all() and not np.allclose(var, 0.9, atol=1e-4)
    # stored statistics are those of no image, so the two ways must differ
    assert not np.allclose(logits, assembled(graphdef, params, statistics)(x), atol=1e-3)


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    tree = trees.flatten(drawn(network_graph(request.param, NETWORKS[request.param])[1]))
    params = trees.unflatten({path: np.abs(leaf) if path.endswith("var") else leaf for path, leaf in tree.items()})
    return request.param, params


def test_what_was_saved_is_loaded_and_segments(network, tmp_path):
    family, params = network
    folder = save(family, tmp_path / "net", NETWORKS[family], params)
    seg = fmda.load_segmentation(folder)
    assert (seg.family, seg.config) == (family, NETWORKS[family]) and same(seg.params, params)
    assert verify(folder).ok
    logits = jax.eval_shape(seg, jax.ShapeDtypeStruct((2, 64, 128, 3), np.float32))
    assert (logits.shape, logits.dtype) == ((2, 16, 32, 5), np.float32)
    with pytest.raises(UserError, match=r"24.* pixels|multiples of 64; crop or resize"):
        seg(np.zeros((1, 24, 64, 3), np.float32))


def test_an_encoder_is_saved_alone_and_does_not_segment(network, tmp_path):
    _, params = network
    folder = save("mit", tmp_path / "encoder", SMALL, params["encoder"])
    loaded = load_mit(folder)
    assert loaded.config == SMALL and same(loaded.params, params["encoder"]) and verify(folder).ok
    with pytest.raises(UserError, match="holds a network of family 'mit', which does not segment"):
        fmda.load_segmentation(folder)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"hidden_sizes": [8, 16]}, "hidden_sizes is .*, not a list of 4 whole numbers above 0"),
        ({"num_attention_heads": [1, 2, 5, 4]}, "num_attention_heads 5 does not divide the width of its stage, 24"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0, not a number from 0 to below 1"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', not 'gelu', which alone can be built"),
        ({"depths": [1, 1, 3, 1]}, "missing: segformer.encoder.block.2.2"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_one_line(change, line, tmp_path):
    config = NETWORKS["segformer"]
    folder = save("segformer", tmp_path / "net", config, drawn(network_graph("segformer", config)[1]))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=line):
        fmda.load_segmentation(folder)
