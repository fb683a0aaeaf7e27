"""Kind `uda`: from two folders of images to a segmenter; resume, several devices, refusals."""

import json
import os
import random
import shutil
import time

import jax
import jax.numpy as jnp
import meeting
import numpy as np
import pytest
import small_diffusion
import small_place
from launched import finish, last_step, launch, steps_and_losses
from PIL import Image

from fmda import trees
from fmda.errors import UserError
from fmda.evaluate import Segmenter
from fmda.mesh import make_mesh, replicate, shard_batch
from fmda.methods.kinds import open_run
from fmda.methods.uda.dann import DannConfig
from fmda.methods.uda.entropy import EntropyConfig
from fmda.methods.uda.mmd import MmdConfig
from fmda.methods.uda.network import Network, NetworkConfig
from fmda.methods.uda.objective import DistanceConfig, LearnConfig, init_adversary, make_objective
from fmda.methods.uda.output_adversarial import OutputAdversarialConfig
from fmda.methods.uda.run import make_task
from fmda.methods.uda.self_training import SelfTrainingConfig, initial_aux, teacher_decay
from fmda.methods.uda.style import StyleConfig
from fmda.models.mit import Mit, MitConfig
from fmda.models.module import init
from fmda.train import OptimConfig, create_state, make_optimizer, make_step
from fmda.train.checkpoints import read_params
from fmda.weights.load import load_mit, load_segmentation
from fmda.weights.network import save

CONFIG = """kind: uda
data: {name: folder, root: data, split: train}
target: {name: folder, root: data, split: val}
val: {name: folder, root: data, split: val}
network: {family: segformer, encoder: mit}
learn: {self_training: {border: [2, 6, 2, 2]}, distance: {things: [1]}}
crop: 32
rare_pixels: 10
batch: 8
steps: 4
log_every: 1
save_steps: 2
evaluate_steps: 2
best: val/miou
optim: {learning_rate: 0.001, warmup_steps: 0}
"""
TINY = MitConfig(widths=(8, 8, 8, 8), depths=(1, 1, 1, 1), heads=(1, 1, 2, 2))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a Mix Transformer, labelled images and the configuration."""
    place = tmp_path_factory.mktemp("uda")
    save("mit", place / "mit", TINY, init(lambda rngs: Mit(TINY, rngs=rngs), jax.random.key(0)))
    small_place.draw_labelled(place / "data")
    (place / "run.yaml").write_text(CONFIG)
    return place


@pytest.fixture(autouse=True)
def at_the_place(place, monkeypatch):
    monkeypatch.chdir(place)


def execute(place, work, *overrides):
    open_run(place / "run.yaml", [f"work_dir={place / work}", *overrides]).execute(lambda _: None)
    return place / work


@pytest.fixture(scope="module")
def run(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return execute(place, "run")


def rows(run):
    return [json.loads(line) for line in (run / "train/metrics.jsonl").read_text().splitlines()]


def test_a_run_adapts_and_gives_a_segmenter(place, run):
    logged = [row for row in rows(run) if "loss" in row]
    assert {"loss_source", "loss_mixed", "loss_distance", "confident", "teacher_decay"} <= set(logged[0])
    assert logged[0]["teacher_decay"] == 0 and logged[1]["teacher_decay"] == pytest.approx(0.5)
    outputs = json.loads((run / "export/stage.json").read_text())["outputs"]
    scores = {row["step"]: row["val/miou"] for row in rows(run) if "val/miou" in row}
    # weights and running statistics of the same checkpoint: what was scored in training is what is exported
    assert json.loads((run / "score/stage.json").read_text())["outputs"]["miou"] == pytest.approx(
        scores[outputs["step"]], abs=1e-6
    )
    segmenter = Segmenter.load(run)
    assert segmenter.predict(place / "data/val/images/0.png").labels.shape == (32, 48)
    assert segmenter.classes.names == ("road", "car", "sky")
    assert float(read_params(run / "train", "aux")["shares"].sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_an_interrupted_run_ends_in_the_same_bytes(place, run, tmp_path):
    work = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(work / "train/checkpoints/4")
    for name in ("train", "export", "score"):
        (work / name / "stage.json").unlink()
    (work / "export/network/model.safetensors").unlink()
    open_run(place / "run.yaml", [f"work_dir={work}"]).execute(lambda _: None)
    weights = "export/network/model.safetensors"
    assert (work / weights).read_bytes() == (run / weights).read_bytes()


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_in_the_same_bytes(place, run):
    # the devices and the compiled programs of this process
    shared = {"JAX_NUM_CPU_DEVICES": "8", "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"]}
    moments, work = random.Random(2), place / "killed"
    for step in (1, 3):
        process = launch(place, "killed", "save_steps=1", **shared)
        while last_step(work) < step and process.poll() is None:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        assert process.wait(timeout=60) == -9
    finish(place, "killed", "save_steps=1", **shared)
    assert "resuming at step" in (place / "killed.log").read_text()
    weights = "export/network/model.safetensors"
    assert (work / weights).read_bytes() == (run / weights).read_bytes()
    # the losses of each step are those of its images: both streams stand where they stood
    assert steps_and_losses(work) == steps_and_losses(run)
    mine, yours = (json.loads((one / "train/checkpoints/4/data/metadata").read_text()) for one in (work, run))
    assert mine["position"] == yours["position"]


@pytest.mark.slow
def test_two_processes_score_what_one_does(place):
    joined = {"FMDA_COORDINATOR": f"localhost:{meeting.free_port()}", "FMDA_PROCESSES": "2"}
    options = ["batch=2", "steps=1", "save_steps=1", "evaluate_steps=1", "best=null"]
    pair = [launch(place, "two", *options, "--processes", FMDA_PROCESS=number, **joined) for number in "01"]
    codes = [process.wait(timeout=900) for process in pair]
    assert codes == [0, 0], "\n".join((place / f"two{number}.log").read_text() for number in "01")
    scores = {name: value for row in rows(place / "two") for name, value in row.items()}
    # the last stage scores the export in one process
    outputs = json.loads((place / "two/score/stage.json").read_text())["outputs"]
    assert outputs["miou"] == pytest.approx(scores["val/miou"], abs=1e-6) and scores["target/certainty"] > 0


@pytest.mark.slow
def test_source_only_and_then_one_image_from_there(place):
    first = execute(place, "source", "target=null", "learn.self_training=null", "steps=2")
    assert not any("loss_mixed" in row for row in rows(first))
    second = execute(
        place,
        "one-shot",
        f"network.start={first / 'export'}",
        "learn={self_training: {}}",
        'target.only=["0"]',
        "steps=1",
    )
    # a teacher that is the student of before
    begun = load_segmentation(first / "export/network")
    teacher = read_params(second / "train", "teacher")
    whole = trees.flatten(begun.params)
    for path, leaf in trees.flatten(teacher).items():
        np.testing.assert_array_equal(leaf, whole[path], err_msg=path)


@pytest.mark.slow
def test_hrda_trains_and_is_scored_in_windows(place):
    run = execute(
        place, "hrda", "network={family: hrda, encoder: mit}", "crop=64", "target.resize=[96, 64]", "steps=1",
        "learn={self_training: {masked: 1.0}, distance: {things: [1]}}", "save_steps=1", "best=null",
        "protocol={size: [64, 128], crop: 64, stride: 32}", "evaluate_steps=0",
    )  # fmt: skip
    assert {"loss_source", "loss_mixed", "loss_masked", "loss_distance"} <= set(rows(run)[0])
    assert load_segmentation(run / "export/network").family == "hrda"
    assert Segmenter.load(run).predict(place / "data/val/images/0.png").labels.shape == (32, 48)


# AdamW would enlarge the rounding errors of parameters without a gradient, hence its epsilon; a rate of 0.01 those of
# each step: where a pixel changes its pseudo-label or a unit its sign, two programs part, on one device too
@pytest.mark.slow
def test_eight_devices_take_the_steps_of_one(place):
    learn = LearnConfig(
        SelfTrainingConfig(), DistanceConfig(things=(1,)), mmd=MmdConfig(per_class=True, threshold=0.4),
        dann=DannConfig(width=4), output_adversarial=OutputAdversarialConfig(width=2), entropy=EntropyConfig(),
        style=StyleConfig(share=0.1),
    )  # fmt: skip
    network = Network(NetworkConfig(family="segformer", encoder="mit"), 3)
    tx = make_optimizer(OptimConfig("adamw", 0.001, eps=0.1), 10)
    step = make_step(
        make_objective(network.graphdef, 3, learn, steps=10), tx, teacher_decay=teacher_decay(0.999),
        teacher_when="before",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 8, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 3, (8, 4, 4), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    batch = {"source": {"image": images[0], "labels": labels}, "target": {"image": images[1]}}
    params = network.init(jax.random.key(0))
    params |= init_adversary(learn, jax.random.key(1), network.channels(32), 3)
    frozen = {"encoder": jax.tree.map(lambda leaf: 0.9 * leaf, params["encoder"])}

    def ten(mesh):
        state = create_state(params, tx, aux=initial_aux(network.statistics(), 3))
        given = (state, frozen, batch)
        if mesh:
            given = (replicate(state, mesh), replicate(frozen, mesh), shard_batch(batch, mesh))
        state, *rest = given
        take = jax.jit(step)
        for _ in range(10):
            state, metrics = take(state, *rest, jax.random.key(1))
        return jax.device_get((state.params, state.teacher, state.aux, metrics))

    begun = trees.flatten(params)
    one, eight = ten(None), ten(make_mesh())
    assert any(np.abs(leaf - begun[path]).max() > 1e-4 for path, leaf in trees.flatten(one[0]).items())
    for ours, theirs in zip(*map(jax.tree.leaves, (one, eight)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * max(1, np.abs(ours).max()))


def test_faults_are_found_before_the_first_stage(place):
    for overrides, words in (
        (["target.split=night"], "night"),
        (['target.only=["9"]'], "no image '9'"),
        (["network.encoder=null"], "'segformer' needs one"),
        (["val.class_map=cityscapes-to-camvid"], "cityscapes"),
        (["learn.self_training.threshold=1.5"], "threshold"),
        (["target=null"], "learn.self_training: needs images of the target"),
        (["target=null", "learn={self_training: null, entropy: {}}"], "learn.entropy: needs images of the target"),
        (["learn={style: {method: adain}}"], "learn.style.autoencoder: the method 'adain' needs one"),
        (["learn={style: {method: adain, autoencoder: street-diffusion}}", "crop=30"], "crop: 30 is no multiple"),
        (["learn={output_adversarial: {}}", "crop=24"], "crop: 24 is below 32"),
        (["network.fixed_attention=0.5"], "network.fixed_attention: is of a new network of family 'hrda'"),
        (["network.family=hrda"], "crop: 32 is no multiple of 64, which 'hrda' needs"),
    ):
        with pytest.raises(UserError, match=words):
            execute(place, "refused", *overrides)
        assert not (place / "refused/train").exists()


@pytest.mark.slow
def test_every_family_at_once_exports_the_network_alone(place):
    save("vae", place / "vae", small_diffusion.VAE, small_diffusion.vae().params)
    style = "{method: adain, autoencoder: vae}"
    levels = "{auxiliary: {}}"
    terms = f"{{mmd: {{}}, dann: {{}}, output_adversarial: {levels}, entropy: {{}}, style: {style}, distance: null}}"
    work = execute(place, "families", f"learn={terms}", "best=null", "steps=2", 'optim.multipliers={"adversary/*": 2}')
    logged = [row for row in rows(work) if "loss" in row]
    assert {"loss_mmd", "loss_dann", "loss_adversarial", "loss_auxiliary_adversarial", "loss_entropy"} <= set(logged[0])
    assert set(read_params(work / "train", "params")) == {"encoder", "head", "adversary"}
    assert set(load_segmentation(work / "export/network").params) == {"encoder", "head"}


def test_generated_targets_of_differing_sizes_are_cropped_and_smaller_ones_refused(place, tmp_path):
    folder = tmp_path / "set/images"
    folder.mkdir(parents=True)
    overrides = [f"target.root={tmp_path / 'set'}", "target.split=train"]
    with pytest.raises(UserError, match="no images of 'folder', split 'train'"):
        execute(place, "refused", *overrides)
    for name, size in (("a", (40, 32)), ("b", (64, 48))):
        Image.fromarray(np.full((*size[::-1], 3), 9, np.uint8)).save(folder / f"{name}.png")
    job = open_run(place / "run.yaml", overrides)
    job.check()
    target = job.config.target.open()
    streams = make_task(job.config, Network(job.config.network, 3), target, target).streams
    assert streams["target"].rows(range(8), 0)["image"].shape == (8, 32, 32, 3)
    Image.fromarray(np.zeros((24, 48, 3), np.uint8)).save(folder / "c.png")
    with pytest.raises(UserError, match=r"c.png: has 48x24 pixels, less than a crop of 32; lower crop or enlarge"):
        execute(place, "refused", *overrides)
    open_run(place / "run.yaml", [*overrides, "target.resize=[96,48]"]).check()


def test_a_broken_target_image_is_left_out_only_where_that_is_asked(place, tmp_path):
    folder = tmp_path / "set/images"
    folder.mkdir(parents=True)
    for name in "ab":
        Image.fromarray(np.zeros((32, 40, 3), np.uint8)).save(folder / f"{name}.png")
    (folder / "b.png").write_bytes(b"no image")
    overrides = [f"target.root={tmp_path / 'set'}", "target.split=train"]
    with pytest.raises(UserError, match=r"b\.png: not an image file"):
        open_run(place / "run.yaml", overrides).check()
    job = open_run(place / "run.yaml", [*overrides, "target.skip_broken=true"])
    job.check()
    assert [item.name for item in job.config.target.open().items] == ["a"]


def test_the_plan_needs_neither_the_encoder_nor_the_data_of_known_names(place):
    known = ["data={name: gta5}", "network={family: segformer, encoder: nvidia/mit-b0}", "batch=2"]
    assert dict(open_run(place / "run.yaml", known).plan().parameters)["encoder"] == 3_319_392
    plan = open_run(place / "run.yaml", ["network.encoder=someone/unknown"]).plan()
    assert not plan.parameters and "someone/unknown is not on this machine yet" in plan.notes[0]


def test_other_classes_need_a_new_head(place, run):
    with pytest.raises(UserError, match="has 3 classes, the source 5; set network.new_head=true"):
        Network(NetworkConfig(start=str(run / "export")), 5)
    anew = Network(NetworkConfig(start=str(run / "export"), new_head=True), 5)
    assert set(anew.weights) == {"encoder"} and anew.config.classes == 5


def test_the_distance_is_to_the_encoder_that_is_named(place, run):
    trained, untrained = (trees.flatten(net["encoder"]) for net in encoders(place, run))
    for named, expected in (("null", trained), (place / "mit", untrained)):
        overrides = [f"network.start={run / 'export'}", f"learn.distance.encoder={named}"]
        config = open_run(place / "run.yaml", overrides).config
        data = config.data.open()
        task = make_task(config, Network(config.network, 3), data, data)
        for path, leaf in trees.flatten(task.frozen["encoder"]).items():
            np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    assert any((trained[path] != untrained[path]).any() for path in trained)


def encoders(place, run):
    """Returns the trees of the network that `run` exported, and of one with the encoder that it began from."""
    return load_segmentation(run / "export/network").params, {"encoder": load_mit(place / "mit").params}


def test_an_encoder_of_another_size_is_refused(place, tmp_path):
    wide = MitConfig(widths=(16, 8, 8, 8), depths=(1, 1, 1, 1), heads=(1, 1, 2, 2))
    save("mit", tmp_path, wide, init(lambda rngs: Mit(wide, rngs=rngs), jax.random.key(0)))
    with pytest.raises(UserError, match=r"learn.distance.encoder: .* is of another size"):
        execute(place, "other-size", f"learn.distance.encoder={tmp_path}")
    assert not (place / "other-size").exists()


def test_the_plan_counts_both_networks(place):
    job = open_run(place / "run.yaml")
    plan = job.plan()
    assert job.flops() == pytest.approx(plan.flops[0][1] * 8 * 4)
    counts = dict(plan.parameters)
    assert counts["trained"] == counts["encoder"] + counts["head"]
    assert counts["encoder, frozen"] == counts["encoder"]
    assert [name for name, _ in plan.stages] == ["train", "export", "score"]
    assert jnp.isfinite(plan.flops[0][1])
