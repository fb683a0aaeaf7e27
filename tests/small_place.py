"""A small place to work in: a tiny CLIP, labelled pictures, rendered scenes and the configurations that use them.

All paths in its configurations are relative. Runs record them as absolute paths, so a finished run is resumed at its
own place alone: `borrowed` lends a test the folder itself.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from fmda.methods.pretrain.tokenizer import train_tokenizer
from fmda.models.clip import Clip, ClipConfig, TextConfig, VitConfig
from fmda.models.mit import Mit, MitConfig
from fmda.models.module import init
from fmda.models.segformer import SegFormer, SegFormerConfig
from fmda.weights.network import save
from fmda.world.captions import facts_of
from fmda.world.names import CLASSES

FLOSS = """kind: floss
clip: clip
host: {name: maskclip, crop: 32, stride: 16, long_max: 48, short_max: 32}
data: {name: folder, root: data, split: val}
ranking: {chunk: 8, save_every: 1}
"""

CLIP = """kind: pretrain-clip
data: [scenes]
model:
  embed_dim: 16
  vision: {image_size: 16, patch_size: 8, width: 16, layers: 1, heads: 2, mlp_width: 32}
  text: {vocab_size: 600, context: 24, width: 16, layers: 1, heads: 2, mlp_width: 32}
crop: {size: 16}
vocabulary: 600
steps: 4
batch: 32
crops: 4
optim: {learning_rate: 0.001}
"""

UDA = """kind: uda
data: {name: folder, root: data, split: train}
target: {name: folder, root: scenes, split: train}
val: {name: folder, root: data, split: val}
network: {family: segformer, encoder: mit}
learn: {self_training: {}}
crop: 32
rare_pixels: 10
steps: 1
"""

WORLD = "kind: world\ndomains: {photo: 1}\nheight: 32\nwidth: 64\nbatch: 1\n"


@contextmanager
def borrowed(folder: Path, spare: Path) -> Iterator[Path]:
    """Lends a folder that may be damaged; it comes back from the copy `spare`."""
    shutil.copytree(folder, spare)
    yield folder
    shutil.rmtree(folder)
    shutil.move(spare, folder)


def make_place(folder: Path) -> None:
    """Fills a folder with `clip`, `mit`, `start`, `data`, `scenes` and a file for each configuration above.

    `start` is a segmentation network of two classes, where `data` has three.
    """
    draw_labelled(folder / "data")
    draw_scenes(folder / "scenes", 4)
    (folder / "floss.yaml").write_text(FLOSS)
    (folder / "clip.yaml").write_text(CLIP)
    (folder / "world.yaml").write_text(WORLD)
    (folder / "uda.yaml").write_text(UDA)
    mit = MitConfig((8, 8, 8, 8), (1, 1, 1, 1), (1, 1, 2, 2))
    save("mit", folder / "mit", mit, init(lambda rngs: Mit(mit, rngs=rngs), jax.random.key(0)))
    segformer = SegFormerConfig(mit, 8, classes=2)
    start = init(lambda rngs: SegFormer(segformer, rngs=rngs), jax.random.key(0))
    save("segformer", folder / "start", segformer, start)
    (folder / "start/classes.yaml").write_text("classes: [road, car]\n")
    config = ClipConfig(
        embed_dim=16,
        vision=VitConfig(32, 8, 16, 2, 2, 32, "quick_gelu"),
        text=TextConfig(515, 24, 16, 1, 2, 32, "quick_gelu", eos_token_id=514, bos_token_id=513),
    )
    train_tokenizer(["a photo of the road"], 515, folder / "words")
    params = init(lambda rngs: Clip(config, rngs=rngs), jax.random.key(0))
    save("clip", folder / "clip", config, params, sorted((folder / "words").iterdir()))


def draw_labelled(folder: Path) -> None:
    """Writes a generic data set: two training and two validation pictures of three classes."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for part in ("images", "labels"):
            (folder / split / part).mkdir(parents=True)
        for name in "01":
            labels = rng.integers(0, 3, (4, 6), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            image = (labels[..., None] * 80 + rng.integers(0, 40, (*labels.shape, 3))).astype(np.uint8)
            Image.fromarray(image).save(folder / split / "images" / f"{name}.png")
            Image.fromarray(labels).save(folder / split / "labels" / f"{name}.png")
    (folder / "classes.yaml").write_text("classes: [road, car, sky]\n")


def draw_scenes(folder: Path, count: int) -> None:
    """Writes a folder in the layout of rendered pictures: sky over road, a car in the middle."""
    rng = np.random.default_rng(1)
    for part in ("images", "labels", "instances"):
        (folder / part).mkdir(parents=True)
    rows = []
    for index in range(count):
        labels = np.full((32, 64), CLASSES.index("sky"), np.uint8)
        labels[16:] = CLASSES.index("road")
        instances = np.zeros((32, 64), np.uint16)
        labels[12:24, 20:44], instances[12:24, 20:44] = CLASSES.index("car"), 7
        image = (labels[..., None] * np.array([9, 5, 3]) + rng.integers(0, 30, (32, 64, 3))).astype(np.uint8)
        name = f"{index:06}"
        for part, pixels in (("images", image), ("labels", labels), ("instances", instances)):
            Image.fromarray(pixels).save(folder / part / f"{name}.png")
        named = {"domain": 0, "style": index % 2, "weather": 0, "time": index % 3, "street": 0}
        rows.append({"name": name, "domain": "game", "caption": "", "facts": facts_of(labels, instances, named)})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
