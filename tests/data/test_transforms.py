"""Sizes, crops and colours by hand-computed values."""

import numpy as np
import pytest

from fmda.data import Example
from fmda.data.transforms import (
    ColourJitter,
    RandomCrop,
    RandomFlip,
    ResizeKeepRatio,
    fit_size,
    pad,
    resize_image,
    resize_labels,
    training_transform,
)
from fmda.errors import UserError


def example(height: int = 8, width: int = 12) -> Example:
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Example(image, rng.integers(0, 5, (height, width), dtype=np.uint8), "a")


@pytest.mark.parametrize(
    ("size", "bounds", "expected"),
    [
        ((1024, 2048), (896, 448), (448, 896)),
        ((1024, 2048), (2048, 560), (560, 1120)),
        ((480, 640), (2048, 448), (448, 597)),
        ((480, 640), (2048, 336), (336, 448)),
        ((1052, 1914), (1280, 720), (704, 1280)),
        ((1080, 1920), (796, 448), (448, 796)),
    ],
)
def test_fit_size_gives_the_published_sizes(size, bounds, expected) -> None:
    assert fit_size(*size, *bounds) == expected


def test_image_resize_is_bilinear_at_half_pixel_centres() -> None:
    image = np.repeat(np.array([[0, 100]], np.uint8)[..., None], 3, axis=2)
    assert resize_image(image, (1, 4))[0, :, 0].tolist() == [0, 25, 75, 100]


def test_label_resize_takes_the_nearest_centre() -> None:
    labels = np.array([[0, 1, 2, 255]], np.uint8)
    assert resize_labels(labels, (2, 2)).tolist() == [[1, 255], [1, 255]]
    assert resize_labels(labels, (1, 8)).tolist() == [[0, 0, 1, 1, 2, 2, 255, 255]]


def test_resizes_keep_the_ratio() -> None:
    rng = np.random.default_rng(0)
    assert ResizeKeepRatio(6, 6)(example(), rng).image.shape == (4, 6, 3)
    scaled = ResizeKeepRatio(24, 24, scale=(0.5, 2.0))(example(), rng)
    assert 6 * 2 <= scaled.image.shape[1] <= 48 and scaled.image.shape[:2] == scaled.labels.shape


def test_crop_takes_image_and_labels_at_one_place() -> None:
    source = example()
    source = Example(np.repeat(source.labels[..., None], 3, axis=2), source.labels, "a")
    crop = RandomCrop((3, 5))(source, np.random.default_rng(0))
    assert crop.labels.shape == (3, 5)
    np.testing.assert_array_equal(crop.image[..., 1], crop.labels)


def test_crop_pads_small_pictures_with_void() -> None:
    crop = RandomCrop((10, 14))(example(), np.random.default_rng(0))
    assert crop.image.shape == (10, 14, 3) and (crop.labels[8:] == 255).all() and (crop.image[:, 12:] == 0).all()
    assert pad(example(), (4, 4)).image.shape == (8, 12, 3)


def test_crop_avoids_one_class_filling_it() -> None:
    labels = np.zeros((4, 40), np.uint8)
    labels[:, 36:] = 1
    source = Example(np.zeros((4, 40, 3), np.uint8), labels, "a")
    varied = sum(
        len(np.unique(RandomCrop((4, 8), 0.75, tries=200)(source, np.random.default_rng(s)).labels)) for s in range(20)
    )
    plain = sum(len(np.unique(RandomCrop((4, 8))(source, np.random.default_rng(s)).labels)) for s in range(20))
    assert varied == 40 and plain < 35


def test_flip_mirrors_both() -> None:
    source = example()
    flipped = RandomFlip(1.0)(source, np.random.default_rng(0))
    np.testing.assert_array_equal(flipped.image, source.image[:, ::-1])
    np.testing.assert_array_equal(flipped.labels, source.labels[:, ::-1])
    assert RandomFlip(0.0)(source, np.random.default_rng(0)) is source


def test_jitter_changes_one_thing_at_a_time_as_described() -> None:
    source = Example(np.full((2, 2, 3), 100, np.uint8), None, "a")
    none = ColourJitter(0, 0, 0, 0, p=1)(source, np.random.default_rng(0))
    np.testing.assert_array_equal(none.image, source.image)
    rng = np.random.default_rng(5)
    bright = ColourJitter(0.2, 0, 0, 0, p=1)(source, rng).image
    assert (bright == bright[0, 0, 0]).all() and bright[0, 0, 0] != 100 and abs(int(bright[0, 0, 0]) - 100) <= 51
    red = Example(np.full((1, 1, 3), (200, 50, 50), np.uint8), None, "r")
    turned = ColourJitter(0, 0, 0, 0.5, p=1)(red, np.random.default_rng(3)).image[0, 0]
    assert turned.max() == 200 and turned.min() == 50 and turned.tolist() != [200, 50, 50]
    assert ColourJitter(p=0)(red, rng) is red


def test_training_transform_is_a_function_of_the_generator() -> None:
    chain = training_transform((4, 6), resize=(12, 8), scale=(0.5, 2.0), jitter=1.0)
    first, again, other = (chain(example(), np.random.default_rng(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.image, again.image)
    assert first.image.shape == (4, 6, 3) and not np.array_equal(first.image, other.image)


def test_margins_say_where_a_crop_lies_in_the_mirrored_image() -> None:
    rows, columns = np.mgrid[:12, :16].astype(np.uint8)
    image = np.stack([rows, columns, columns], axis=-1)
    chain, both = training_transform((5, 6), margins=True), set()
    for seed in range(8):
        crop = chain(Example(image, None, "a"), np.random.default_rng(seed))
        (top, first, _), (bottom, last, _) = crop.image[0, 0].tolist(), crop.image[-1, -1].tolist()
        sides = (15 - first, last) if first > last else (first, 15 - last)
        assert crop.margins is not None and crop.margins.tolist() == [top, 11 - bottom, *sides]
        both.add(first > last)
    assert both == {True, False}


def test_crop_without_area_is_refused() -> None:
    with pytest.raises(UserError, match="height and a width of at least 1"):
        training_transform((0, 4))
