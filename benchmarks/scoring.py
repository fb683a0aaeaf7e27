"""Images a second of scoring with sliding windows, around a network that costs next to nothing.

Street-sized images in memory, windows of 512 pixels, 19 classes, scores at 1/16 (or `--output-stride`) of the
resolution. `ours` is `fmda.evaluate.score_on_mesh`. The peer does the same per image with NumPy and OpenCV: windows cut
on the host, scores stretched and added there, arg max and histogram over full-size scores. Both call the same jitted
network, and their confusion matrices are compared.

    python benchmarks/scoring.py --images 25 --out benchmarks/results/scoring.json
"""

import argparse
import os
from dataclasses import dataclass
from functools import partial

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from sides.record import record, write_record
from sides.timing import alternate

from fmda.data import ClassList, Example
from fmda.evaluate import Protocol, Scores, confusion_matrix, score_on_mesh, window_starts
from fmda.mesh import make_mesh

CLASSES = 19


@dataclass
class InMemory:
    """`count` decoded images, repeated from a few."""

    examples: list[Example]
    count: int
    classes: ClassList
    name: str = "noise"
    split: str = "val"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        return self.examples[index % len(self.examples)]


def noise(height: int, width: int, count: int) -> InMemory:
    """Returns images of smooth noise with random labels, a tenth of them void."""
    rng = np.random.default_rng(0)
    examples = []
    for k in range(4):
        coarse = rng.integers(0, 256, (height // 32, width // 32, 3), np.uint8)
        labels = rng.integers(0, CLASSES, (height // 16, width // 16)).astype(np.uint8)
        labels[rng.random(labels.shape) < 0.1] = 255
        image = np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))
        examples.append(Example(image, labels.repeat(16, 0).repeat(16, 1), f"image-{k}"))
    return InMemory(examples, count, ClassList(tuple(f"class {k}" for k in range(CLASSES))))


def free_network(params: jax.Array, pixels: jax.Array, *, stride: int) -> jax.Array:
    """Returns [N, h / stride, w / stride, 19]: one pixel of each cell, times a matrix."""
    return pixels[:, stride // 2 :: stride, stride // 2 :: stride] @ params


def stretched(scores: np.ndarray, side: int) -> np.ndarray:
    """Returns square score maps resized to `side`, the rows by NumPy and the columns by OpenCV."""
    centre = np.clip((np.arange(side) + 0.5) * (len(scores) / side) - 0.5, 0, len(scores) - 1)
    upper = np.floor(centre).astype(np.intp)
    lower = np.minimum(upper + 1, len(scores) - 1)
    weight = (centre - upper).astype(np.float32)[:, None, None]
    tall = scores[upper] * (1 - weight) + scores[lower] * weight
    return np.asarray(cv2.resize(tall, (side, side), interpolation=cv2.INTER_LINEAR))


def numpy_scores(forward: object, params: jax.Array, dataset: InMemory, protocol: Protocol) -> Scores:
    """Returns the scores by NumPy and OpenCV on the host."""
    crop, stride = protocol.crop, protocol.stride
    call = jax.jit(forward)
    matrix = np.zeros((CLASSES, CLASSES), np.int64)
    for index in range(len(dataset)):
        example = dataset[index]
        image = example.image.astype(np.float32)
        height, width = image.shape[:2]
        corners = [(y, x) for y in window_starts(height, crop, stride) for x in window_starts(width, crop, stride)]
        total = np.zeros((height, width, CLASSES), np.float32)
        coverage = np.zeros((height, width, 1), np.float32)
        for first in range(0, len(corners), 4):
            group = corners[first : first + 4]
            filled = group + group[-1:] * (4 - len(group))
            windows = np.stack([image[y : y + crop, x : x + crop] for y, x in filled])
            for (y, x), scores in zip(group, np.asarray(call(params, windows)), strict=False):
                total[y : y + crop, x : x + crop] += stretched(scores, crop)
                coverage[y : y + crop, x : x + crop] += 1
        total /= coverage
        matrix += confusion_matrix(example.labels, total.argmax(-1).astype(np.uint8), CLASSES)
    return Scores.from_confusion(matrix, dataset.classes.names, protocol)


def main() -> None:
    """Runs the benchmark and prints its record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=[1024, 2048], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--stride", type=int, default=341)
    parser.add_argument("--output-stride", type=int, default=16)
    parser.add_argument("--images", type=int, default=25, help="in one timed call of ours")
    parser.add_argument("--peer-images", type=int, default=5, help="in one timed call of the peer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--devices", type=int, help="of a CPU; default its cores")
    parser.add_argument("--out")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices or len(os.sched_getaffinity(0)))

    protocol = Protocol(crop=options.crop, stride=options.stride)
    params = jnp.asarray(np.random.default_rng(1).normal(size=(3, CLASSES)).astype(np.float32))
    network = partial(free_network, stride=options.output_stride)
    many = noise(*options.size, options.images)
    few = InMemory(many.examples, options.peer_images, many.classes)
    mesh = make_mesh()
    ours, peer = score_on_mesh(network, params, few, mesh, protocol), numpy_scores(network, params, few, protocol)
    moved = int(np.abs(ours.confusion - peer.confusion).sum()) // 2
    times = alternate(
        {
            "ours": lambda: score_on_mesh(network, params, many, mesh, protocol).confusion,
            "peer": lambda: numpy_scores(network, params, few, protocol).confusion,
        },
        repeats=options.repeats,
        warmup=1,
    )
    rates = {"ours": options.images / times["ours"].median, "peer": options.peer_images / times["peer"].median}
    result = record(
        "scoring",
        size=options.size,
        crop=options.crop,
        stride=options.stride,
        output_stride=options.output_stride,
        devices=mesh.size,
        classes=CLASSES,
        load_per_core=os.getloadavg()[0] / len(os.sched_getaffinity(0)),
        synthetic="smooth noise in memory, already decoded; a network of one matrix product",
        **{
            side: {"images_per_second": rates[side], "calls": options.repeats, "spread": times[side].spread}
            for side in rates
        },
        ratio=rates["ours"] / rates["peer"],
        share_of_pixels_that_differ=moved / int(peer.confusion.sum()),
    )
    write_record(result, options.out)


if __name__ == "__main__":
    main()
