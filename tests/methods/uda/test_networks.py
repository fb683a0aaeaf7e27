"""The objective for each family of networks, by shapes alone."""

from typing import get_type_hints

import jax
import jax.numpy as jnp
import pytest

from fmda.methods.uda.network import NEW, NetworkConfig
from fmda.methods.uda.objective import DistanceConfig, LearnConfig, make_objective
from fmda.methods.uda.self_training import Optimizer, SelfTrainingConfig, initial_aux
from fmda.models.daformer import DaFormerConfig
from fmda.models.deeplab_v2 import DeepLabV2Config
from fmda.models.dinov2 import Dinov2Config
from fmda.models.dinov2_segmenter import Dinov2SegmenterConfig
from fmda.models.efficientnet_lite import EfficientNetLiteConfig
from fmda.models.hrda import HrdaConfig
from fmda.models.lite_segmenter import LiteSegmenterConfig
from fmda.models.mit import MitConfig
from fmda.models.module import separated
from fmda.models.resnet import ResNetEncoderConfig
from fmda.models.segformer import SegFormerConfig
from fmda.train import create_state, make_optimizer
from fmda.weights.checkpoint import network_graph

CLASSES, SIDE = 5, 64
MIT = MitConfig((8, 8, 8, 8), (1, 1, 1, 1), (1, 1, 2, 2))
CONFIGS = {
    "segformer": SegFormerConfig(MIT, 8, CLASSES),
    "daformer": DaFormerConfig(MIT, 8, classes=CLASSES),
    "hrda": HrdaConfig(MIT, 8, classes=CLASSES),
    "deeplab_v2": DeepLabV2Config(ResNetEncoderConfig(layers=(1, 1, 1, 1)), classes=CLASSES),
    "lite_segmenter": LiteSegmenterConfig(
        EfficientNetLiteConfig(tuple((1, 3, stride, 2, 8) for stride in (1, 2, 2, 2, 2)), 8, classes=0), 8, CLASSES
    ),
    "dinov2_segmenter": Dinov2SegmenterConfig(
        Dinov2Config(width=8, layers=4, heads=2, maps=(1, 2, 3, 4)), width=8, classes=CLASSES
    ),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_every_parameter_has_a_gradient_and_aux_keeps_its_form(family):
    graphdef, shapes = network_graph(family, CONFIGS[family])
    params, statistics = separated(graphdef, shapes)
    learn = LearnConfig(SelfTrainingConfig(), DistanceConfig(things=(1,)))
    objective = make_objective(graphdef, CLASSES, learn)
    image = jax.ShapeDtypeStruct((2, SIDE, SIDE, 3), jnp.uint8)
    labels = jax.ShapeDtypeStruct((2, SIDE, SIDE), jnp.uint8)
    batch = {"source": {"image": image, "labels": labels}, "target": {"image": image}}
    tx = make_optimizer(Optimizer(), 2000)

    def gradient(params, statistics, frozen, batch, key):
        state = create_state(params, tx, aux=initial_aux(statistics, CLASSES))

        def loss(params):
            outcome = objective(params, state, frozen, batch, key)
            return outcome.loss, outcome

        gradients, outcome = jax.grad(loss, has_aux=True)(params)
        return gradients, outcome, state.aux

    frozen = {"encoder": shapes["encoder"]}
    gradients, outcome, aux = jax.eval_shape(gradient, params, statistics, frozen, batch, jax.random.key(0))
    assert set(outcome.metrics) == {f"loss_{name}" for name in ("source", "distance", "mixed")} | {"confident"}
    assert outcome.loss.shape == ()
    for ours, theirs in ((gradients, params), (outcome.aux, aux)):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), ours) == jax.tree.map(lambda x: (x.shape, x.dtype), theirs)


def test_no_family_is_left_out():
    assert set(NEW) <= set(CONFIGS) and set(get_type_hints(NetworkConfig)["family"].__args__) == set(NEW)
