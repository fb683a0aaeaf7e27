"""The target picture and its crops: resized as Pillow does it, cut at the picture's own scale, refused in one line."""

import numpy as np
import pytest
from PIL import Image

from fmda.errors import UserError
from fmda.methods.datum.target import (
    ClassImages,
    Encoded,
    Examples,
    RandomCrops,
    contact_sheet,
    digest,
    open_target,
    random_crop,
)

RNG = np.random.default_rng(0)


def picture(height, width):
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


def saved(path, pixels, mode=None, **options):
    Image.fromarray(pixels, mode).save(path, **options)
    return path


def test_a_picture_of_the_asked_size_is_left_as_it_is(tmp_path):
    pixels = picture(24, 48)
    path = saved(tmp_path / "street.png", pixels)
    np.testing.assert_array_equal(open_target(path, 24, 16), pixels)
    np.testing.assert_array_equal(open_target(path, None, 16), pixels)


@pytest.mark.parametrize(("height", "width", "resize", "shape"), [(54, 96, 20, (20, 35)), (31, 17, 24, (43, 24))])
def test_the_shorter_side_is_resized_and_the_longer_rounded_down(tmp_path, height, width, resize, shape):
    pixels = picture(height, width)
    found = open_target(saved(tmp_path / "street.png", pixels), resize, 16)
    expected = Image.fromarray(pixels).resize(shape[::-1], Image.Resampling.BILINEAR)
    assert found.shape == (*shape, 3) and found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.asarray(expected))


def test_a_shrunk_picture_is_averaged():
    # Pillow's filter widens with the scale: a checkerboard becomes grey, not black or white
    board = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    small = Image.fromarray(np.stack([board] * 3, -1).astype(np.uint8)).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(small).astype(int) - 127).max() <= 2


def test_a_camera_s_rotation_is_applied(tmp_path):
    pixels = np.repeat(picture(3, 4), 8, 0).repeat(8, 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "phone.png", pixels, exif=exif)
    np.testing.assert_array_equal(open_target(path, None, 16), np.rot90(pixels, -1))


def test_crops_lie_inside_at_the_picture_s_own_scale():
    pixels = picture(20, 30)
    inside = {pixels[i : i + 16, j : j + 16].tobytes() for i in range(5) for j in range(15)}
    crops = {random_crop(pixels, 16, np.random.default_rng(seed)).tobytes() for seed in range(400)}
    assert crops <= inside
    # 75 places, each with a chance of 99.5 % to be among 400
    assert len(crops) > 65


def test_rows_are_the_same_for_the_same_generator_and_hold_a_seed_for_each_picture():
    rows = (picture(20, 30), picture(40, 17))
    first, second = (RandomCrops(16)(rows, np.random.default_rng(5)) for _ in range(2))
    assert first["pixels"].shape == (2, 16, 16, 3) and first["seed"].dtype == np.uint32
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    assert first["seed"][0] != first["seed"][1]
    assert not np.array_equal(RandomCrops(16)(rows, np.random.default_rng(6))["seed"], first["seed"])
    moments = RNG.normal(size=(2, 4, 4, 8)).astype(np.float32)
    np.testing.assert_array_equal(Encoded()(tuple(moments), np.random.default_rng(5))["moments"], moments)


def test_the_shorter_column_begins_again():
    rows = Examples((np.arange(2), np.arange(5)))
    assert len(rows) == 5
    assert [rows[i] for i in range(5)] == [(0, 0), (1, 1), (0, 2), (1, 3), (0, 4)]


def test_the_sheet_shows_crops_in_two_rows():
    assert contact_sheet(picture(20, 30), 16, seed=0).shape == (32, 64, 3)


def test_class_pictures_are_those_of_a_folder(tmp_path):
    (tmp_path / "images").mkdir()
    one, two = picture(20, 20), picture(18, 40)
    saved(tmp_path / "images/a.png", one), saved(tmp_path / "images/b.png", two)
    (tmp_path / "images/.b.part.png").write_bytes(b"half")
    found = ClassImages(tmp_path, 16)
    assert len(found) == 2
    np.testing.assert_array_equal(found[1], two)
    with pytest.raises(UserError, match=r"b\.png: smaller than a crop of 19 pixels; give larger"):
        ClassImages(tmp_path, 19)
    with pytest.raises(UserError, match=r"prior\.images: .*nothing holds no images"):
        ClassImages(tmp_path / "nothing", 16)


def grey(path):
    return saved(path, picture(20, 20)[..., 0])


def clear(path):
    return saved(path, np.dstack([picture(20, 20), np.full((20, 20), 99, np.uint8)]), "RGBA")


def clear_grey(path):
    return saved(path, picture(20, 20)[..., :2].copy(), "LA")


def one_colour_clear(path):
    return saved(path, picture(20, 20), transparency=(0, 0, 0))


def palette(path):
    Image.fromarray(picture(20, 20)).quantize(8).save(path)
    return path


def deep(path):
    Image.fromarray(RNG.integers(0, 60000, (20, 20)).astype(np.uint16)).save(path)
    return path


def cut(path):
    data = saved(path, picture(40, 40)).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


FAULTS = {
    grey: "a grey image, of which the model would learn that the target has no colours",
    clear: "an image with an alpha channel",
    clear_grey: "an image with an alpha channel",
    one_colour_clear: "an image with an alpha channel",
    palette: "an image of mode P; convert it to RGB",
    deep: "more than 8 bits a channel",
    cut: "truncated",
    lambda path: saved(path, picture(15, 90)): "90x15 pixels hold no crop of 16; give a larger image",
    lambda path: path: "cannot be read (No such file or directory)",
}


@pytest.mark.parametrize(("make", "message"), FAULTS.items(), ids=range(len(FAULTS)))
def test_a_picture_that_cannot_be_used_is_refused_in_one_line(tmp_path, make, message):
    path = make(tmp_path / "target.png")
    with pytest.raises(UserError) as caught:
        open_target(path, 64, 16)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_digest_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"one"), (tmp_path / "b").write_bytes(b"one"), (tmp_path / "c").write_bytes(b"two")
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
