"""The real configurations of adaptation: each is valid, and the first holds DAFormer's constants."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmda import trees
from fmda.errors import UserError
from fmda.methods.kinds import open_run
from fmda.methods.uda.network import Network, NetworkConfig
from fmda.methods.uda.objective import DistanceConfig, make_objective
from fmda.methods.uda.self_training import Optimizer, SelfTrainingConfig, initial_aux
from fmda.models.daformer import DaFormerConfig
from fmda.models.dinov2 import Dinov2, Dinov2Config
from fmda.models.dinov2_segmenter import Dinov2SegmenterConfig
from fmda.models.module import init, separated
from fmda.train import make_optimizer
from fmda.train.step import create_state, step_flops
from fmda.weights.checkpoint import network_graph
from fmda.weights.network import save

FOLDER = Path(__file__).parents[3] / "configs/uda"


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_each_configuration_is_valid_and_says_how_to_run_it(name):
    config = open_run(FOLDER / f"{name}.yaml").config
    assert config.target is not None and config.learn.self_training is not None
    assert f"fmda run configs/uda/{name}.yaml" in (FOLDER / f"{name}.yaml").read_text()


def test_the_first_holds_the_constants_of_daformer_and_others_change_few():
    config = open_run(FOLDER / "gta5-to-cityscapes-daformer.yaml").config
    assert config.learn.self_training == SelfTrainingConfig(ignored_rows=(15, 120))
    assert config.learn.distance == DistanceConfig()
    assert (config.optim.learning_rate, config.optim.no_decay) == (6e-5, Optimizer().no_decay)
    synthia = open_run(FOLDER / "synthia-to-cityscapes-mic.yaml").config
    assert (synthia.resize, synthia.val.class_map, synthia.rare_crop) == (None, "cityscapes-to-synthia16", 1500)
    assert synthia.learn.self_training == SelfTrainingConfig(ignored_rows=(15, 120), masked=1.0)
    for source in ("gta5", "synthia"):
        dacs = open_run(FOLDER / f"{source}-to-cityscapes-dacs.yaml").config
        assert dacs.learn.self_training == SelfTrainingConfig(decay=0.99) and dacs.learn.distance is None
        assert dacs.optim.no_decay == () and dacs.rare is None
    night = open_run(FOLDER / "cityscapes-to-dark-zurich-daformer.yaml").config
    assert night.learn.self_training.ignored_rows == (0, 0) and night.target.split == "train"


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*-hrda.yaml")))
def test_mic_on_hrda_is_a_setting(name):
    assert "MIC on HRDA: learn.self_training.masked=1" in (FOLDER / f"{name}.yaml").read_text()
    config = open_run(FOLDER / f"{name}.yaml", ["learn.self_training.masked=1"]).config
    # a city's frame has the bonnet of the car below, those of ACDC and Dark Zurich are taken whole
    border = (30, 240, 30, 30) if name.endswith("-to-cityscapes-hrda") else (0, 0, 0, 0)
    assert config.learn.self_training == SelfTrainingConfig(masked=1.0, patch=64, border=border)
    assert (config.crop, config.rare_crop, config.target.resize, config.protocol.crop) == (1024, 6000, None, 1024)


REAL = sorted(path.stem for path in FOLDER.glob("*-to-*.yaml") if "camvid" not in path.stem)
TRAINED = {
    "daformer": 85_155_283, "hrda": 85_685_990, "deeplab_v2": 43_219_846, "dinov2_segmenter": 308_867_347,
}  # fmt: skip


@pytest.mark.slow
def test_every_real_network_has_the_published_number_of_parameters():
    configs = [open_run(FOLDER / f"{name}.yaml").config for name in REAL]
    for path in (FOLDER.parent / "datum").glob("*-to-*.yaml"):
        runs = open_run(path).config
        configs += [runs[name]["config"] for name in ("source-only", "datum")]
    networks = {config.network for config in configs}
    assert len(configs) == 18 + 2 * 6 and {network.family for network in networks} == set(TRAINED)
    for settings in networks:
        network = Network(settings, 19, sizes=True)
        assert trees.count(jax.eval_shape(network.init, jax.random.key(0))) == TRAINED[settings.family]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gta5-to-cityscapes-dacs", "cityscapes-to-acdc-vfm"]
)  # 12 and 24 s; DAFormer 31, HRDA 54
def test_real_configurations_are_planned_at_full_size(name):
    job = open_run(FOLDER / f"{name}.yaml")
    counts = dict(job.plan().parameters)
    assert counts["trained"] == TRAINED[job.config.network.family] == counts["encoder"] + counts["head"]


@pytest.mark.slow
def test_a_step_of_daformer_costs_what_its_layers_add_up_to():
    config = open_run(FOLDER / "gta5-to-cityscapes-daformer.yaml").config
    graphdef, shapes = network_graph("daformer", DaFormerConfig())
    params, statistics = separated(graphdef, shapes)
    assert trees.count(params) == 85_155_283
    state = jax.eval_shape(lambda: create_state(*filled((params,)), optax.identity(), aux=initial_aux({}, 19)))
    state = state._replace(aux=state.aux | {"statistics": statistics})
    image, labels = jax.ShapeDtypeStruct((2, 512, 512, 3), np.uint8), jax.ShapeDtypeStruct((2, 512, 512), np.uint8)
    batch = {"source": {"image": image, "labels": labels}, "target": {"image": image}}
    key = jax.eval_shape(lambda: jax.random.key(0))
    flops = step_flops(make_objective(graphdef, 19, config.learn), state, {"encoder": params["encoder"]}, batch, key)
    # multiply-accumulates of two images, in units of 1e9: source and mixed images forward and backward, the teacher
    # forward, the encoder before training forward
    encoder, network = 2 * 69.4, 2 * (69.4 + 56.9)
    counted = 7 * network + encoder
    assert flops / 2e9 == pytest.approx(counted, rel=0.02)
    # DAFormer's code goes backward through the encoder once more, for the feature distance alone
    assert flops / 2e9 + 2 * encoder == pytest.approx(2185, rel=0.02)


def filled(shapes):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


@pytest.mark.parametrize("head", [None, "daformer", "linear"])
def test_a_segmenter_is_built_around_a_dinov2(head, tmp_path):
    shape = Dinov2Config(28, 7, 16, 4, 2, maps=(1, 2, 3, 4))
    weights = init(lambda rngs: Dinov2(shape, rngs=rngs), jax.random.key(0))
    save("dinov2", tmp_path, shape, weights)
    network = Network(NetworkConfig(family="dinov2_segmenter", encoder=str(tmp_path), head=head), 3)
    assert (network.config.classes, network.config.encoder.width) == (3, 16)
    assert network.config.head == (head or "daformer")
    assert (set(network.shapes["head"]) == {"classifier"}) == (head == "linear")
    found = trees.flatten(network.weights["encoder"])
    for path, leaf in trees.flatten(weights).items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_a_factor_of_zero_freezes_the_encoder():
    encoder = Dinov2Config(28, 7, 16, 1, 2, maps=(1,))
    params = jax.tree.map(
        lambda leaf: np.ones(leaf.shape, np.float32),
        network_graph("dinov2_segmenter", Dinov2SegmenterConfig(encoder, "linear"))[1],
    )
    tx = make_optimizer(Optimizer(warmup_steps=0, multipliers={"encoder/*": 0.0, "*": 10.0}), 4)
    updates, _ = tx.update(params, tx.init(params), params, position=0)
    for path, leaf in trees.flatten(updates).items():
        assert bool(jnp.any(leaf != 0)) == path.startswith("head/"), path


def test_a_head_is_chosen_for_a_new_dinov2_alone():
    with pytest.raises(UserError, match="network.head: is of a new network of family 'dinov2_segmenter'"):
        Network(NetworkConfig(family="segformer", encoder="x", head="linear"), 3)
