"""The CLIP trainer: truthful captions, tags, a run from images to a checkpoint that loads."""

import json
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

from fmda.data import templates
from fmda.errors import UserError
from fmda.methods.pretrain.clip import Config, also_true, stages
from fmda.methods.pretrain.crops import TAGS, CropConfig, Crops, Scenes, spoiled
from fmda.methods.pretrain.prompts import LOOKS, fitting, looks_of, needs
from fmda.models.clip import ClipConfig, TextConfig, VitConfig
from fmda.runs.stages import run_stages
from fmda.train import OptimConfig
from fmda.weights.load import load_clip
from fmda.world.captions import facts_of
from fmda.world.names import CLASSES, STYLES

BANK = templates("imagenet80")


def drawn(folder: Path, count: int = 6) -> Path:
    """A folder in the layout of rendered images: sky over road, a car in the middle."""
    rng = np.random.default_rng(0)
    for part in ("images", "labels", "instances"):
        (folder / part).mkdir(parents=True)
    rows = []
    for index in range(count):
        labels = np.full((48, 96), CLASSES.index("sky"), np.uint8)
        labels[24:] = CLASSES.index("road")
        instances = np.zeros((48, 96), np.uint16)
        labels[20:34, 30:60], instances[20:34, 30:60] = CLASSES.index("car"), 7
        image = (labels[..., None] * np.array([9, 5, 3]) + rng.integers(0, 30, (48, 96, 3))).astype(np.uint8)
        name = f"{index:06}"
        for part, pixels in (("images", image), ("labels", labels), ("instances", instances)):
            cv2.imwrite(str(folder / part / f"{name}.png"), pixels)
        named = {"domain": 0, "style": index % 2, "weather": 0, "time": index % 3, "street": 0}
        rows.append({"name": name, "domain": "game", "caption": "", "facts": facts_of(labels, instances, named)})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def small(root: Path, **changes) -> Config:
    model = ClipConfig(
        embed_dim=16,
        vision=VitConfig(16, 8, 16, 1, 2, 32, "quick_gelu"),
        text=TextConfig(600, 24, 16, 1, 2, 32, "quick_gelu"),
    )
    given = dict(
        data=(str(root),), model=model, crop=CropConfig(size=16), vocabulary=600, steps=4, batch=32, crops=4,
        optim=OptimConfig(learning_rate=1e-3), log_every=2, save_steps=2,
    )  # fmt: skip
    return Config(**(given | changes))


def test_templates_describe_images_that_match_them():
    night = looks_of("photo", "clear", "night")
    texts = [BANK[i] for i in fitting(BANK, night)]
    assert "a dark photo of a {}." in texts and "a photo of a {}." in texts
    assert "a bright photo of a {}." not in texts and "a painting of a {}." not in texts
    painted = [BANK[i] for i in fitting(BANK, looks_of("painting", "clear", "day"))]
    assert "a painting of the {}." in painted and "art of the {}." in painted
    assert not any("photo" in text for text in painted)


def test_every_template_can_be_true_and_every_style_has_looks():
    assert all(needs(template) <= set(LOOKS) for template in BANK)
    assert all(looks_of(style, "clear", "day") for style in STYLES)
    reachable = set().union(*(looks_of(s, w, t) for s in STYLES for w in ("clear", "fog", "rain", "snow")
                              for t in ("day", "dusk", "night")))  # fmt: skip
    reachable |= {"close", "large", "small", "tiny", "cut", "many", "single"}
    assert not [template for template in BANK if needs(template) and not needs(template) & reachable]


def test_captions_state_only_what_is_present(tmp_path):
    scenes = Scenes([drawn(tmp_path / "game")])
    captions_drawn = []
    record = lambda t: captions_drawn.extend(t) or np.zeros((len(t), 4))  # noqa: E731
    crops = Crops(CropConfig(size=16, noise=0.0, prompted=1.0), BANK, record, 16, 2)
    batch = crops(scenes[0], np.random.default_rng(1))
    assert batch["pixels"].shape == (16, 16, 16, 3) and batch["pixels"].dtype == np.uint8
    assert batch["present"].shape == batch["stated"].shape == (16, len(TAGS))
    own = also_true(batch["present"], batch["stated"])
    assert np.asarray(own).diagonal().all()
    absent = {"bus", "person", "building", "vegetation"}
    assert not any(name in text for text in captions_drawn for name in absent)


def test_free_sentences_are_never_taken_for_true_of_others(tmp_path):
    scenes = Scenes([drawn(tmp_path / "game")])
    crops = Crops(CropConfig(size=16, prompted=0.0), BANK, lambda t: np.zeros((len(t), 4)), 8, 2)
    batch = crops(scenes[1], np.random.default_rng(1))
    assert not np.asarray(also_true(batch["present"], batch["stated"])).any()


def test_the_same_generator_gives_the_same_crops(tmp_path):
    scenes = Scenes([drawn(tmp_path / "game")])
    crops = Crops(CropConfig(size=16), BANK, lambda t: np.array([[len(x)] for x in t]), 8, 2)
    first, second = (crops(scenes[2], np.random.default_rng(5)) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("seed", range(12))
def test_mishaps_keep_size_and_are_known_looks(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    out, looks = spoiled(pixels, np.random.default_rng(seed))
    assert out.shape == pixels.shape and out.dtype == np.uint8 and looks and looks <= set(LOOKS)


@pytest.mark.slow
def test_a_run_ends_in_a_checkpoint_that_loads_and_again_in_the_same_bytes(tmp_path):
    root, other = drawn(tmp_path / "game"), drawn(tmp_path / "held")
    config = small(root, held=(str(other),))
    done = run_stages(stages(config), tmp_path / "work", config, lambda _: None)
    clip = load_clip(done["export"])
    ids = clip.tokenize(["a photo of a car.", "a photo of a traffic light."])
    assert clip.encode_text(ids).shape == (2, 16)
    score = json.loads((done["check"] / "zero-shot.json").read_text())[str(other)]
    assert 0.0 <= score["top1"] <= 1.0 and score["crops"] == 48
    unchecked = small(root)
    again = run_stages(stages(unchecked), tmp_path / "again", unchecked, lambda _: None)
    assert (done["export"] / "model.safetensors").read_bytes() == (again["export"] / "model.safetensors").read_bytes()


def test_faults_are_one_line(tmp_path):
    with pytest.raises(UserError, match="captions.jsonl: not found"):
        Scenes([tmp_path])
    with pytest.raises(UserError, match="is also in data"):
        stages(small(tmp_path, held=(str(tmp_path),)))
    with pytest.raises(UserError, match="no multiple of crops"):
        stages(small(tmp_path, batch=15))
    root = drawn(tmp_path / "game", 1)
    (root / "labels/000000.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match="missing, truncated or not a PNG"):
        Scenes([root])[0]
    assert jax.device_count() == 8
