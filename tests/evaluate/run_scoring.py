"""Scores generated images as one of several processes, for `test_scoring_processes.py`; prints the scores."""

import json
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fmda.data import ClassList, Example
from fmda.evaluate import Protocol, label_free_scores, score_on_mesh
from fmda.mesh import make_mesh, start_processes


class Noise:
    """Seven images of random pixels and labels."""

    classes, name, split = ClassList(("a", "b", "c")), Path(__file__).stem, "val"

    def __len__(self):
        return 7

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (30 + index % 2, 40, 3), np.uint8)
        return Example(image, rng.integers(0, 3, image.shape[:2]).astype(np.uint8), str(index))


def forward(params, pixels):
    """Returns three scores per pixel."""
    return (pixels / 255 - 0.5) @ params["w"][:, :3]


def scores(mesh):
    """Returns (confusion matrix, scores without labels), with parameters that are split over the mesh."""
    weights = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    split = NamedSharding(mesh, P(None, "data"))
    params = {"w": jax.make_array_from_callback((3, 4), split, lambda index: weights[index])}
    protocol = Protocol(crop=24, stride=16)
    confusion = score_on_mesh(forward, params, Noise(), mesh, protocol).confusion.tolist()
    return confusion, list(label_free_scores(forward, params, Noise(), mesh, protocol, teacher=params, pixels=50))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    start_processes()
    print(json.dumps(scores(make_mesh())), flush=True)
