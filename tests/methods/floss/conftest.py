"""A folder with a tiny CLIP and labelled images, shared by the tests of whole FLOSS runs."""

from dataclasses import replace

import numpy as np
import pytest
import yaml
from floss_small import CONFIG, picture, small_clip, small_heads
from PIL import Image

from fmda.methods.pretrain.tokenizer import train_tokenizer
from fmda.weights.network import save, save_heads


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with `clip` (and heads), `data` of two labelled splits and `flat`, images without labels."""
    folder = tmp_path_factory.mktemp("floss")
    config = replace(CONFIG, text=replace(CONFIG.text, vocab_size=520))
    _, params = small_clip(0, config)
    train_tokenizer(["a photo of the road and the sky"] * 3, 520, folder / "words")
    save("clip", folder / "clip", config, params, sorted((folder / "words").iterdir()))
    save_heads(folder / "clip", small_heads())
    (folder / "flat").mkdir()
    for split, count in (("train", 4), ("val", 2)):
        for part in ("images", "labels"):
            (folder / "data" / split / part).mkdir(parents=True)
        for i in range(count):
            image = picture(i if split == "train" else 10 + i, (40, 56))
            Image.fromarray(image).save(folder / "data" / split / "images" / f"{i}.png")
            if split == "train":
                Image.fromarray(image).save(folder / "flat" / f"{i}.png")
            labels = np.digitize(image.mean(-1), [110, 150]).astype(np.uint8)
            Image.fromarray(labels).save(folder / "data" / split / "labels" / f"{i}.png")
    (folder / "data" / "classes.yaml").write_text(yaml.safe_dump({"classes": ["sky", "road", "car"]}))
    return folder


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("FMDA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
