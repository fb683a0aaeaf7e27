"""Published weights of a distilled MobileSAM, out of its ONNX graphs: equal to onnxruntime on real photographs."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from fmda.errors import UserError
from fmda.models.sam.network import SAM, masks_at

pytest.importorskip("onnx")
from fmda.weights.sam_onnx import load_sam_onnx

DATA = Path(os.environ.get("FMDA_DATA", ""))
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
FILES = (DATA / "sam/encoder.onnx", DATA / "sam/sam.onnx")
published = pytest.mark.skipif(not FILES[1].is_file(), reason="FMDA_DATA names no folder with sam/")


def photographs():
    return sorted((DATA / "camvid/val/images").iterdir())[40], sorted(
        (DATA / "kitti-semantics/training/image_2").iterdir()
    )[7]


def prepared(path):
    """Returns (normalised pixels [1, 1024, 1024, 3], size of the photograph)."""
    image = Image.open(path).convert("RGB")
    scale = 1024 / max(image.size)
    resized = np.asarray(image.resize([int(side * scale + 0.5) for side in image.size], Image.Resampling.BILINEAR))
    pixels = np.zeros((1, 1024, 1024, 3), np.float32)
    pixels[0, : resized.shape[0], : resized.shape[1]] = (resized - np.float32(MEAN)) / np.float32(STD)
    return pixels, (image.height, image.width)


def session(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def encoded():
    """Returns [(pixels, size, onnxruntime's embedding [1, 256, 64, 64])] of two photographs."""
    encoder = session(FILES[0])
    images = [prepared(path) for path in photographs()]
    return [(pixels, size, encoder.run(None, {"input": pixels.transpose(0, 3, 1, 2)})[0]) for pixels, size in images]


@pytest.fixture(scope="module")
def sam():
    return load_sam_onnx(*FILES)


def prompts(size):
    """Yields (points, labels) of ten prompts: single points, boxes, an object's and a background's point."""
    rng = np.random.default_rng(size[0])
    extent = np.array(size[::-1]) * 1024 / max(size)
    for n in range(10):
        first, second = np.sort(rng.uniform(0.05, 0.95, (2, 2)), axis=0) * extent
        if n < 5:
            yield [first, (0, 0)], [1, -1]
        elif n < 8:
            yield [first, second], [2, 3]
        else:
            yield [first, second, (0, 0)], [1, 0, -1]


@pytest.mark.slow
@published
def test_decoder_equals_onnxruntime_on_twenty_prompts(sam, encoded):
    decoder = session(FILES[1])
    decode = jax.jit(lambda params, *inputs: nnx.merge(sam.graphdef, params).decode_labelled(*inputs))
    for _, size, embedding in encoded:
        for points, labels in prompts(size):
            points, labels = np.array([points], np.float32), np.array([labels], np.float32)
            inputs = {
                "image_embeddings": embedding, "point_coords": points, "point_labels": labels,
                "mask_input": np.zeros((1, 1, 256, 256), np.float32), "has_mask_input": np.zeros(1, np.float32),
                "orig_im_size": np.array(size, np.float32),
            }  # fmt: skip
            masks, score, low = decoder.run(None, inputs)
            ours, scores = (
                np.asarray(one)[0, 0]
                for one in decode(sam.params, embedding.transpose(0, 2, 3, 1), points[None], labels[None])
            )
            # of the four masks that export returns the best: the first one where there are more than two points
            best = np.argmax(scores + (labels.size - 2.5) * np.array([1000, 0, 0, 0]))
            assert abs(scores[best] - score[0, 0]) < 1e-4
            assert np.abs(ours[best] - low[0, 0]).max() < 1e-4 * np.abs(low).max()
            whole = np.asarray(masks_at(ours[None, best], 1024, size))
            assert ((whole[0] > 0) == (masks[0, 0] > 0)).mean() >= 0.999


@published
@pytest.mark.slow
def test_encoder_equals_onnxruntime(sam, encoded):
    assert sam.config == SAM["mobile-sam"]
    pixels, _, embedding = encoded[0]
    theirs = embedding.transpose(0, 2, 3, 1)
    assert np.abs(np.asarray(sam.encode(pixels)) - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_a_file_that_is_no_graph_is_one_line(tmp_path):
    path = tmp_path / "encoder.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(UserError, match=r"encoder.onnx: cannot be read as an ONNX graph \(.*\); copy it again"):
        load_sam_onnx(path, path)
