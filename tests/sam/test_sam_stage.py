"""Tests of the SAM stage on graphs built by hand: batches, sizes, exporters, faults, cache, threads."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from tiny_sam import HUGGING_FACE, blocks, decoder, encoder, pair

from fmda.errors import UserError
from fmda.sam import Prompt, SamStage
from fmda.sam.stage import BACKGROUND, OBJECT, _best


def at(*points, labels=None, box=None):
    return Prompt(np.array(points, float), np.array(labels or [OBJECT] * len(points)), box)


def centres(height, width):
    """Returns one prompt in each of the four blocks."""
    return [at((width * x, height * y)) for y in (0.25, 0.75) for x in (0.25, 0.75)]


def accuracy(masks, numbers):
    return min((mask == (numbers == k)).mean() for k, mask in enumerate(masks))


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    return SamStage(pair(tmp_path_factory.mktemp("sam")))


@pytest.mark.parametrize("height, width", [(48, 64), (64, 64), (90, 40), (200, 310)])
def test_masks_have_the_size_of_any_image(sam, height, width):
    image, numbers = blocks(height, width)
    masks = sam.decode(sam.embed(image), centres(height, width))
    assert masks.masks.shape == (4, height, width) and accuracy(masks.masks, numbers) > 0.85
    np.testing.assert_allclose(masks.iou, 0.9)
    assert (masks.stability < 1).all() and (masks.stability >= 0).all()


@pytest.mark.parametrize("batch, calls", [("prompts", 1), (1, 4), (3, 2)])
def test_prompts_share_a_call_with_equal_masks(sam, tmp_path, batch, calls):
    image, _ = blocks()
    stage = SamStage(pair(tmp_path, batch=batch))
    embedding, prompts = stage.embed(image), centres(48, 64)
    masks = stage.decode(embedding, prompts)
    assert stage.calls == calls
    for prompt, mask in zip(prompts, masks.masks, strict=True):
        np.testing.assert_array_equal(sam.decode(embedding, [prompt]).masks[0], mask)


@pytest.mark.parametrize("axis, count", [(1, 1), ("masks", 1), ("prompts", 4)])
def test_one_mask_prompt_for_all_where_its_axis_has_another_name(tmp_path, monkeypatch, axis, count):
    stage = SamStage(pair(tmp_path, mask=axis))
    fed, run = {}, stage._decoder.graph.run
    monkeypatch.setattr(stage._decoder.graph, "run", lambda names, feed: fed.update(feed) or run(names, feed))
    stage.decode(stage.embed(blocks()[0]), centres(48, 64))
    assert len(fed["mask_input"]) == len(fed["has_mask_input"]) == count and len(fed["point_coords"]) == 4


def test_prompts_of_unequal_points_go_to_calls_of_their_own(tmp_path):
    stage = SamStage(pair(tmp_path))
    two = at((3, 3), (60, 40), labels=[OBJECT, BACKGROUND])
    prompts = [at((3, 3)), two, at((40, 40)), at((9, 9), box=(2, 2, 20, 20))]
    masks = stage.decode(stage.embed(blocks()[0]), prompts)
    # one point and none, two points and none or one point and two corners: lengths 2, 3, 3
    assert stage.calls == 2 and masks.masks.any((1, 2)).all()


def test_no_prompt_is_no_mask(sam):
    masks = sam.decode(sam.embed(blocks()[0]), [])
    assert masks.masks.shape == (0, 48, 64) and sam.decode(sam.embed(blocks()[0]), []).score.shape == (0,)


@pytest.mark.parametrize("candidates", [3, 4])
def test_the_candidate_of_the_highest_predicted_iou_is_taken(tmp_path, candidates):
    stage = SamStage(pair(tmp_path, candidates=candidates))
    assert stage.decode(stage.embed(blocks()[0]), [at((3, 3))]).iou == pytest.approx(0.95)


def test_the_first_of_four_candidates_is_left_out():
    assert _best(np.array([0.99, 0.3, 0.8, 0.5])) == 2
    assert _best(np.array([0.99, 0.3, 0.8])) == 0
    assert _best(np.array([0.1, np.nan, 0.8])) == 2


def test_pairs_with_the_names_of_hugging_face(sam, tmp_path):
    encoder(tmp_path / "vision.onnx", outputs=("image_embeddings", "image_positional_embeddings"))
    decoder(tmp_path / "prompts.onnx", names=HUGGING_FACE, candidates=3)
    stage = SamStage(tmp_path)
    image, numbers = blocks()
    masks = stage.decode(stage.embed(image), [*centres(48, 64), at((3, 3), box=(0, 0, 20, 20))])
    assert accuracy(masks.masks[:4], numbers) > 0.85 and stage.calls == 1


@pytest.mark.parametrize("form, shape", [("bytes", None), ("raw", None), ("raw", [48, 64, 3])])
def test_encoders_that_normalise_themselves(tmp_path, form, shape):
    encoder(tmp_path / "encoder.onnx", form=form, shape=shape)
    decoder(tmp_path / "decoder.onnx")
    stage = SamStage(tmp_path)
    if form == "raw" and shape is None:
        stage._encoder.height = stage._encoder.width = 64  # a full-size SAM pads to 1024
    image, numbers = blocks()
    assert accuracy(stage.decode(stage.embed(image), centres(48, 64)).masks, numbers) > 0.85


def test_masks_of_the_full_size_where_there_are_no_others(sam, tmp_path):
    image, numbers = blocks(64, 64)
    stage = SamStage(pair(tmp_path, low_res=False))
    assert accuracy(stage.decode(stage.embed(image), centres(64, 64)).masks, numbers) > 0.85


def test_a_size_baked_in_is_refused(tmp_path):
    stage = SamStage(pair(tmp_path, low_res=False, baked=(150, 225), drop=("orig_im_size",)))
    with pytest.raises(UserError, match="masks of 225x150 pixels of an image of 64x48; export it with the original"):
        stage.decode(stage.embed(blocks()[0]), [at((3, 3))])


def test_a_fixed_number_of_points_is_filled_up(sam, tmp_path):
    stage = SamStage(pair(tmp_path, points=3))
    embedding = stage.embed(blocks()[0])
    np.testing.assert_array_equal(
        stage.decode(embedding, [at((3, 3))]).masks, sam.decode(embedding, [at((3, 3))]).masks
    )
    with pytest.raises(UserError, match="takes 3 points, and a prompt has 6"):
        stage.decode(embedding, [at(*[(3, 3)] * 5)])


def test_logits_that_are_not_finite_make_an_empty_mask(tmp_path):
    stage = SamStage(pair(tmp_path, nan=True))
    masks = stage.decode(stage.embed(blocks()[0]), [at((3, 3))])
    assert not masks.masks.any() and masks.score == [0]


def test_an_embedding_that_is_not_finite_is_refused(tmp_path):
    encoder(tmp_path / "encoder.onnx", nan=True)
    decoder(tmp_path / "decoder.onnx")
    with pytest.raises(UserError, match="encoder.onnx: the embedding is not finite"):
        SamStage(tmp_path, cache=tmp_path / "cache").embed(blocks()[0])
    assert not list(tmp_path.glob("cache/*"))


def test_graphs_of_other_models(tmp_path):
    with pytest.raises(UserError, match="holds no .onnx file"):
        SamStage(tmp_path)
    encoder(tmp_path / "encoder.onnx")
    with pytest.raises(UserError, match="no mask decoder of a known export"):
        SamStage(tmp_path)
    decoder(tmp_path / "decoder.onnx", drop=("point_labels",))
    with pytest.raises(UserError, match=r"decoder.onnx: inputs .*\(missing point_labels\)"):
        SamStage(tmp_path)
    decoder(tmp_path / "decoder.onnx")
    decoder(tmp_path / "second.onnx")
    with pytest.raises(UserError, match=r"each a SAM's mask decoder \(decoder.onnx, second.onnx\)"):
        SamStage(tmp_path)
    (tmp_path / "second.onnx").unlink()
    (tmp_path / "encoder.onnx").unlink()
    with pytest.raises(UserError, match="no graph of one image input"):
        SamStage(tmp_path)


@pytest.mark.parametrize("keep", [0, 100, -60])
def test_a_truncated_file(tmp_path, keep):
    path = pair(tmp_path) / "decoder.onnx"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"decoder.onnx: (no whole ONNX graph|inputs)|no mask decoder"):
        SamStage(tmp_path)


def test_an_image_of_another_type(sam):
    for image in (np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(UserError, match="give uint8"):
            sam.embed(image)


def counted(stage, monkeypatch):
    calls = []
    run = stage._encoder.graph.run
    monkeypatch.setattr(stage._encoder.graph, "run", lambda *args: calls.append(1) or run(*args))
    return calls


def test_a_cached_image_is_not_encoded_again(tmp_path, monkeypatch):
    image, cache = blocks()[0], tmp_path / "cache"
    plain = SamStage(pair(tmp_path / "sam"))
    stage = plain.cached(cache)
    assert stage.graphs == plain.graphs and stage.fingerprint == plain.fingerprint
    calls = counted(stage, monkeypatch)
    first = stage.embed(image)
    np.testing.assert_array_equal(stage.embed(image).arrays, first.arrays)
    assert len(calls) == 1
    stage.embed(image[:, ::-1])
    assert len(calls) == 2 and len(list(cache.iterdir())) == 2
    damaged = sorted(cache.iterdir())
    for path in damaged:
        path.write_bytes(path.read_bytes()[:200])
    np.testing.assert_array_equal(stage.embed(image).arrays, first.arrays)
    assert len(calls) == 3


def test_the_cache_drops_the_least_recently_used(tmp_path):
    stage = SamStage(pair(tmp_path / "sam"), cache=tmp_path / "cache", cache_bytes=2 * 3300)
    images = [np.full((8, 8, 3), k, np.uint8) for k in range(3)]
    names = []
    for place, image in enumerate(images):
        stage.embed(image)
        names += [path for path in (tmp_path / "cache").iterdir() if path not in names]
        os.utime(names[-1], ns=(place * 10**9, place * 10**9))
    stage.embed(images[1])
    stage.embed(np.full((8, 8, 3), 9, np.uint8))
    assert sorted(path in names[:1] for path in (tmp_path / "cache").iterdir()) == [False, False]
    assert names[1].is_file() and not names[2].is_file()


def test_work_ahead_is_in_order_and_bounded(sam):
    begun, release = [], threading.Event()

    def work(item):
        begun.append(item)
        release.wait(10)
        return item * item

    results = sam.over(work, iter(range(20)))
    timer = threading.Timer(0.3, release.set)
    timer.start()
    assert next(results) == 0 and len(begun) <= 2 * sam.threads + 1
    assert list(results) == [k * k for k in range(1, 20)]
    timer.join()


REAL = Path(os.environ.get("FMDA_DATA", "/nowhere"))


@pytest.mark.skipif(not (REAL / "sam").is_dir(), reason="the weights of a real SAM are not on this machine")
def test_a_real_sam_makes_the_masks_that_its_graph_makes():
    from fmda.data import read_image

    stage = SamStage(REAL / "sam")
    image = read_image(next((REAL / "camvid/train/images").glob("0001TP*.jpg")))
    embedding = stage.embed(image)
    box = at((240, 180), box=(100, 90, 380, 300))
    masks = stage.decode(embedding, [at((240, 300)), at((100, 100), (120, 110)), box])
    feed = {
        "image_embeddings": embedding.arrays, "mask_input": np.zeros((1, 1, 256, 256), np.float32),
        "has_mask_input": np.zeros(1, np.float32), "orig_im_size": np.array(image.shape[:2], np.float32),
        "point_coords": np.array([[[240, 300], [0, 0]]], np.float32) * 1024 / 480,
        "point_labels": np.array([[1, -1]], np.float32),
    }  # fmt: skip
    expected, iou = stage._decoder.graph.session.run(["masks", "iou_predictions"], feed)
    clear = np.abs(expected[0, 0]) > 1e-3  # three prompts at once and one alone need not be rounded alike
    np.testing.assert_array_equal(masks.masks[0][clear], expected[0, 0][clear] > 0)
    np.testing.assert_allclose(masks.iou[0], iou[0, 0], rtol=1e-6)
    assert clear.mean() > 0.999 and masks.masks.any((1, 2)).all()
