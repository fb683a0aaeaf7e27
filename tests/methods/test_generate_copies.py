"""The stage that compares generated images with the training image."""

import json

import numpy as np
import pytest
from PIL import Image

from fmda.diffusion.manifest import MANIFEST
from fmda.errors import UserError
from fmda.evaluate.sections import read_sections
from fmda.methods.generate.copies import write_copies
from fmda.methods.generate.settings import CopyConfig


def picture(seed, height, width):
    """Returns coarse random colours, so that crops of one picture share patches and others do not."""
    cells = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return cells.repeat(8, 0).repeat(8, 1)[:height, :width]


@pytest.fixture
def place(tmp_path):
    """A training image, two others beside it, and a generated set: one crop of the training image, one new image."""
    (tmp_path / "domain").mkdir()
    (tmp_path / "set/images").mkdir(parents=True)
    target = picture(0, 48, 96)
    for seed in range(3):
        Image.fromarray(picture(seed, 48, 96)).save(tmp_path / f"domain/{seed}.png")
    rows = []
    for index, image in enumerate((target[:32, 8:40], picture(9, 32, 32))):
        file = f"images/im_{index:06d}_p0.png"
        Image.fromarray(image).save(tmp_path / "set" / file)
        rows.append(
            {"index": index, "file": file, "prompt": "a", "prompt_index": 0, "class_index": None, "class_name": None,
             "seed": 0, "attempt": 0, "scores": {}, "facts": {}}
        )  # fmt: skip
    (tmp_path / "set" / MANIFEST).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_copied_crop_stands_out_against_other_images_of_the_target(place):
    config = CopyConfig(image=place / "domain/0.png", others=place / "domain", crops=64)
    record = write_copies(config, place / "set", place)
    copied, new = json.loads((place / "copies.json").read_text())["scores"]
    assert copied > max(new, record["limit"]) and record["copies"] == (0.5 if new <= record["limit"] else 1)
    [section] = read_sections(place)
    # the training image lies among the others and is left out
    assert [row[:2] for row in section.table.rows] == [("generated", 2), ("crops of other images of the target", 2)]
    assert (place / section.image).is_file()


def test_faults_name_the_image(place):
    Image.fromarray(picture(0, 24, 96)).save(place / "small.png")
    with pytest.raises(UserError, match=r"small.png has 96x24 pixels, a generated one 32x32"):
        write_copies(CopyConfig(image=place / "small.png"), place / "set", place)
    (place / "alone").mkdir()
    Image.fromarray(picture(0, 48, 96)).save(place / "alone/0.png")
    with pytest.raises(UserError, match="holds no other image"):
        write_copies(CopyConfig(image=place / "domain/0.png", others=place / "alone"), place / "set", place)
