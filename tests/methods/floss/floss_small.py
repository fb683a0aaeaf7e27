"""A tiny CLIP with random weights for the tests of this folder."""

import jax
import numpy as np

from fmda import trees
from fmda.config import from_dict
from fmda.mesh import make_mesh
from fmda.methods.floss.settings import Config
from fmda.methods.floss.tower import Tower
from fmda.models.clip import Clip, ClipConfig, TextConfig, VitConfig
from fmda.models.module import abstract

CONFIG = ClipConfig(
    embed_dim=16,
    vision=VitConfig(image_size=32, patch_size=8, width=32, layers=4, heads=4, mlp_width=64),
    text=TextConfig(vocab_size=300, context=24, width=32, layers=1, heads=2, mlp_width=64),
)


def small_clip(seed=0, config=CONFIG):
    """Returns (graphdef, params); every leaf is random, biases and norms too."""
    graphdef, shapes = abstract(lambda rngs: Clip(config, rngs=rngs))
    rng = np.random.default_rng(seed)
    drawn = {}
    for path, leaf in sorted(trees.flatten(shapes).items()):
        value = rng.normal(size=leaf.shape) * (leaf.shape[-2] ** -0.5 if path.endswith("kernel") else 0.1)
        drawn[path] = (value + path.endswith("scale")).astype(np.float32)
    return graphdef, trees.unflatten(drawn)


def small_heads(seed=0, width=32):
    """Returns random CLIP-DINOiser heads."""
    rng = np.random.default_rng(seed)

    def layer(*shape):
        kernel = rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
        bias = 0.1 * rng.normal(size=shape[-1])
        return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}

    return {"obj_proj": layer(3, 3, width, 8), "bkg_decoder": layer(1, 1, width, 1)}


def small_tower(host, devices=1, seed=0):
    """Returns the tiny image tower on some of the devices."""
    graphdef, params = small_clip(seed)
    heads = small_heads() if host.features == "clip-dinoiser" else None
    return Tower(host, CONFIG, graphdef, params, make_mesh(devices=jax.local_devices()[:devices]), heads)


def picture(seed=0, size=(48, 72)):
    """Returns a smooth colourful uint8 image."""
    y, x = np.mgrid[: size[0], : size[1]] / max(size)
    rng = np.random.default_rng(seed)
    waves = [np.sin(rng.uniform(2, 20) * x + rng.uniform(2, 20) * y + rng.uniform(0, 6)) for _ in range(9)]
    image = np.stack([waves[3 * c] + waves[3 * c + 1] * waves[3 * c + 2] for c in range(3)], -1)
    return np.clip(127 + 70 * image + rng.normal(size=(*size, 3)) * 8, 0, 255).astype(np.uint8)


def table(templates=6, queries=5, dim=16, seed=0):
    """Returns unit-length text embeddings [M, Q, D]: a name and a template part each."""
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(1, queries, dim)) + 0.5 * rng.normal(size=(templates, queries, dim))
    return (found / np.linalg.norm(found, axis=-1, keepdims=True)).astype(np.float32)


def floss_config(place, **changes):
    """Returns a run on the folder that the fixture `place` makes."""
    values = {
        "clip": str(place / "clip"),
        "host": {"name": "maskclip", "crop": 32, "stride": 16, "long_max": 60, "short_max": 32},
        "data": {"name": "folder", "root": str(place / "data"), "split": "val"},
        "ranking": {"chunk": 8},
    }
    return from_dict(Config, {**values, **changes})
