"""The autoencoder's trainer: crops, the loss by hand, a run from images to a checkpoint that others open."""

import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmda.errors import UserError
from fmda.methods.pretrain.dino_views import ImageFolders
from fmda.methods.pretrain.vae import Config, Crop, make_objective, measured_scale, plan, signed, stages
from fmda.models.sd_vae import VaeConfig
from fmda.perf.flops import count_flops
from fmda.runs.stages import run_stages
from fmda.train import OptimConfig
from fmda.weights.checkpoint import network_graph
from fmda.weights.load import load_vae

MODEL = VaeConfig(channels=(8, 12), layers=1, latent_channels=3, groups=4, sample_size=32)
RNG = np.random.default_rng(0)


def draw_images(folder, sizes):
    """Writes images of smooth colours with noise."""
    (folder / "images").mkdir(parents=True)
    for number, (height, width) in enumerate(sizes):
        rows, columns = np.mgrid[:height, :width]
        smooth = np.stack([rows * 200 / height, columns * 200 / width, (rows + columns) % 100], axis=-1)
        image = (smooth + RNG.integers(0, 50, smooth.shape)).astype(np.uint8)
        cv2.imwrite(str(folder / f"images/{number}.png"), image)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images to train on, and held ones of several sizes."""
    place = tmp_path_factory.mktemp("vae")
    draw_images(place / "photo", [(32, 48)] * 4)
    draw_images(place / "held", [(32, 48), (21, 33), (32, 48)])
    return place


def small(place, **changes):
    given = dict(
        data=(str(place / "photo"),), held=(str(place / "held"),), model=MODEL, crop=16, steps=3, batch=8,
        optim=OptimConfig(learning_rate=1e-2), log_every=1, save_steps=2,
    )  # fmt: skip
    return Config(**(given | changes))


@pytest.fixture(scope="module")
def run(place):
    """The stages' folders of a finished run."""
    config = small(place)
    return run_stages(stages(config), place / "work", config, lambda _: None)


def test_crops_lie_inside_the_picture_at_its_scale_and_half_are_mirrored():
    rows, columns = np.mgrid[:20, :27]
    image = np.stack([rows, columns, rows + columns], axis=-1).astype(np.uint8)
    cut = [Crop(16)(image, np.random.default_rng(seed))["pixels"] for seed in range(200)]
    places = set()
    for crop in cut:
        mirrored = crop[0, 0, 1] > crop[0, 1, 1]
        plain = crop[:, ::-1] if mirrored else crop
        top, left = int(plain[0, 0, 0]), int(plain[0, 0, 1])
        np.testing.assert_array_equal(plain, image[top : top + 16, left : left + 16])
        places.add((top, left, bool(mirrored)))
    assert {top for top, _, _ in places} == set(range(5)) and {left for _, left, _ in places} == set(range(12))
    assert 80 < sum(crop[0, 0, 1] > crop[0, 1, 1] for crop in cut) < 120


def test_a_picture_that_the_crop_just_fits_is_taken_whole():
    image = RNG.integers(0, 255, (16, 16, 3), dtype=np.uint8)
    crop = Crop(16)(image, np.random.default_rng(1))["pixels"]
    assert np.array_equal(crop, image) or np.array_equal(crop, image[:, ::-1])
    with pytest.raises(UserError, match="crop: 17 pixels, but an image is 16x16; choose a smaller crop"):
        Crop(17)(image, np.random.default_rng(1))


def test_pictures_are_brought_to_minus_one_to_one():
    assert np.asarray(signed(np.array([0, 51, 255], np.uint8))).tolist() == [-1.0, pytest.approx(-0.6), 1.0]


def test_the_loss_by_hand_on_a_net_that_always_answers_the_same():
    graphdef, shapes = network_graph("vae", MODEL)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    mean, logvar, colour = np.array([0.5, -1.0, 2.0]), np.array([-2.0, 0.0, 1.0]), np.array([0.25, -0.5, 0.75])
    params["quant"]["bias"] = jnp.asarray(np.concatenate([mean, logvar]), jnp.float32)
    params["decoder"]["conv_out"]["bias"] = jnp.asarray(colour, jnp.float32)
    pixels = RNG.integers(0, 256, (2, 8, 12, 3), dtype=np.uint8)
    objective = jax.jit(make_objective(graphdef, edges=0.5, kl=0.01))
    value, metrics, _ = objective(params, None, {}, {"pixels": pixels}, jax.random.key(0))
    error = colour - (pixels / 127.5 - 1)
    assert float(metrics["pixel_error"]) == pytest.approx(np.abs(error).mean(), rel=1e-5)
    down, across = np.abs(error[:, 1:] - error[:, :-1]).mean(), np.abs(error[:, :, 1:] - error[:, :, :-1]).mean()
    assert float(metrics["edge_error"]) == pytest.approx(down + across, rel=1e-5)
    divergence = (0.5 * (mean**2 + np.exp(logvar) - 1 - logvar)).mean()
    assert float(metrics["kl"]) == pytest.approx(divergence, rel=1e-5)
    whole = np.abs(error).mean() + 0.5 * (down + across) + 0.01 * divergence
    assert float(value) == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
def test_a_run_ends_in_a_checkpoint_whose_latents_have_deviation_one(place, run):
    vae = load_vae(run["export"])
    assert vae.config == VaeConfig(**{**MODEL.__dict__, "scale": vae.config.scale})
    images = [image for image in ImageFolders([place / "photo"])]
    means = [np.asarray(vae.encode(signed(image)[None])[0]) for image in images]
    assert np.std(np.concatenate(means) * vae.config.scale) == pytest.approx(1.0, rel=2e-3)
    outputs = json.loads((run["export"] / "stage.json").read_text())["outputs"]
    count = sum(leaf.size for leaf in jax.tree.leaves(vae.params))
    assert outputs == {"scale": vae.config.scale, "parameters": count}
    summary = json.loads((run["export"] / "training.json").read_text())
    assert summary["last"]["step"] == 3 and summary["config"]["crop"] == 16


@pytest.mark.slow
def test_the_decoder_sees_latents_drawn_from_the_posterior(run):
    vae, pixels = load_vae(run["export"]), RNG.integers(0, 256, (1, 32, 48, 3), dtype=np.uint8)
    objective = jax.jit(make_objective(vae.graphdef, edges=0.0, kl=0.0))
    mean, logvar = (np.asarray(part, np.float64) for part in vae.encode(signed(pixels)))
    values = []
    for seed in (5, 6):
        drawn = mean + np.exp(logvar / 2) * np.asarray(jax.random.normal(jax.random.key(seed), mean.shape))
        error = np.asarray(vae.decode(drawn.astype(np.float32))) - (pixels / 127.5 - 1)
        value, *_ = objective(vae.params, None, {}, {"pixels": pixels}, jax.random.key(seed))
        assert float(value) == pytest.approx(np.abs(error).mean(), rel=1e-4)
        values.append(float(value))
    assert abs(values[0] - values[1]) > 1e-5


@pytest.mark.slow
def test_the_scale_is_measured_on_pictures_of_any_size(place, run):
    vae = load_vae(run["export"])
    images = [image[: len(image) // 2 * 2, : image.shape[1] // 2 * 2] for image in ImageFolders([place / "held"])]
    latents = [np.asarray(vae.encode(signed(image)[None])[0]).ravel() for image in images]
    scale = measured_scale(vae, ImageFolders([place / "held"]), seed=0)
    assert scale == pytest.approx(1 / np.std(np.concatenate(latents)), rel=1e-3)


@pytest.mark.slow
def test_the_metrics_are_the_parts_of_a_falling_loss(run):
    lines = [json.loads(line) for line in (run["train"] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[2]["loss"] < lines[0]["loss"]
    for line in lines:
        whole = line["pixel_error"] + 0.5 * line["edge_error"] + 1e-4 * line["kl"]
        assert line["loss"] == pytest.approx(whole, rel=1e-4)


@pytest.mark.slow
def test_the_check_measures_and_shows_held_pictures(place, run):
    vae, held = load_vae(run["export"]), str(place / "held")
    found = json.loads((run["check"] / "reconstruction.json").read_text())[held]["psnr"]
    decibels, shown = [], []
    for image in ImageFolders([held]):
        image = image[: len(image) // 2 * 2, : image.shape[1] // 2 * 2]
        again = np.asarray(vae.decode(vae.encode(signed(image)[None])[0]))[0] * 127.5 + 127.5
        again = np.floor(np.clip(again + 0.5, 0, 255)).astype(np.uint8)
        decibels.append(20 * np.log10(255 / np.sqrt(((again.astype(float) - image) ** 2).mean())))
        if image.shape == (32, 48, 3):
            shown.append(np.concatenate([image, again], axis=1))
    assert found == pytest.approx(np.mean(decibels), abs=0.02)
    sheet = cv2.imread(str(run["check"] / "0-held.png"))[..., ::-1].astype(int)
    assert sheet.shape == (64, 96, 3) and np.abs(sheet - np.concatenate(shown)).max() <= 1


@pytest.mark.parity
def test_diffusers_opens_the_export_and_computes_the_same(run):
    import torch
    from diffusers import AutoencoderKL

    ours, theirs = load_vae(run["export"]), AutoencoderKL.from_pretrained(run["export"]).float().eval()
    images = RNG.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        posterior = theirs.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latent_dist
        mean, logvar = ours.encode(images)
        images = theirs.decode(posterior.mean).sample.numpy().transpose(0, 2, 3, 1)
        again = ours.decode(mean)
    for found, expected in ((mean, posterior.mean), (logvar, posterior.logvar)):
        expected = expected.numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(again, images, rtol=0, atol=1e-4 * np.abs(images).max())
    assert theirs.config.scaling_factor == ours.config.scale


def test_the_plan_holds_parameters_and_flops(place):
    config = small(place, held=())
    found = plan(config)
    assert [name for name, _ in found.stages] == ["train", "export"]
    graphdef, shapes = network_graph("vae", MODEL)
    outer = sum(leaf.size for part in ("quant", "post_quant") for leaf in jax.tree.leaves(shapes[part]))
    parameters = dict(found.parameters)
    assert parameters["trained"] == sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert parameters["encoder"] + parameters["decoder"] + outer == parameters["trained"]

    def both(params, images):
        return make_objective(graphdef, 0.5, 1e-4)(params, None, {}, {"pixels": images}, jax.random.key(0)).loss

    pixels = jax.ShapeDtypeStruct((config.batch, 16, 16, 3), np.uint8)
    counted = count_flops(jax.grad(both), shapes, pixels) / config.batch
    assert dict(found.flops)["one crop in training"] == counted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": 15}, "crop: 15 is no multiple of 2, the pixels of a latent's side"),
        ({"crop": 0}, "crop: 0 is no multiple of 2"),
        ({"held": ("anywhere/photo",)}, "held: anywhere/photo is also in data; name other folders"),
    ],
)
def test_values_that_cannot_be_are_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        Config(**({"data": ("anywhere/photo",), "model": MODEL} | changes))


def test_missing_pictures_are_one_line_and_leave_nothing(tmp_path):
    with pytest.raises(UserError, match="photo: no images there"):
        run_stages(stages(small(tmp_path, held=())), tmp_path / "work", {}, lambda _: None)
    assert not (tmp_path / "work").exists()
