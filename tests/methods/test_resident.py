"""Datasets in device memory give the batches of the host, bit for bit."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmda.data import Example
from fmda.data.resident import resident
from fmda.data.streams import RareClasses, Stream, batches
from fmda.data.transforms import training_transform
from fmda.mesh import make_mesh, replicate, shard_batch
from fmda.methods.resident import with_resident_data
from fmda.train import OptimConfig, Outcome, Task, TrainerConfig, run_task

RANDOM = np.random.default_rng(0)
# larger and smaller than a crop of 8 by 10; the second in one class alone
SIZES = [(12, 16), (12, 16), (9, 20), (6, 9)]


def example(number: int, size: tuple[int, int], *, labelled: bool = True) -> Example:
    labels = np.full(size, 2, np.uint8) if number == 1 else RANDOM.integers(0, 3, size, dtype=np.uint8)
    labels[:, : size[1] // 2] = 1
    image = RANDOM.integers(0, 256, (*size, 3), dtype=np.uint8)
    return Example(image, labels if labelled else None, str(number))


SOURCE = [example(*pair) for pair in enumerate(SIZES)]
TARGET = [example(i, (16, 12), labelled=False) for i in range(3)]
CROP = (8, 10)


def streams() -> dict[str, Stream]:
    pixels = np.stack([np.bincount(one.labels.ravel(), minlength=3) for one in SOURCE])
    return {
        "source": Stream(SOURCE, training_transform(CROP), 8, RareClasses(pixels, least=1, least_in_crop=20)),
        "target": Stream(TARGET, training_transform(CROP, resize=(14, 12), margins=True), 16),
    }


def handed_over(params, state, frozen, batch, key) -> Outcome:
    """Returns the batch as metrics."""
    return Outcome(params["w"] * frozen["scale"], batch, {})


def task(**changes) -> Task:
    pieces = {
        "name": "test", "objective": handed_over, "init": lambda key: {"w": jnp.ones(())}, "streams": streams(),
        "optim": OptimConfig(learning_rate=0.1, warmup_steps=0), "frozen": {"scale": np.float32(2)},
    }  # fmt: skip
    return Task(**{**pieces, **changes})


@pytest.mark.parametrize("names", [None, ["target"], ["source"]])
def test_batches_are_those_of_the_host_on_eight_devices(names):
    held, mesh = with_resident_data(task(), names), make_mesh()
    frozen = replicate(held.frozen, mesh)
    run = jax.jit(lambda batch: held.objective({"w": jnp.ones(())}, None, frozen, batch, None).metrics)
    places = itertools.islice(batches(held.streams, 5), 4)
    for expected, place in zip(batches(streams(), 5), places, strict=False):
        for name in expected if names is None else names:
            assert set(place[name]) == {"row", "top", "left", "flip"} | ({"margins"} if name == "target" else set())
        found = run(shard_batch(place, mesh))
        assert [found[name]["image"].addressable_shards[0].data.shape[0] for name in found] == [1, 2]
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_position_is_that_of_the_host():
    host, held = batches(streams(), 5), batches(with_resident_data(task()).streams, 5)
    next(host)
    held.set_state(json.loads(json.dumps(host.get_state())))
    assert held.get_state() == host.get_state()


def test_what_does_not_fit_or_is_changed_further_stays_on_the_host():
    plain = streams()["source"]
    size = 4 * (12 * 16 * 4)
    assert resident(plain, size) is not None and resident(plain, size - 1) is None
    for transform in (
        training_transform(CROP, jitter=1.0),
        training_transform(CROP, resize=(9, 9), scale=(1, 2)),
        None,
    ):
        assert resident(Stream(SOURCE, transform, 2), 1e9) is None
    unchanged = task(streams=Stream(SOURCE, None, 2))
    assert with_resident_data(unchanged) is unchanged


def test_a_run_is_the_same_bit_for_bit(tmp_path):
    def objective(params, state, frozen, batch, key) -> Outcome:
        image, labels = (batch[name].astype(jnp.float32) / 255 for name in ("image", "labels"))
        loss = jnp.square(params["w"] * image.mean(-1) - labels).mean() * frozen["scale"]
        return Outcome(loss, {}, {})

    plain = task(objective=objective, streams=streams()["source"])
    found = {}
    for name, one in {"host": plain, "devices": with_resident_data(plain)}.items():
        run_task(one, TrainerConfig(steps=4, batch=8, log_every=1, mesh=(4, 1)), tmp_path / name)
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        found[name] = [line["loss"] for line in lines]
    assert len(found["host"]) == 4 and found["host"] == found["devices"]
