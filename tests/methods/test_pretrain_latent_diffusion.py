"""The small diffusion model's trainer: windows and their captions, the loss by hand, a run to a checkpoint."""

import functools
import json
import shutil

import jax
import numpy as np
import optax
import pytest
import small_diffusion
from PIL import Image

from fmda.diffusion.draw import SamplerConfig, make_draw
from fmda.diffusion.load import load_stable_diffusion
from fmda.diffusion.schedule import ScheduleConfig
from fmda.errors import UserError
from fmda.mesh import make_mesh
from fmda.methods.pretrain import latents
from fmda.methods.pretrain.crops import Scenes
from fmda.methods.pretrain.latent_diffusion import (
    Config,
    ModelConfig,
    load_networks,
    make_objective,
    plan,
    stages,
)
from fmda.methods.pretrain.latents import Latents, WindowConfig, caption_maker, write_latents
from fmda.methods.pretrain.tokenizer import train_tokenizer
from fmda.methods.pretrain.vae import signed
from fmda.models.clip import Clip, ClipConfig, TextConfig, VitConfig
from fmda.models.module import init
from fmda.runs.stages import run_stages
from fmda.train import OptimConfig, Outcome, create_state, make_step
from fmda.weights.load import load_vae
from fmda.weights.network import save
from fmda.world.captions import SYNONYMS, facts_of
from fmda.world.names import CLASSES

RNG = np.random.default_rng(0)
SIZE = 16
SAMPLER = SamplerConfig("ddim", 2, 3.0)
SKY, ROAD, CAR = (CLASSES.index(name) for name in ("sky", "road", "car"))


def draw_scenes(folder, count, side=64):
    """Writes rendered images of 32 x `side` pixels: sky over road, a car in the left quarter."""
    for part in ("images", "labels", "instances"):
        (folder / part).mkdir(parents=True)
    rows = []
    for index in range(count):
        labels = np.full((32, side), SKY, np.uint8)
        labels[16:] = ROAD
        instances = np.zeros((32, side), np.uint16)
        labels[10:26, : side // 4], instances[10:26, : side // 4] = CAR, 7
        image = (labels[..., None] * np.array([9, 5, 3]) + RNG.integers(0, 100, (32, side, 3))).astype(np.uint8)
        for part, pixels in (("images", image), ("labels", labels), ("instances", instances)):
            Image.fromarray(pixels).save(folder / part / f"{index:06}.png")
        named = {"domain": 0, "style": 0, "weather": 0, "time": 0, "street": 0}
        row = {"name": f"{index:06}", "domain": "game", "caption": "", "facts": facts_of(labels, instances, named)}
        rows.append(json.dumps(row) + "\n")
    (folder / "captions.jsonl").write_text("".join(rows))
    return str(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with scenes, held scenes, an autoencoder that halves the sides, and a CLIP with its tokenizer."""
    place = tmp_path_factory.mktemp("latent-diffusion")
    draw_scenes(place / "scenes", 4)
    draw_scenes(place / "held", 3)
    save("vae", place / "vae", small_diffusion.VAE, small_diffusion.vae().params)
    words = " ".join(word for name in CLASSES for word in (name, *SYNONYMS[name]))
    train_tokenizer([f"a photo of the video game in sunshine by day on the left {words}"] * 2, 600, place / "words")
    text = TextConfig(600, 32, 12, 1, 2, 24, eos_token_id=599, bos_token_id=598)
    config = ClipConfig(8, VitConfig(16, 8, 12, 1, 2, 24), text)
    params = init(lambda rngs: Clip(config, rngs=rngs), jax.random.key(0))
    save("clip", place / "clip", config, params, sorted((place / "words").iterdir()))
    return place


def small(place, **changes):
    given = dict(
        data=(str(place / "scenes"),), held=(str(place / "held"),), vae=str(place / "vae"), clip=str(place / "clip"),
        model=ModelConfig((8,), 1, (True,), (2,), 4), windows=WindowConfig(size=SIZE, count=2), steps=4, batch=8,
        optim=OptimConfig(learning_rate=1e-3), log_every=2, save_steps=2, check_images=16,
        check_sample=SAMPLER,
    )  # fmt: skip
    return Config(**(given | changes))


@pytest.fixture(scope="module")
def networks(place):
    return load_networks(small(place))


@pytest.fixture(scope="module")
def run(place):
    """The stages' folders of a finished run."""
    config = small(place)
    return run_stages(stages(config), place / "work", config, lambda _: None)


def recording(config, captions):
    """Returns the caption maker of windows; it appends the captions to a list."""

    def tokenize(texts):
        captions.extend(texts)
        return np.full((len(texts), 3), len(captions), np.int32)

    return caption_maker(config, tokenize)


def find(window, encoded):
    """Returns row and column, in latents, of a window that is a slice of the moments of an image."""
    side = len(window)
    rows, columns = (length - side + 1 for length in encoded.shape[:2])
    places = [
        (row, column)
        for row in range(rows)
        for column in range(columns)
        if np.array_equal(encoded[row : row + side, column : column + side], window)
    ]
    assert len(places) == 1
    return places[0]


def test_windows_are_slices_of_the_encoded_image_with_captions_of_what_is_in_them(place, tmp_path):
    config, captions, seen, vae = WindowConfig(SIZE, 12), [], set(), load_vae(place / "vae")
    roots = [place / "scenes"]
    assert write_latents(config, vae, recording(config, captions), roots, tmp_path, 0, "digest") == 2 * 12 * 4
    bank = Latents(tmp_path)
    assert bank.moments.shape == (96, 8, 8, 8) and bank.moments.dtype == np.float16 and len(captions) == 96
    assert bank.ids[:, 0].tolist() == list(range(1, 97)) and bank[5]["moments"].shape == (8, 8, 8)
    for number, scene in enumerate(Scenes(roots)):
        turned = [np.ascontiguousarray(scene["image"][:, ::step]) for step in (1, -1)]
        encoded = np.concatenate(vae.encode(signed(np.stack(turned))), axis=-1).astype(np.float16)
        for k in range(24):
            row = 24 * number + k
            top, left = (2 * at for at in find(bank.moments[row], encoded[k // 12]))
            labels = scene["labels"][:, :: 1 - 2 * (k // 12)]
            present = set(np.unique(labels[top : top + SIZE, left : left + SIZE]).tolist())
            absent = [name for index, name in enumerate(CLASSES) if index not in present and name != "sky"]
            caption = f" {captions[row].strip('.')} "
            named = [word for name in absent for word in (name, *SYNONYMS[name]) if f" {word} " in caption]
            # "a street" also captions an image of nothing in particular
            assert set(named) <= {"street"}, (captions[row], named)
            seen.add((top, left, CAR in present))
    tops, lefts, cars = (set(column) for column in zip(*seen, strict=True))
    assert tops == set(range(0, 17, 2)) and min(lefts) == 0 and max(lefts) == 48 and cars == {True, False}
    assert sum("car" in text for text in captions) > 10


def test_mirrored_windows_have_mirrored_captions(tmp_path):
    root, captions = draw_scenes(tmp_path / "square", 3, side=32), []
    config = WindowConfig(32, 40, prompted=0.0)
    write_latents(config, small_diffusion.vae(), recording(config, captions), [root], tmp_path, 0, "digest")
    plain = [text for k, text in enumerate(captions) if k % 80 < 40]
    mirrored = [text for k, text in enumerate(captions) if k % 80 >= 40]
    assert sum("the left" in text for text in plain) > 5 and not any("the right" in text for text in plain)
    assert sum("the right" in text for text in mirrored) > 5 and not any("the left" in text for text in mirrored)


def test_a_part_that_is_lost_comes_back_as_it_was(place, networks, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "PART", 2)
    config = small(place)
    captions = caption_maker(config.windows, networks.padded)

    def write(digest="digest", size=SIZE):
        window = WindowConfig(size, 2)
        return write_latents(window, networks.vae, captions, config.data, tmp_path / "bank", 1, digest)

    (tmp_path / "bank").mkdir()
    with pytest.raises(UserError, match="size: 15 of a .* is no window .*; choose a multiple of 2"):
        write(size=15)
    with pytest.raises(UserError, match="windows.size: 34 of a 32x64 image is no window of whole latents"):
        write(size=34)
    assert list((tmp_path / "bank").iterdir()) == []
    write()
    parts = {path.name: path.read_bytes() for path in (tmp_path / "bank").iterdir()}
    assert set(parts) == {"000000.npz", "000002.npz", "identity.json"}
    (tmp_path / "bank/000002.npz").unlink()
    times = (tmp_path / "bank/000000.npz").stat().st_mtime_ns
    write()
    assert {path.name: path.read_bytes() for path in (tmp_path / "bank").iterdir()} == parts
    assert (tmp_path / "bank/000000.npz").stat().st_mtime_ns == times
    with pytest.raises(UserError, match="bank: holds work of another .*; its latents come from other networks"):
        write("other")
    assert {path.name: path.read_bytes() for path in (tmp_path / "bank").iterdir()} == parts


@pytest.mark.parametrize("length", [0, 4, 3000])
def test_a_damaged_part_is_named(place, networks, tmp_path, length):
    config = small(place)
    captions = caption_maker(config.windows, networks.padded)
    write_latents(config.windows, networks.vae, captions, config.data, tmp_path, 0, "digest")
    path = tmp_path / "000000.npz"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"000000.npz: cannot be read \(.*\); delete it and .*stage.json, then run"):
        Latents(tmp_path)


@pytest.fixture(scope="module")
def batch(networks):
    mean, logvar = RNG.normal(size=(2, 3, 8, 8, 4))
    ids = networks.padded(["a car", "a road by day", "the sky"])
    return {"moments": np.concatenate([mean, logvar - 1], axis=-1).astype(np.float16), "ids": ids}


@pytest.fixture(scope="module")
def unet(networks):
    return small_diffusion.unet(networks.unet, seed=3)


@pytest.fixture(scope="module")
def frozen(networks):
    return {"text": networks.text.params, "empty": networks.padded([""])[0]}


@pytest.fixture(scope="module")
def losses(networks, unet):
    """Makes loss(params, frozen, batch, key) for a prediction and a share of dropped captions, compiled once each."""

    @functools.cache
    def make(prediction="epsilon", drop=0.0, min_snr=None):
        scale, text = networks.vae.config.scale, networks.text.graphdef
        objective = make_objective(unet.graphdef, text, ScheduleConfig(prediction=prediction), scale, drop, min_snr)
        return jax.jit(lambda params, *rest: objective(params, None, *rest).loss)

    return make


@pytest.mark.parametrize("min_snr", [None, 0.5])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_by_hand(networks, losses, unet, frozen, batch, prediction, min_snr):
    key = jax.random.key(4)
    keys = jax.random.split(key, 4)
    mean, logvar = np.split(batch["moments"].astype(np.float64), 2, axis=-1)
    first, noise = (np.asarray(jax.random.normal(k, mean.shape), np.float64) for k in keys[:2])
    clean = 0.5 * (mean + np.sqrt(np.exp(logvar)) * first)
    times = np.asarray(jax.random.randint(keys[2], (3,), 0, 1000))
    left = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[times][:, None, None, None]
    noisy = np.sqrt(left) * clean + np.sqrt(1 - left) * noise
    found = np.asarray(unet(noisy.astype(np.float32), times, networks.text(batch["ids"])), np.float64)
    target = noise if prediction == "epsilon" else np.sqrt(left) * noise - np.sqrt(1 - left) * clean
    # an error of the clean latents counts as much as there is signal, min_snr at most
    snr = left / (1 - left)
    of_clean = np.sqrt((1 - left) / left) if prediction == "epsilon" else np.sqrt(1 - left)
    error = (found - target) * (1 if min_snr is None else of_clean * np.sqrt(np.minimum(snr, min_snr)))
    value = float(losses(prediction, min_snr=min_snr)(unet.params, frozen, batch, key))
    assert value == pytest.approx((error**2).mean(), rel=1e-4)
    assert len(set(times.tolist())) == 3


@pytest.mark.parametrize(("drop", "masks"), [(1.0, {(True,) * 3}), (0.5, None)])
def test_dropped_captions_are_empty_ones(losses, unet, frozen, batch, drop, masks):
    found, differs = set(), []
    for seed in range(6):
        key = jax.random.key(seed)
        mask = np.asarray(jax.random.bernoulli(jax.random.split(key, 4)[3], drop, (3,)))
        emptied = {**batch, "ids": np.where(mask[:, None], frozen["empty"][None], batch["ids"])}
        value = float(losses(drop=drop)(unet.params, frozen, batch, key))
        assert value == pytest.approx(float(losses()(unet.params, frozen, emptied, key)), rel=1e-5)
        differs.append(abs(value - float(losses()(unet.params, frozen, batch, key))) > 1e-5)
        found.add(tuple(mask.tolist()))
    assert found == masks if masks else len(found) > 2
    assert any(differs)


@pytest.mark.slow
def test_the_loss_of_one_window_falls(losses, unet, frozen, batch):
    one = {"moments": np.zeros_like(batch["moments"]), "ids": np.repeat(batch["ids"][:1], 3, axis=0)}
    one["moments"][..., :4], one["moments"][..., 4:] = 1, -20
    tx, loss = optax.adam(1e-2), losses("v_prediction")
    step = jax.jit(make_step(lambda params, state, *rest: Outcome(loss(params, *rest), {}, {}), tx))
    state = create_state(unet.params, tx, teacher=False)
    for _ in range(40):
        state, _ = step(state, frozen, one, jax.random.key(0))
    before, after = (
        np.mean([loss(params, frozen, one, jax.random.key(seed)) for seed in range(20)])
        for params in (unet.params, state.params)
    )
    assert after < 0.6 * before


@pytest.mark.slow
def test_a_run_ends_in_a_checkpoint_that_loads_and_draws(place, run):
    model = load_stable_diffusion(run["export"] / "model")
    assert model.schedule.prediction == "v_prediction"
    assert model.unet.config.sample_size * model.vae.config.factor == SIZE
    assert model.vae.config.scale == small_diffusion.VAE.scale
    images = make_draw(model, SAMPLER, make_mesh())(["a car", "a road"] * 8, range(16))
    assert images.shape == (16, SIZE, SIZE, 3) and images.std() > 5
    summary = json.loads((run["export"] / "training.json").read_text())
    assert summary["config"]["vae"] == str(place / "vae") and summary["last"]["step"] == 4
    outputs = json.loads((run["export"] / "stage.json").read_text())["outputs"]
    assert outputs["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(model.unet.params))
    count = json.loads((run["latents"] / "stage.json").read_text())["outputs"]["windows"]
    assert count == len(Latents(run["latents"])) == 2 * 2 * 4


@pytest.mark.slow
def test_captions_are_padded_as_prompts_will_be(networks, run):
    model = load_stable_diffusion(run["export"] / "model")
    texts = ["", "a car", "a photo of the road by day"]
    ids = networks.padded(texts)
    np.testing.assert_array_equal(ids, model.tokenize(texts))
    assert ids.shape == (3, 32) and len(set(ids[0, 1:].tolist())) == 1
    bank = Latents(run["latents"])
    assert bank.ids.shape == (16, 32) and (bank.ids[:, 0] == ids[0, 0]).all()
    # a long caption is cut so that its end stays
    long = networks.padded(["a car " * 40])
    with pytest.warns(UserWarning, match="is longer than the 32 tokens"):
        np.testing.assert_array_equal(long, model.tokenize(["a car " * 40]))
    assert long[0, -1] == 599


@pytest.mark.slow
def test_the_text_tower_is_the_clips_without_its_projection(networks, run):
    model = load_stable_diffusion(run["export"] / "model")
    ids = networks.padded(["a car", "the sky"])
    assert "projection" in networks.clip.params["text"] and "projection" not in model.text_encoder.params
    found = model.text_encoder(ids)
    np.testing.assert_allclose(found, networks.text(ids), atol=3e-3 * np.abs(found).max())


@pytest.mark.slow
def test_the_check_draws_and_measures(run):
    quality = json.loads((run["check"] / "quality.json").read_text())
    assert quality["images"] == 16 and all(np.isfinite(quality[name]) for name in ("cmmd", "frechet", "diversity"))
    assert set(quality["caption_accuracy"]) == {"stated", "shuffled"}
    assert np.asarray(Image.open(run["check"] / "samples.png")).std() > 5


@pytest.mark.slow
def test_an_export_that_was_broken_off_goes_on(place, run, tmp_path):
    shutil.copytree(run["export"] / "model", tmp_path / "export/model")
    before = {path: path.read_bytes() for path in sorted((tmp_path / "export").rglob("*")) if path.is_file()}
    stages(small(place))[2].run(tmp_path / "export", run)
    assert (tmp_path / "export/training.json").read_bytes() == (run["export"] / "training.json").read_bytes()
    assert len(before) > 8 and {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_latents_of_other_networks_are_not_trained_on(place, run, tmp_path):
    shutil.copytree(place / "vae", tmp_path / "vae")
    save("vae", tmp_path / "vae", small_diffusion.VAE, small_diffusion.vae(seed=9).params)
    config = small(place, vae=str(tmp_path / "vae"))
    before = load_networks(small(place)).digest
    assert load_networks(config).digest != before
    for number, name in ((1, "train"), (2, "export")):
        with pytest.raises(UserError, match="latents: holds work of .*its latents come from other networks"):
            stages(config)[number].run(tmp_path / name, run)


def test_the_plan_counts_networks_and_memory_where_they_are_known(place):
    networks, config = load_networks(small(place)), small(place)
    known = plan(config)
    assert [name for name, _ in known.stages] == ["latents", "train", "export", "check"]
    text = sum(leaf.size for leaf in jax.tree.leaves(networks.text.params))
    assert dict(known.parameters)["text, frozen"] == text and dict(known.flops)["one window in training"] > 0
    memory = dict(known.memory)
    assert memory["optimizer state"] > 2 * memory["parameters"] and memory["average of parameters"]
    unknown = plan(small(place, vae="@vae/export", held=()))
    assert "vae: @vae/export is not on this machine yet" in unknown.text() and not unknown.memory
    assert [name for name, _ in unknown.stages] == ["latents", "train", "export"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": WindowConfig(size=17)}, "windows.size: 17 is no multiple of 2, the pixels of the UNet's coarsest"),
        ({"model": ModelConfig((8, 8), 1, (True, True), (2, 2), 4), "windows": WindowConfig(size=18)},
         "windows.size: 18 is no multiple of 4"),
        ({"vae": "nowhere"}, "nowhere: no such folder"),
        ({"clip": "street-dino"}, "street-dino"),
    ],
)  # fmt: skip
def test_networks_that_do_not_fit_are_named(place, changes, message):
    with pytest.raises(UserError, match=message):
        load_networks(small(place, **changes))


def test_values_that_cannot_be_are_named(place, tmp_path):
    with pytest.raises(UserError, match="model: channels, attention and heads name different numbers of levels"):
        ModelConfig((8, 16), 1, (True,), (2, 2), 4)
    with pytest.raises(UserError, match="model: heads and groups must divide the channels"):
        ModelConfig((8,), 1, (True,), (3,), 4)
    with pytest.raises(UserError, match="scenes is also in data; name other folders"):
        small(place, held=(str(place / "scenes"),))
    shutil.copytree(place / "clip", tmp_path / "clip")
    for path in (tmp_path / "clip").iterdir():
        if path.name not in ("config.json", "model.safetensors", "preprocessor_config.json"):
            path.unlink()
    with pytest.raises(UserError, match="holds no tokenizer; name a CLIP with its tokenizer files"):
        load_networks(small(place, clip=str(tmp_path / "clip")))
