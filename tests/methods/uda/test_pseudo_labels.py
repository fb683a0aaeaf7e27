"""Kind `pseudo-labels`: thresholds by hand, a dataset that opens, resume."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import small_place

from fmda.data import ClassList, open_dataset, read_image
from fmda.errors import UserError
from fmda.evaluate import Predictor, Protocol, Segmenter
from fmda.methods.kinds import open_run
from fmda.methods.uda.pseudo_labels import LEVELS, confident_forward, histogram, sure_labels, thresholds

CONFIG = """kind: pseudo-labels
data: {name: folder, root: data, split: val}
segmenter: model
"""


def kept(labels, confidence, quantile, cap):
    """Returns the labels of a list of pixels after thresholds over these alone."""
    labels = np.asarray(labels, np.uint8)[None]
    confidence = np.round(np.asarray(confidence)[None] * LEVELS).astype(np.uint16)
    levels = thresholds(histogram(labels, confidence, 3), quantile, cap)
    return sure_labels(labels, confidence, levels)[0].tolist()


def test_a_quantile_of_each_class():
    # of five pixels the element at place round(5 x 0.66) = 3 of the sorted ones is the least that stays
    assert kept([1] * 5, [0.1, 0.5, 0.2, 0.4, 0.3], 0.66, 0.9) == [255, 1, 255, 1, 255]
    # each class by itself, a confidence of the cap always suffices, a class of one pixel keeps it
    assert kept([0, 0, 0, 1, 2, 2, 255], [0.91, 0.95, 0.99, 0.1, 0.89, 0.999, 1], 0.66, 0.9) == [
        0, 0, 0, 1, 255, 2, 255,
    ]  # fmt: skip
    # the most confident fifth of a class, without a cap
    assert kept([1] * 5, [0.95, 0.99, 0.96, 0.98, 0.97], 0.8, 1.0) == [255, 1, 255, 255, 255]
    assert kept([2] * 4, [0.2, 0.2, 0.2, 0.2], 0.66, 0.9) == [2] * 4


def network(predicted):
    """Returns a segmenter by colour: red, green and blue are the classes."""

    def scores(params, pixels):
        predicted.append(pixels.shape)
        return pixels / 64

    classes = ClassList(["road", "car", "sky"])
    return Segmenter(Predictor(scores, {}, Protocol()), classes, "colours", "0" * 16)


def test_confidence_is_a_probability():
    image = np.zeros((4, 4, 3), np.uint8)
    image[..., 1] = 64
    labels, scores = confident_forward(network([]))(image)
    assert (labels == 1).all()
    np.testing.assert_allclose(scores, np.e / (np.e + 2), rtol=1e-5)
    other = Segmenter(lambda image: (labels, jnp.full((4, 4), 0.5)), ClassList(["a"]), "", "")
    assert confident_forward(other) is other.forward


@pytest.fixture
def place(tmp_path, monkeypatch):
    small_place.draw_labelled(tmp_path / "data")
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Segmenter, "load", lambda source: network([]))
    return tmp_path


def execute(place, *overrides):
    open_run(place / "run.yaml", ["work_dir=run", *overrides]).execute(lambda _: None)
    return place / "run"


def test_a_run_writes_a_dataset_and_resumes(place):
    run = execute(place, "quantile=0.5", "cap=1")
    dataset = open_dataset("folder", run / "dataset", "train")
    assert dataset.classes.names == ("road", "car", "sky") and [item.name for item in dataset.items] == ["0", "1"]
    example = dataset[0]
    np.testing.assert_array_equal(example.image, read_image(place / "data/val/images/0.png"))
    whole = np.concatenate([one.labels for one in dataset])
    facts = json.loads((run / "dataset/stage.json").read_text())["outputs"]
    assert facts["kept"] == pytest.approx((whole != 255).mean())
    assert 0.45 < facts["kept"] < 0.6
    for label, row in enumerate(facts["classes"].values()):
        assert row["kept"] == pytest.approx((whole == label).mean())
    # the pixels that are kept are those where the network is right: the colour that is the largest
    colours = np.concatenate([one.image for one in dataset]).argmax(-1)
    assert (whole[whole != 255] == colours[whole != 255]).all()

    files = {path: path.read_bytes() for path in (run / "dataset").rglob("*.png")}
    before = (run / "predict/labels/1.png").stat().st_mtime_ns
    (run / "predict/confidence/0.png").unlink()
    for stage in ("predict", "dataset"):
        (run / stage / "stage.json").unlink()
    execute(place, "quantile=0.5", "cap=1")
    assert {path: path.read_bytes() for path in files} == files
    assert (run / "predict/labels/1.png").stat().st_mtime_ns == before


def test_one_image_and_faults(place):
    run = execute(place, 'data.only=["1"]')
    assert [path.name for path in (run / "dataset/train/labels").iterdir()] == ["1.png"]
    assert Path(run / "dataset/train/images/1.png").is_symlink()
    for override, words in (("data.split=night", "night"), ('data.only=["7"]', "no image '7'")):
        with pytest.raises(UserError, match=words):
            execute(place, override, "work_dir=other")
    assert open_run(place / "run.yaml").plan().notes == ("2 images",)
