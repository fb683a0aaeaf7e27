import json

import numpy as np
import pytest
from PIL import Image

from fmda.data import ClassList
from fmda.errors import UserError
from fmda.evaluate import Segmenter
from fmda.evaluate.predict import predict_files

IMAGE = np.zeros((6, 9, 3), np.uint8)
IMAGE[:, 3:, 0] = 120
IMAGE[:, 6:, 0] = 220


def test_array_file_list_and_folder_give_the_same_labels(segmenter, tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "b.png")
    Image.fromarray(IMAGE[::-1, ::-1].copy()).save(tmp_path / "a.png")
    expected = np.repeat([[0, 0, 0, 1, 1, 1, 2, 2, 2]], 6, 0)
    one = segmenter.predict(IMAGE)
    assert one.labels.dtype == np.uint8
    np.testing.assert_array_equal(one.labels, expected)
    np.testing.assert_array_equal(segmenter.predict(tmp_path / "b.png").labels, expected)
    first, second = segmenter.predict(tmp_path)
    assert (first.name, second.name) == ("a", "b")
    np.testing.assert_array_equal(first.labels, expected[:, ::-1])
    several = segmenter.predict([IMAGE, str(tmp_path / "a.png")])
    np.testing.assert_array_equal(several[1].labels, first.labels)


def test_grey_and_opaque_alpha_are_understood(segmenter):
    grey = segmenter.predict(IMAGE[..., 0])
    alpha = segmenter.predict(np.concatenate([IMAGE, np.full((6, 9, 1), 255, np.uint8)], -1))
    np.testing.assert_array_equal(grey.labels, alpha.labels)
    assert grey.image.shape == (6, 9, 3)


@pytest.mark.parametrize(
    ("source", "word"),
    [
        (IMAGE.astype(np.float32), "type float32"),
        (IMAGE.astype(np.uint16), "type uint16"),
        (IMAGE[None], "is no image"),
        (IMAGE[..., :2], "is no image"),
        (np.zeros((6, 9, 4), np.uint8), "transparent"),
        (np.zeros((0, 9, 3), np.uint8), "is no image"),
        ("missing.png", "missing.png"),
    ],
)
def test_bad_images_are_one_line_errors(segmenter, source, word):
    with pytest.raises(UserError, match=word) as caught:
        segmenter.predict(source)
    assert "\n" not in str(caught.value)


def test_truncated_file_and_empty_folder_are_named(segmenter, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:3000])
    with pytest.raises(UserError, match="x.png"):
        segmenter.predict(tmp_path / "x.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image"):
        segmenter.predict(tmp_path / "empty")


def test_saved_label_map_keeps_indices_and_colours(segmenter, classes, tmp_path):
    result = segmenter.predict(IMAGE)
    labels, picture = result.save(tmp_path / "deep" / "street")
    with Image.open(labels) as saved:
        assert saved.mode == "P"
        np.testing.assert_array_equal(np.asarray(saved), result.labels)
        np.testing.assert_array_equal(np.asarray(saved.convert("RGB")), classes.palette[result.labels])
    assert picture.name == "street_overlay.jpg"
    with Image.open(picture) as saved:
        assert saved.width == 9


def test_overlay_default_image_and_none(segmenter, classes):
    result = segmenter.predict(IMAGE)
    assert result.overlay(alpha=0).max() == 220
    np.testing.assert_array_equal(result.overlay(), result.overlay(IMAGE))
    bare = type(result)(result.labels, None, classes)
    np.testing.assert_array_equal(bare.overlay(), classes.palette[result.labels])


def make_segmenter(folder):
    """The loader that a run folder names."""
    values = json.loads((folder / "model.json").read_text())
    return Segmenter(lambda image: (np.full(image.shape[:2], values["label"]), None), CLASS_LIST, "constant", "")


def write_model(folder, **values):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(json.dumps(values))


def test_load_calls_the_named_loader_also_one_stage_below(classes, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "CLASS_LIST", classes)
    write_model(tmp_path / "run" / "rank", loader=f"{__name__}:make_segmenter", label=2)
    # another model of that run, which is opened by its own folder alone
    write_model(tmp_path / "run" / "rank" / "teacher", loader=f"{__name__}:make_segmenter", label=1)
    package = __name__.split(".")[0]
    for folder in (tmp_path / "run", tmp_path / "run" / "rank"):
        loaded = Segmenter.load(folder, packages=(package,))
        assert (loaded.predict(IMAGE).labels == 2).all()


def test_load_refuses_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        Segmenter.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="no model.json"):
        Segmenter.load(tmp_path)
    write_model(tmp_path / "a", loader="shutil:rmtree")
    with pytest.raises(UserError, match="not of fmda"):
        Segmenter.load(tmp_path / "a")
    assert (tmp_path / "a" / "model.json").exists()
    write_model(tmp_path / "b", loader="fmda.evaluate:no_such_function")
    with pytest.raises(UserError, match="does not exist"):
        Segmenter.load(tmp_path / "b")
    with pytest.raises(UserError, match="several models"):
        Segmenter.load(tmp_path)
    write_model(tmp_path / "c", model="x")
    with pytest.raises(UserError, match="module:function"):
        Segmenter.load(tmp_path / "c")


def test_predict_files_writes_and_replaces_no_other_file(segmenter, tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "one.png")
    Image.fromarray(IMAGE).save(tmp_path / "two.jpg", quality=100)
    out = tmp_path / "out"
    records = list(predict_files(segmenter, [tmp_path], out))
    assert sorted(p.name for p in out.iterdir()) == [
        "one.png",
        "one_overlay.jpg",
        "predictions.jsonl",
        "two.png",
        "two_overlay.jpg",
    ]
    assert records[0]["classes"] == {"car": 0.3333, "sky": 0.3333, "road": 0.3333}
    before = (out / "one.png").stat().st_mtime_ns
    (tmp_path / "other").mkdir()
    Image.fromarray(IMAGE + 1).save(tmp_path / "other/one.png")
    with pytest.raises(UserError, match=r"one\.png: was predicted from .*one\.png; choose another output"):
        list(predict_files(segmenter, [tmp_path / "other/one.png"], out))
    other = Segmenter(segmenter.forward, segmenter.classes, segmenter.name, "another model")
    with pytest.raises(UserError, match="was predicted by another model"):
        list(predict_files(other, [tmp_path / "one.png"], out))
    assert (out / "one.png").stat().st_mtime_ns == before
    (out / "predictions.jsonl").unlink()
    with pytest.raises(UserError, match="exists already"):
        list(predict_files(segmenter, [tmp_path / "one.png"], out))
    with pytest.raises(UserError, match="same name"):
        list(predict_files(segmenter, [tmp_path / "one.png", tmp_path / "one.png"], tmp_path / "new"))


def test_a_broken_image_stops_no_other_and_the_call_resumes(segmenter, tmp_path):
    images, out, calls = tmp_path / "images", tmp_path / "out", []
    images.mkdir()
    for name in ("a", "b", "c"):
        Image.fromarray(IMAGE).save(images / f"{name}.png")
    (images / "b.png").write_bytes((images / "a.png").read_bytes()[:45])
    (images / "notes.heic").write_bytes(b"")
    (images / "._a.png").write_bytes(b"")

    def counted(image):
        calls.append(1)
        return segmenter.forward(image)

    model = Segmenter(counted, segmenter.classes, segmenter.name, segmenter.fingerprint)

    def predicted() -> list[str]:
        names = []
        with pytest.warns(UserWarning, match=r"1 files are skipped, not images by their suffix: notes\.heic"):
            for record in predict_files(model, [images], out):
                names.append(record["labels"].rpartition("/")[2])
        return names

    with pytest.raises(UserError, match=r"1 of 3 images could not be predicted: .*b\.png: truncated"):
        predicted()
    assert len(calls) == 2 and not (out / "b.png").exists()
    Image.fromarray(IMAGE).save(images / "b.png")
    assert predicted() == ["a.png", "b.png", "c.png"] and len(calls) == 3
    # an image that changed is predicted again, and so is one whose files were lost
    Image.fromarray(IMAGE + 1).save(images / "c.png")
    (out / "a_overlay.jpg").unlink()
    assert predicted() == ["a.png", "b.png", "c.png"] and len(calls) == 5


def test_a_fault_of_the_model_names_the_image(tmp_path):
    def refuse(image):
        raise UserError("image of 1x1 pixels is smaller than one patch; enlarge it")

    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    model = Segmenter(refuse, ClassList(["road"]), "refusing", "0")
    with pytest.raises(UserError, match=r"a\.png: image of 1x1 pixels"):
        model.predict(tmp_path / "a.png")
