"""CLOUDS' configurations: each is valid and holds the constants of the paper, the head its number of parameters."""

from pathlib import Path

import numpy as np
import pytest

from fmda import trees
from fmda.data.dataset import Example
from fmda.data.transforms import training_transform
from fmda.methods.clouds.settings import Optimizer
from fmda.methods.clouds.streams import joint_stream
from fmda.methods.kinds import open_run
from fmda.methods.mask_head import MaskHeadConfig
from fmda.methods.supervised import model_of_shapes

FOLDER = Path(__file__).parents[3] / "configs/clouds"
GTA5 = "gta5-to-cityscapes-convnext-l"


def runs_of(name):
    return {run: values["config"] for run, values in open_run(FOLDER / f"{name}.yaml").config.items()}


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_each_configuration_is_valid_and_says_how_to_run_it(name):
    assert open_run(FOLDER / f"{name}.yaml").stages()
    assert f"fmda run configs/clouds/{name}.yaml" in (FOLDER / f"{name}.yaml").read_text()


def test_real_configurations_hold_the_constants_of_the_paper():
    for name, factor, steps, rate, resize in (
        (GTA5, 2.0, (40000, 40000), 1e-5, (1914, 1052)),
        ("synthia-to-cityscapes-convnext-l", 0.7, (30000, 30000), 1e-5, (1280, 760)),
        ("cityscapes-to-acdc-convnext-l", 0.2, (5000, 10000), 1e-4, (2048, 1024)),
    ):
        runs = runs_of(name)
        joint, warm_up = runs["joint"], runs["warm-up"]
        assert (joint.factor, (warm_up.steps, joint.steps)) == (factor, steps)
        for one in (joint, warm_up):
            assert (one.batch, one.crop, one.scale, one.resize) == (8, 768, (0.5, 2.0), resize)
            optim, ours = one.optim, Optimizer()
            assert optim.learning_rate == rate and (optim.clip_norm, optim.weight_decay) == (0.01, 0.05)
            assert optim.no_decay == ours.no_decay and optim.schedule == ("poly" if "synthia" in name else "constant")
        assert warm_up.mask2former == MaskHeadConfig(ignore="negative") and warm_up.ssd_jitter
        assert (runs["images"].count, runs["images"].sample.size, runs["prompts"].count) == (5000, (768, 768), 100)


def test_one_switch_chooses_the_rules():
    improved = runs_of(GTA5)["joint"]
    reference = open_run(FOLDER / f"{GTA5}.yaml", ["runs.joint.mode=reference"]).config["joint"]["config"]
    assert (improved.teacher_every, improved.moved) == (1, 0.02)
    assert (reference.teacher_every, reference.moved, reference.labels.check_every) == (100, 0.0, 100)


def test_rows_of_the_table_have_as_many_steps_and_images():
    table = open_run(FOLDER.parent / "tables/clouds.yaml").config
    rows = {name: row.config for name, row in table.rows.items()}
    steps, counts = ({name: int(row[key]) for name, row in rows.items() if key in row} for key in ("steps", "count"))
    assert int(table.common["steps"]) == 2 * steps["first round"] == steps["longer"] - steps["warm-up"]
    for kind in ("static", "dynamic"):
        assert steps[f"{kind} rounds"] == steps["first round"]
        assert counts["first images"] + counts[f"{kind} images"] == counts["images"]
        assert rows[f"{kind} images"]["sample"] == rows["images"]["sample"]
    # the two second rounds differ in their weights alone
    text = str({name: row for name, row in rows.items() if name.startswith("static")})
    others = {name: row for name, row in rows.items() if name.startswith("dynamic")}
    assert text.replace("static", "dynamic").replace(", 'focus': '0.0'", "") == str(others)
    assert open_run(FOLDER.parent / "tables/clouds.yaml").stages()


@pytest.mark.slow
def test_the_head_has_the_parameters_of_the_paper():
    warm_up = runs_of("gta5-to-cityscapes-rn50")["warm-up"]
    assert trees.count(model_of_shapes(warm_up).head) == 20_499_668


def test_the_share_of_generated_images_follows_from_the_factor():
    blank = Example(np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8), "")
    stream = joint_stream([blank] * 250, [blank] * 50, training_transform((32, 32)), 32, 8, 2.0)
    drawn = [stream.order(position, 300, 0) >= 250 for position in range(350)]
    # 28.6 % over an epoch, 5,000 of 24,904 source images in the paper: 28.7 %
    assert np.mean(drawn) == 100 / 350


def test_crops_of_the_reference_lie_on_a_diagonal():
    transform = training_transform((8, 8), max_class_ratio=1.0, flip=0.0, diagonal=True)
    values = np.arange(24 * 40).reshape(24, 40)
    image = np.stack([values // 40, values % 40, values * 0], -1).astype(np.uint8)
    corners = [transform(Example(image, None, ""), np.random.default_rng(seed)).image[0, 0, :2] for seed in range(20)]
    rows, columns = np.array(corners, float).T
    assert len(set(rows)) > 5 and np.abs(rows / 16 - columns / 32).max() < 0.05
