"""Scores of a dense network on images without labels, for the choice of a checkpoint; the larger, the better.

They read the network's scores at pixels that are drawn at random in each image, and are means over images.
"""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt8

from fmda.data import ClassList, Dataset
from fmda.evaluate.protocol import Protocol
from fmda.evaluate.scoring import Prepared, image_count, local_copy, over_images, sum_over_processes
from fmda.evaluate.windows import DenseForward, Geometry, WindowGrid, pixel_scores, score_samples
from fmda.mesh import BATCH
from fmda.nn.norm import unit

TEMPERATURE = 0.05
"""Of the softmax over similarities, as in the paper."""

PIXELS = 1024
"""Pixels of each image, all of them where it has fewer. The paper draws 100."""


class LabelFree(NamedTuple):
    """Scores without labels over a dataset; in each, larger is better.

    Attributes:
        snd: soft neighbourhood density of the predictions, in nats, 0..log(pixels - 1): mean over images.
        certainty: 1 less the mean entropy of the predictions over log K, 0..1.
        balance: entropy of the mean prediction of all images over log K, 0..1.
        coverage: share of the K classes that at least one pixel is labelled as.
        agreement: share of pixels that student and teacher label alike; None without a teacher.
    """

    snd: float
    certainty: float
    balance: float
    coverage: float
    agreement: float | None

    def named(self) -> Iterator[tuple[str, float]]:
        """Returns the scores by name, "agreement" only where there is a teacher."""
        return ((name, value) for name, value in self._asdict().items() if value is not None)


def label_free_scores(
    forward: DenseForward,
    params: Any,
    dataset: Dataset,
    mesh: Mesh,
    protocol: Protocol,
    *,
    teacher: Any = None,
    classes: ClassList | None = None,
    limit: int | None = None,
    pixels: int = PIXELS,
    seed: int = 0,
) -> LabelFree:
    """Returns scores of a dense network that no label is read for, the same in every process.

    Each device works on one image at a time, in one jitted function. The pixels are a function of seed and image.

    Args:
        forward: (params, RGB in 0..255 [N, h, w, 3]) -> logits [N, h', w', K]. Pass the same function object every
            time, since a new one is compiled again.
        params: a tree of arrays, of the student.
        dataset: examples; their labels are not used.
        mesh: its devices share the images.
        protocol: resize, windows and flip.
        teacher: parameters of the teacher, for the same `forward`.
        classes: what the network predicts; default the dataset's classes.
        limit: look only at the first `limit` images.
        pixels: number of pixels drawn in each image.
        seed: of the draw.

    Raises:
        UserError: no image.
    """
    count = image_count(dataset, limit)
    params, teacher = local_copy((params, teacher), mesh)
    samples = cache(partial(score_samples, forward, params))

    def prepare(index: int) -> Prepared:
        image = dataset[index].image
        grid = WindowGrid.of(image.shape[:2], protocol)
        place = grid.geometry_at(samples(grid.window), random_pixels(image.shape[:2], pixels, (seed, index)))
        return Prepared(grid.window, grid.shape, (grid.prepare(image), place))

    def measure(batch: Prepared) -> Array:
        return _measure(
            forward, params, teacher, *batch.arrays,
            window=batch.window, shape=batch.shape, flip=protocol.flip, mesh=mesh.local_mesh,
        )  # fmt: skip

    total = np.zeros(3 + 2 * len((classes or dataset.classes).names))
    for values in over_images(measure, prepare, count, mesh, f"look at {dataset.name}"):
        total += values.astype(np.float64).sum(0)
    snd, certainty, agreement, *shares = sum_over_processes(total) / count
    mean, predicted = np.split(np.asarray(shares), 2)
    balance = -float((mean * np.log(np.maximum(mean, 1e-30))).sum()) / np.log(len(mean))
    coverage = float((predicted > 0).mean())
    return LabelFree(float(snd), float(certainty), balance, coverage, None if teacher is None else float(agreement))


def random_pixels(size: tuple[int, int], count: int, seed: tuple[int, ...]) -> Int[np.ndarray, "P 2"]:
    """Returns (row, column) of `count` different pixels, or of all, of a label map of `size` (height, width)."""
    total = size[0] * size[1]
    places = np.random.default_rng(seed).choice(total, min(count, total), replace=False)
    return np.stack(np.unravel_index(places, size), 1)


def soft_neighbourhood_density(features: Float[Array, "n d"], temperature: float = TEMPERATURE) -> Float[Array, ""]:
    """Returns the mean entropy, in nats, of softmax(cosine similarity to each other row / temperature), 0..log(n - 1).

    It is large where each row lies in a dense neighbourhood, and largest where all rows are alike: a network that
    predicts one class for all pixels has the highest density. Read it beside `balance`.
    Source: Saito et al. 2021 ("Tune it the Right Way"), eq. 2 and 3.
    """
    rows = unit(features)
    same = jnp.eye(len(rows), dtype=bool)
    similarity = jnp.matmul(rows, rows.T, precision="highest") / temperature
    log_probs = jax.nn.log_softmax(jnp.where(same, -jnp.inf, similarity), axis=1)
    return -jnp.where(same, 0, jnp.exp(log_probs) * log_probs).sum(1).mean()


@partial(jax.jit, static_argnames=("forward", "window", "shape", "flip", "mesh"))
def _measure(
    forward: DenseForward,
    params: Any,
    teacher: Any,
    images: UInt8[Array, "b H W 3"],
    place: Geometry,
    *,
    window: tuple[int, int],
    shape: tuple[int, int],
    flip: bool,
    mesh: Mesh,
) -> Float[Array, "b 3+2K"]:
    """Returns density, certainty, agreement, mean prediction and shares of the labels of each image."""

    def on_device(params: Any, teacher: Any, images: Array, place: Geometry) -> Array:
        logits = pixel_scores(forward, params, images, place, window, shape, flip)
        labels = theirs = logits.argmax(-1)
        if teacher is not None:
            theirs = pixel_scores(forward, teacher, images, place, window, shape, flip).argmax(-1)
        log_probs = jax.nn.log_softmax(logits)
        probs = jnp.exp(log_probs)
        classes = logits.shape[-1]
        alone = [
            jax.vmap(soft_neighbourhood_density)(probs),
            1 + (probs * log_probs).sum(-1).mean(1) / jnp.log(classes),
            (labels == theirs).mean(1),
        ]
        return jnp.concatenate([jnp.stack(alone, 1), probs.mean(1), jax.nn.one_hot(labels, classes).mean(1)], axis=1)

    split = jax.shard_map(on_device, mesh=mesh, in_specs=(P(), P(), BATCH, BATCH), out_specs=BATCH, check_vma=False)
    return split(params, teacher, images, place)
