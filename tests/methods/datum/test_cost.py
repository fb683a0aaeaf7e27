"""What a personalisation costs: published counts, the real step, a batch that is too large."""

from pathlib import Path

import jax
import numpy as np
import pytest
import small_diffusion as small

from fmda import trees
from fmda.diffusion.draw import Graphs
from fmda.diffusion.schedule import ScheduleConfig
from fmda.errors import UserError
from fmda.methods.datum.cost import check_memory, plan, training
from fmda.methods.datum.dreambooth import make_objective
from fmda.methods.datum.settings import Config, LoraConfig, PriorConfig
from fmda.methods.kinds import open_run
from fmda.methods.lora import init_adapters
from fmda.methods.planning import GIB
from fmda.models.catalog import CATALOG, DiffusionConfig
from fmda.perf.flops import count_flops

SHAPES = DiffusionConfig(small.UNET, small.VAE, small.TEXT)
FULL = CATALOG["stable-diffusion-v1-4"].config
CONFIGS = sorted((Path(__file__).parents[3] / "configs" / "datum").glob("personalise-*.yaml"))


COUNTS = {
    "personalise-sd14-cityscapes": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "personalise-sd2": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
}


def config(**changes):
    return Config(**({"image": "target.png", "crop": 16, "resize": 16, "batch": 4} | changes))


@pytest.mark.slow
def test_the_plan_of_stable_diffusion_1_has_its_published_size():
    found = plan(Config(image="target.png"))
    assert dict(found.parameters) == {
        "unet": 859_520_964,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "trained": 982_581_444,
    }
    # 1783 GMAC a step
    assert found.flops[0][1] == pytest.approx(2 * 1783e9, rel=0.001)
    memory = dict(found.memory)
    assert memory["parameters"] == 4 * 982_581_444
    assert memory["frozen parameters"] == pytest.approx(4 * 83_653_863, rel=1e-5)
    assert memory["optimizer state"] == pytest.approx(8 * 982_581_444, rel=1e-6)
    text = found.text()
    # gradients and their clipped copy are more than the activations of one example
    assert "80 GB card: 18.61 of 74.51 GiB with one example a device; 17 fit at once" in text
    assert "v5e-8 slice: 8.58 of 16.00 GiB" in text
    for devices in (1, 4, 8):
        name = f"{devices} device{'s' if devices > 1 else ''}, fsdp={devices}, 1 on each at once"
        # one image is no batch for more devices
        assert (name if devices == 1 else f"{name} (batch={devices})") in text


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_published_configuration_plans(path):
    job = open_run(path)
    found = job.plan()
    parameters = dict(found.parameters)
    assert COUNTS.get(path.stem, {}).items() <= parameters.items() and parameters["trained"] > 0
    assert [name for name, _ in found.stages] == [stage.name for stage in job.stages()]


def test_cityscapes_is_planned_with_the_constants_of_the_paper():
    found = open_run(next(path for path in CONFIGS if "cityscapes" in path.name)).config
    optim = found.optim
    assert (optim.method, optim.schedule, optim.learning_rate, optim.warmup_steps) == ("adamw", "constant", 5e-6, 0)
    assert (optim.b1, optim.b2, optim.eps, optim.weight_decay) == (0.9, 0.999, 1e-8, 1e-2)
    assert (optim.no_decay, optim.clip_norm) == ((), 1.0)
    assert (found.resize, found.crop, found.batch, found.accumulate) == (1024, 512, 1, 1)
    assert (found.trained, found.prior, found.ema, found.precision) == ("unet+text", None, None, "float32")
    assert found.snapshot_steps == (200, 400, 600, 800, 1000) and found.export == (200,)
    assert (found.token, found.prompt) == ("sks", "a photo of a sks urban scene")


def traced(given, pictures):
    """FLOPs of the gradient of a whole batch, counted on the traced program."""
    nets = {"unet": small.unet(), "text_encoder": small.text_encoder(), "vae": small.vae()}
    graphs = Graphs(*(nets[part].graphdef for part in ("unet", "vae", "text_encoder")), ScheduleConfig(), 1.0)
    params = {part: nets[part].params for part in given.trained_parts}
    frozen = {"vae": nets["vae"].params}
    if given.trained == "lora":
        frozen |= params
        params = {part: init_adapters(jax.random.key(0), tree, given.lora.rank) for part, tree in params.items()}
    if "text_encoder" in params:
        frozen["ids"] = np.zeros((pictures, small.TEXT.context), np.int32)
    else:
        frozen["context"] = np.zeros((pictures, small.TEXT.context, small.TEXT.width), np.float32)
    rows = {"seed": np.zeros((given.batch, pictures), np.uint32)}
    if given.bank:
        rows["moments"] = np.zeros((given.batch, pictures, 8, 8, 8), np.float32)
    else:
        rows["pixels"] = np.zeros((given.batch, pictures, 16, 16, 3), np.uint8)
    return count_flops(jax.grad(lambda params: make_objective(graphs)(params, None, frozen, rows, None).loss), params)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"prior": PriorConfig()}, marks=pytest.mark.slow),
        pytest.param({"trained": "unet", "bank": 8}, marks=pytest.mark.slow),
        {"trained": "lora", "bank": 8},
    ],
    ids=["all", "prior", "unet-bank", "lora-bank"],
)
def test_flops_are_those_of_the_traced_step(changes):
    given = config(**changes)
    assert training(given, SHAPES).flops(given.batch) == traced(given, len(given.prompts))


@pytest.mark.slow
def test_memory_does_not_depend_on_what_is_computed_again():
    plain, again = (training(config(remat=remat), SHAPES) for remat in ("none", "blocks"))
    assert plain.flops(4) == again.flops(4)
    assert again.residuals(1) < plain.residuals(1) and again.need(64) < plain.need(64)
    # what is stored is divided over devices, activations are not
    one, eight = plain.memory(4, 1), plain.memory(4, 8)
    assert eight["parameters"] < one["parameters"] and eight["optimizer state"] < one["optimizer state"]
    assert plain.need(8) > plain.need(4) > plain.need(4, 8) > plain.need(1, 8)


def test_adapters_are_counted_and_their_networks_are_frozen():
    found = training(Config(image="x", trained="lora", lora=LoraConfig(rank=4)), FULL)
    widths = [320] * 5 + [640] * 5 + [1280] * 6
    unet = sum(4 * (6 * 2 * c + 2 * (c + 768)) for c in widths)
    assert trees.count(found.state.params) == unet + 12 * 4 * 4 * 2 * 768
    networks = {name: tree for name, tree in found.frozen.items() if name != "ids"}
    assert trees.size_bytes(networks) == 4 * (859_520_964 + 83_653_863 + 123_060_480)
    assert trees.size_bytes(found.state.opt) == pytest.approx(8 * trees.count(found.state.params), rel=1e-4)


def test_text_states_that_are_read_once_need_no_text_encoder():
    frozen = training(Config(image="x", trained="unet"), FULL).frozen
    assert set(frozen) == {"vae", "context"} and trees.size_bytes(frozen["vae"]) == 4 * 83_653_863


@pytest.mark.slow
def test_a_batch_that_is_too_large_is_refused_by_how_much():
    need, seven = (training(config(batch=64), SHAPES).need(rows) / GIB for rows in (8, 7))
    with pytest.raises(UserError) as caught:
        check_memory(config(batch=64, device_memory=need * 0.999), SHAPES)
    text = str(caught.value)
    assert text.startswith(f"batch: 64 needs about {need:.2f} GiB on each of 8 devices") and "\n" not in text
    assert "batch=56 fits" in text and seven < need * 0.999
    with pytest.raises(UserError, match="not even one example fits"):
        check_memory(config(batch=64, device_memory=1e-6), SHAPES)
    # what a device does not tell is not held against it
    check_memory(config(batch=1_000_000), SHAPES)


@pytest.mark.slow
def test_full_size_on_a_small_card_says_what_helps():
    with pytest.raises(UserError, match=r"8 devices, \d+\.\d+ GiB more than the 16\.00 GiB there; not even one"):
        check_memory(Config(image="x", batch=8, device_memory=16.0), FULL)


def test_an_unknown_model_has_a_plan_without_sizes():
    found = plan(Config(image="x", model="somebody/something"))
    assert found.parameters == () and "somebody/something" in found.notes[0]
