"""The real configurations of adaptation: each is valid, and the first holds DAFormer's constants."""

from pathlib import Path

import jax
import numpy as np
import pytest

from fmda import trees
from fmda.methods.kinds import open_run
from fmda.methods.uda.network import Network, NetworkConfig
from fmda.methods.uda.objective import DistanceConfig
from fmda.methods.uda.self_training import DAFORMER_OPTIM, SelfTrainingConfig
from fmda.models.dinov2 import Dinov2, Dinov2Config
from fmda.models.module import init
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
    assert (config.optim.learning_rate, config.optim.no_decay) == (6e-5, DAFORMER_OPTIM.no_decay)
    synthia = open_run(FOLDER / "synthia-to-cityscapes-mic.yaml").config
    assert (synthia.resize, synthia.val.class_map, synthia.rare_crop) == (None, "cityscapes-to-synthia16", 1500)
    assert synthia.learn.self_training == SelfTrainingConfig(ignored_rows=(15, 120), masked=1.0)
    night = open_run(FOLDER / "cityscapes-to-dark-zurich-daformer.yaml").config
    assert night.learn.self_training.ignored_rows == (0, 0) and night.target.split == "train"


def test_a_segmenter_is_built_around_a_dinov2(tmp_path):
    shape = Dinov2Config(28, 7, 16, 4, 2, maps=(1, 2, 3, 4))
    weights = init(lambda rngs: Dinov2(shape, rngs=rngs), jax.random.key(0))
    save("dinov2", tmp_path, shape, weights)
    network = Network(NetworkConfig(family="dinov2_segmenter", encoder=str(tmp_path)), 3)
    assert (network.config.classes, network.config.encoder.width) == (3, 16)
    found = trees.flatten(network.weights["encoder"])
    for path, leaf in trees.flatten(weights).items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
