"""Images and label maps in the forms that cameras, editors and optimisers leave: read right, or refused by name."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from fmda.data import FileFault, open_dataset, read_image, read_labels
from fmda.data.check import check, check_images
from fmda.data.config import ImagesConfig
from fmda.errors import UserError

IDS = np.arange(6, dtype=np.uint8).reshape(2, 3) % 3


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_applied(tmp_path, suffix: str, orientation: int) -> None:
    path = tmp_path / f"a.{suffix}"
    stored = np.zeros((16, 24, 3), np.uint8)
    stored[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(path, exif=exif, **({"quality": 100} if suffix == "jpg" else {}))
    with Image.open(path) as file:
        upright = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    image = read_image(path)
    assert image.shape == ((24, 16, 3) if orientation > 4 else (16, 24, 3))
    np.testing.assert_array_equal(image, upright)


@pytest.mark.filterwarnings("ignore:.*orrupt EXIF")
def test_a_damaged_exif_block_is_no_fault(tmp_path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff\xff")
    assert read_image(path).shape == (8, 8, 3)


def test_sizes_are_compared_after_the_orientation(tmp_path, put) -> None:
    put("q/labels/a.png", np.zeros((6, 4), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "q/images").mkdir()
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "q/images/a.jpg", exif=exif)
    (tmp_path / "q/classes.yaml").write_text("classes: [road]")
    dataset = open_dataset("folder", tmp_path / "q")
    assert dataset[0].image.shape == (6, 4, 3) and not check(dataset).faults
    put("q/labels/a.png", np.zeros((4, 6), np.uint8))
    with pytest.raises(FileFault, match="labels are 6x4 but the image .* is 4x6"):
        dataset[0]


def packed_png(path, values: np.ndarray, depth: int) -> None:
    """Writes grey levels of 1, 2 or 4 bits."""
    height, width = values.shape
    bits = np.unpackbits(values[..., None], axis=2)[..., 8 - depth :].reshape(height, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(bits, axis=1))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_grey_labels_of_few_bits_are_refused(tmp_path, depth: int) -> None:
    packed_png(tmp_path / "a.png", IDS % 2, depth)
    with pytest.raises(FileFault, match="fewer than 8 bits.*; save it with 8 bits") as fault:
        read_labels(tmp_path / "a.png")
    assert fault.value.kind == "label of few bits" and read_image(tmp_path / "a.png").shape == (2, 3, 3)


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "TIFF"])
def test_lossy_labels_are_refused_whatever_their_suffix(tmp_path, form: str) -> None:
    Image.fromarray(IDS).save(tmp_path / "a.png", form, **({"compression": "jpeg"} if form == "TIFF" else {}))
    with pytest.raises(FileFault, match=f"lossy format {form}.*; export it anew") as fault:
        read_labels(tmp_path / "a.png")
    assert fault.value.kind == "lossy label"


@pytest.mark.parametrize("form", ["grey", "palette", "small palette", "BMP", "TIFF"])
def test_lossless_labels_keep_their_ids(tmp_path, form: str) -> None:
    image = Image.fromarray(IDS)
    if "palette" in form:
        image.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
    options = {"small palette": {"bits": 2}, "TIFF": {"compression": "tiff_deflate"}}.get(form, {})
    image.save(tmp_path / "a.png", form if form.isupper() else "PNG", **options)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), IDS)


def test_a_huge_image_is_one_fault_among_others(street, monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)  # as if 60 x 40 were thousands
    Image.new("L", (60, 40)).save(street / "images/1.png")
    dataset = open_dataset("folder", street)
    with pytest.raises(FileFault, match=r"1\.png: 2,400 pixels, more than 60; cut it into tiles"):
        dataset[1]
    report = check(dataset)
    assert [fault.kind for fault in report.faults] == ["huge image"] and report.sizes == {(4, 6): 2}


def test_check_images_names_the_broken_files(street) -> None:
    dataset = open_dataset("folder", street)
    paths = [item.image for item in dataset.items]
    check_images(dataset)
    check_images(paths)
    (street / "images/1.png").write_bytes(b"")
    for images in (dataset, paths):
        with pytest.raises(UserError, match=r"1 of 3 images cannot be used: .*1\.png: an empty file"):
            check_images(images)
    (street / "labels/0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 of 3 images cannot be used: .*labels/0\.png: .*1\.png"):
        check_images(dataset)


def test_broken_images_are_left_out_where_that_is_asked(street, capsys) -> None:
    (street / "images/1.png").write_bytes(b"")
    asked = ImagesConfig(name="folder", root=street, split="val", skip_broken=True)
    for _ in range(2):
        rest = asked.open()
        check_images(rest)
    assert [item.name for item in rest.items] == ["0", "2"]
    line = f"warning: 1 of 3 images cannot be read and are left out: {street / 'images/1.png'}"
    # once, however often the dataset is opened
    assert [one for one in capsys.readouterr().err.splitlines() if "warning" in one] == [line]
    whole = ImagesConfig(name="folder", root=street, split="val").open()
    assert len(whole) == 3 and whole.digest() != rest.digest()
    for path in (street / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 3 images can be read"):
        asked.open()


def test_ade20k_labels_that_were_lowered_already_are_noted(tmp_path, put) -> None:
    for name, values in (("whole", (0, 1, 150, 2, 3, 4)), ("lowered", (255, 0, 149, 1, 2, 3))):
        put(f"{name}/images/validation/a.jpg", np.zeros((2, 3, 3), np.uint8))
        put(f"{name}/annotations/validation/a.png", np.array(values, np.uint8).reshape(2, 3))
    notes = {n: " ".join(check(open_dataset("ade20k", tmp_path / n)).notes) for n in ("whole", "lowered")}
    assert "255 occurs in 1 label files" in notes["lowered"] and "255" not in notes["whole"]
