"""The loader: order, resume, shares of processes, workers."""

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from fmda.data import Example, FileFault, open_dataset
from fmda.data.loader import Batches, stack
from fmda.data.streams import RareClasses, Repeated, Stream, batches
from fmda.data.transforms import ColourJitter, training_transform
from fmda.errors import UserError

SOURCE = [Example(np.full((4, 6, 3), i, np.uint8), np.full((4, 6), i, np.uint8), str(i)) for i in range(10)]


def drawn(loader: Iterator[dict], count: int | None = None) -> list[list[int]]:
    """Returns the example numbers of the next batches."""
    return [batch["labels"][:, 0, 0].tolist() for batch in itertools.islice(loader, count)]


def add_noise(example: Example, rng: np.random.Generator) -> dict:
    return {"labels": example.labels, "noise": rng.normal(size=3)}


def stream(batch: int, transform=None, **options) -> Stream:
    return Stream(SOURCE, transform, batch, **options)


def test_a_batch_holds_uint8_images_and_labels() -> None:
    batch = next(batches(stream(4), 0))
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "image": ((4, 4, 6, 3), "uint8"),
        "labels": ((4, 4, 6), "uint8"),
    }


def test_each_epoch_is_another_permutation() -> None:
    found = list(itertools.chain(*drawn(batches(stream(5), 7), 6)))
    epochs = [found[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(10))


def test_seed_decides_the_order() -> None:
    first, again, other = (drawn(batches(stream(5), s), 4) for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("stop", [0, 1, 4, 7])
def test_resume_in_the_middle_of_an_epoch_is_exact(stop: int) -> None:
    whole = [next_batch for next_batch in itertools.islice(batches(stream(3, add_noise), 5), 12)]
    with batches(stream(3, add_noise), 5) as first:
        for _ in range(stop):
            next(first)
        state = json.loads(json.dumps(first.get_state()))
    resumed = batches(stream(3, add_noise), 5)
    resumed.set_state(state)
    rest = list(itertools.islice(resumed, 12 - stop))
    for expected, found in zip(whole[stop:], rest, strict=True):
        np.testing.assert_array_equal(expected["labels"], found["labels"])
        np.testing.assert_array_equal(expected["noise"], found["noise"])
    assert resumed.get_state()["batches"] == 12


def test_a_state_can_be_set_back_on_a_running_loader() -> None:
    loader = batches(stream(3), 5)
    start = loader.get_state()
    first = drawn(loader, 4)
    loader.set_state(start)
    assert drawn(loader, 4) == first


def test_state_of_other_data_is_refused() -> None:
    state = batches(stream(3), 5).get_state()
    with pytest.raises(UserError, match="batch is 3 there but 4 here"):
        batches(stream(4), 5).set_state(state)


def test_processes_share_what_one_process_gets() -> None:
    alone = drawn(batches(stream(4), 3), 5)
    shares = [drawn(batches(stream(4), 3, process_index=p, process_count=2), 5) for p in (0, 1)]
    assert [a + b for a, b in zip(*shares, strict=True)] == alone
    assert all(not set(a) & set(b) for a, b in zip(*(s[:2] for s in shares), strict=True))


def test_random_draws_follow_the_position_not_the_process() -> None:
    alone = next(batches(stream(4, add_noise), 3))
    second = next(batches(stream(4, add_noise), 3, process_index=1, process_count=2))
    np.testing.assert_array_equal(alone["noise"][2:], second["noise"])
    assert len(np.unique(alone["noise"])) == 12


def numbers(loader: Batches, count: int) -> list[int]:
    with loader:
        return [int(batch["image"].astype(np.int64).sum()) for batch in itertools.islice(loader, count)]


def test_workers_change_nothing(street) -> None:
    source = open_dataset("folder", street)
    chain = training_transform((3, 4), max_class_ratio=1.0, jitter=1.0)
    found = {w: numbers(batches(Stream(source, chain, 2), 9, workers=w), 7) for w in (0, 1, 2)}
    assert found[0] == found[1] == found[2]
    resumed = batches(Stream(source, chain, 2), 9, workers=2)
    resumed.set_state({**resumed.get_state(), "batches": 3})
    assert numbers(resumed, 4) == found[0][3:]


class Failing:
    """A pipeline that fails between its processes."""

    def __init__(self, fault: Exception) -> None:
        self.fault = fault

    def __next__(self) -> dict:
        raise self.fault

    def close(self) -> None:
        pass


CRASH = "Worker process was terminated unexpectedly with exit code {}. Search the logs above"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (OSError(28, "No space left on device"), "/dev/shm: no space left.*; set workers=0"),
        (RuntimeError(CRASH.format(-7)), "/dev/shm: no space left.*; set workers=0"),
        (RuntimeError(CRASH.format(1)), "under `if __name__ == '__main__':`.*workers=0"),
    ],
)
def test_failures_between_processes_are_one_line(fault: Exception, message: str) -> None:
    loader = batches(stream(2), 0, workers=1)
    loader._open.append(Failing(fault))
    with pytest.raises(UserError, match=message):
        next(loader)


def test_a_script_without_guard_is_told_of_it(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import numpy as np\nfrom fmda.data.streams import Stream, batches\n"
        "print(next(batches(Stream([{'x': np.zeros(2)}], None, 1), 0, workers=1)))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("fmda.errors.UserError") and "if __name__ == '__main__':" in last


@pytest.mark.parametrize("workers", [0, 1])
def test_a_faulty_file_is_named_whoever_reads_it(street, workers: int) -> None:
    source = open_dataset("folder", street)
    (street / "images/1.png").write_bytes(b"")
    with (
        pytest.raises(FileFault, match="1.png: an empty file"),
        batches(Stream(source, None, 3), 0, workers=workers) as b,
    ):
        next(b)
    assert len(source) == 3


def test_pictures_of_different_size_are_named() -> None:
    odd = [SOURCE[0], Example(np.zeros((5, 6, 3), np.uint8), None, "odd")]
    with pytest.raises(UserError, match=r"'image' of 0 is \(4, 6, 3\) but of odd \(5, 6, 3\)"):
        stack(odd)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UserError, match="the dataset is empty"):
        Stream([], None, 2)
    with pytest.raises(UserError, match="batch: 0; give at least 1"):
        Stream(SOURCE, None, 0)
    with pytest.raises(UserError, match="target.batch: 3 cannot be split over 2 processes"):
        batches({"source": stream(2), "target": stream(3)}, 0, process_count=2)
    with pytest.raises(UserError, match="factors: 2 for 10 examples"):
        Repeated((1.0, 2.0))(0, 10, 0)
    with pytest.raises(UserError, match="must return an Example or a dict"):
        next(batches(stream(2, lambda example, rng: 3), 0))


def test_joined_streams_have_one_position_and_orders_of_their_own() -> None:
    def pair() -> Batches:
        return batches({"source": stream(2), "target": stream(4, add_noise)}, 5)

    whole = list(itertools.islice(pair(), 6))
    assert [set(batch) for batch in whole] == [{"source", "target"}] * 6
    source, target = (np.concatenate([b[name]["labels"][:, 0, 0] for b in whole]) for name in ("source", "target"))
    assert len(source) == 12 and len(target) == 24 and list(source) != list(target[:12])
    assert sorted(source[:10]) == sorted(target[:10]) == list(range(10))
    resumed = pair()
    resumed.set_state({**json.loads(json.dumps(resumed.get_state())), "batches": 4})
    for expected, batch in zip(whole[4:], resumed, strict=False):
        np.testing.assert_array_equal(expected["source"]["image"], batch["source"]["image"])
        np.testing.assert_array_equal(expected["target"]["noise"], batch["target"]["noise"])
    halves = [
        next(batches({"source": stream(2), "target": stream(4)}, 5, process_index=p, process_count=2)) for p in (0, 1)
    ]
    np.testing.assert_array_equal(np.concatenate([h["target"]["labels"] for h in halves]), whole[0]["target"]["labels"])


def test_repeated_examples_occur_as_often_as_their_factor_says() -> None:
    order = Repeated((2.0, 0.5, 1.25, 0.25))
    epochs = [[order(4 * epoch + place, 4, 7) for place in range(4)] for epoch in range(400)]
    counts = np.array([np.bincount(epoch, minlength=4) for epoch in epochs])
    assert (counts[:, 0] == 2).all() and set(counts[:, 1]) == {0, 1} and set(counts[:, 2]) == {1, 2}
    np.testing.assert_allclose(counts.mean(0), [2.0, 0.5, 1.25, 0.25], atol=0.08)
    assert len({tuple(epoch) for epoch in epochs}) > 10
    assert [order(p, 4, 7) for p in range(8)] == epochs[0] + epochs[1]


def test_rare_classes_are_drawn_by_their_rarity() -> None:
    # class 0 covers 90 %, class 1 9 %, class 2 1 % of 1000 pixels; class 3 is nowhere often enough
    pixels = np.array([[500, 0, 0, 0], [400, 0, 10, 0], [0, 90, 0, 0], [0, 0, 0, 3]])
    order = RareClasses(pixels, temperature=0.5, least=5)
    assert {k: v.tolist() for k, v in order.examples.items()} == {0: [0, 1], 1: [2], 2: [1]}
    share = np.array([900, 90, 10]) / 1003
    expected = np.exp((1 - share) / 0.5) / np.exp((1 - share) / 0.5).sum()
    np.testing.assert_allclose(order.shares, expected)
    drawn_indices = [order(position, 4, 1) for position in range(3000)]
    found = np.bincount(drawn_indices, minlength=4) / 3000
    np.testing.assert_allclose(found, [expected[0] / 2, expected[0] / 2 + expected[2], expected[1], 0], atol=0.03)
    assert drawn_indices[:20] == [order(position, 4, 1) for position in range(20)]
    assert drawn_indices[:50] != [order(position, 4, 2) for position in range(50)]


def test_crops_show_the_rare_class_that_was_drawn() -> None:
    labels = np.zeros((20, 20), np.uint8)
    labels[14:, 14:] = 1
    example = Example(np.zeros((20, 20, 3), np.uint8), labels, "corner")
    pixels = np.array([[364, 36]])

    def shares(least: int) -> list[int]:
        order = RareClasses(pixels, temperature=0.01, least=1, least_in_crop=least)
        crops = Stream([example], training_transform((8, 8), max_class_ratio=1.0), 100, order).rows(range(100), 0)
        return np.count_nonzero(crops["labels"], axis=(1, 2)).tolist()

    # a window of 8 shows the corner of 6 in 6 of 13 by 6 of 13 places, more than 15 pixels of it in 11 of 169
    assert np.mean([count > 15 for count in shares(0)]) < 0.15
    assert np.mean([count > 15 for count in shares(15)]) > 0.4
    # what is wanted may not be found: the last of ten draws is taken
    assert len(shares(36)) == 100


def test_examples_are_not_changed_in_place() -> None:
    next(batches(stream(10, ColourJitter(p=1.0)), 0))
    assert [int(e.image[0, 0, 0]) for e in SOURCE] == list(range(10))
