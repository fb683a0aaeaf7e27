"""Plain checkpoints of segmentation networks: classes, what a segmenter of each family sees, the real ESPNetv2."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_diffusion import drawn

from fmda import cli, trees
from fmda.data import class_list, open_dataset
from fmda.diffusion.checkpoints import convert
from fmda.errors import UserError
from fmda.evaluate import Protocol, Segmenter, evaluate_dataset
from fmda.evaluate.windows import WindowGrid, score_samples
from fmda.methods.dense import normalised
from fmda.methods.segmentation import open_segmentation
from fmda.models.daformer import DaFormerConfig
from fmda.models.deeplab_v2 import DeepLabV2Config
from fmda.models.dinov2 import Dinov2Config
from fmda.models.dinov2_segmenter import Dinov2SegmenterConfig
from fmda.models.espnet_v2 import EspNetV2Config
from fmda.models.hrda import HrdaConfig
from fmda.models.lite_segmenter import LiteSegmenterConfig
from fmda.models.mask2former import HeadConfig, Mask2FormerConfig
from fmda.models.mit import MitConfig
from fmda.models.resnet import ResNetEncoderConfig
from fmda.models.segformer import SegFormerConfig
from fmda.weights.checkpoint import network_graph
from fmda.weights.load import load_segmentation
from fmda.weights.network import save

MIT = MitConfig((8, 16, 24, 32), (1, 1, 1, 1), (1, 2, 3, 4))
ESPNET = EspNetV2Config((16, 32, 48, 64), (1, 1), (16, 12, 8), classes=20, unused=1, pyramid=3)
MASKS = HeadConfig(width=32, mask_width=8, pixel_layers=1, pixel_hidden=8, layers=1, hidden=8, queries=4)
# family -> (configuration, rows and columns of the logits of an image of 50 x 70)
NETWORKS = {
    "segformer": (SegFormerConfig(MIT, 12), (13, 18)),
    "daformer": (DaFormerConfig(MIT, 12), (13, 18)),
    "hrda": (HrdaConfig(MIT, 12), (16, 16)),
    "deeplab_v2": (DeepLabV2Config(ResNetEncoderConfig(layers=(1, 1, 1, 1), deep_stem=True)), (7, 9)),
    "lite_segmenter": (LiteSegmenterConfig(width=8), (13, 18)),
    "dinov2_segmenter": (Dinov2SegmenterConfig(Dinov2Config(28, 7, 16, 4, 2, maps=(1, 2, 3, 4)), width=8), (8, 10)),
    "espnet_v2": (ESPNET, (48, 64)),
    "mask2former": (Mask2FormerConfig(ResNetEncoderConfig(layers=(1, 1, 1, 1), width=8), MASKS), (64, 64)),
}
PUBLISHED = Path(os.environ.get("FMDA_DATA", "")) / "espnetv2" / "espnetv2-s2.0-cityscapes.safetensors"


def written(family, config, folder):
    tree = trees.flatten(drawn(network_graph(family, config)[1]))
    positive = {path: np.abs(leaf) if path.endswith("var") else leaf for path, leaf in tree.items()}
    return save(family, folder, config, trees.unflatten(positive))


@pytest.mark.parametrize("family", NETWORKS)
def test_each_family_opens_as_a_segmenter_of_cityscapes_classes(family, tmp_path):
    config, samples = NETWORKS[family]
    segmenter = Segmenter.load(written(family, config, tmp_path / "net-1.5"))
    assert (segmenter.name, segmenter.classes.names[10], len(segmenter.classes)) == ("net-1.5", "sky", 19)
    predictor = segmenter.forward
    window = WindowGrid.of((50, 70), segmenter.protocol).window
    assert score_samples(predictor.forward, predictor.params, window) == samples


@pytest.fixture
def folder(tmp_path):
    return written("espnet_v2", ESPNET, tmp_path / "net")


def test_logits_without_a_class_are_left_out_and_the_others_are_the_same(folder):
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    whole = load_segmentation(folder)
    logits = np.array(whole(normalised(image[None])))
    network, classes = open_segmentation(folder)
    assert (network.config.classes, len(classes)) == (19, 19)
    np.testing.assert_allclose(network(normalised(image[None])), logits[..., :19], atol=1e-5)
    found = Segmenter.load(folder).predict(image).labels
    assert np.mean(found == logits[0, ..., :19].argmax(-1)) > 0.999
    stretched = Segmenter.load(folder, protocol=Protocol(size=(64, 64))).predict(image).labels
    assert stretched.shape == (32, 48) and not np.array_equal(found, stretched)


def named(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return open_segmentation(folder)[1]


def test_classes_are_those_of_a_file_beside_the_weights_or_of_the_configuration(folder, tmp_path):
    names = [f"thing {index}" for index in range(20)]
    assert named(folder, classes=names).names == tuple(names[:19])
    # transformers names classes in this form, or says only that there are so many
    streets = {str(index): name for index, name in enumerate(class_list("cityscapes").names)}
    assert named(folder, id2label=streets).palette.tolist()[0] == [128, 64, 128]
    assert named(folder, id2label={str(index): f"LABEL_{index}" for index in range(20)}).names[0] == "road"
    (folder / "classes.yaml").write_text("classes: synthia16\n")
    with pytest.raises(UserError, match=r"classes.yaml: lists 16 classes, and the network has 19; list these"):
        open_segmentation(folder)
    (folder / "classes.yaml").write_text("classes: cityscapes\n")
    assert named(folder, classes=names).names[0] == "road"
    other = written("espnet_v2", EspNetV2Config((16, 32, 48, 64), (1, 1), classes=6, pyramid=3), tmp_path / "other")
    with pytest.raises(UserError, match="other: has 6 classes and does not name them; write their .*classes.yaml"):
        open_segmentation(other)


def test_conversion_keeps_the_names_of_classes(folder, tmp_path):
    names = tuple(f"thing {index}" for index in range(20))
    named(folder, classes=names)
    assert open_segmentation(convert(folder, tmp_path / "new"))[1].names == names[:19]
    (folder / "classes.yaml").write_text("classes: cityscapes\n")
    assert open_segmentation(convert(folder, tmp_path / "newer"))[1].names[0] == "road"


def test_the_command_line_scores_and_predicts_with_a_protocol(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for kind, shape in (("images", (40, 56, 3)), ("labels", (40, 56))):
        (tmp_path / "data" / "val" / kind).mkdir(parents=True)
        values = rng.integers(0, 19, shape, dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / "data" / "val" / kind / "1.png")
    (tmp_path / "data" / "classes.yaml").write_text("classes: cityscapes\n")
    cli.main(["evaluate", "net", "folder", "--root", "data", "--protocol", "size=[32,32]", "resample=pillow"])
    scores = json.loads(Path("runs/net/evaluate-folder-val/scores.json").read_text())
    assert scores["model"] == "net"
    protocol = scores["scores"]["protocol"]
    assert (protocol["size"], protocol["multiple"], protocol["resample"]) == ([32, 32], 16, "pillow")
    cli.main(["predict", "net", "data/val/images", "--protocol", "scale=0.5"])
    assert np.asarray(Image.open("predictions/1.png")).shape == (40, 56)
    Path("run").mkdir()
    Path("run/model.json").write_text("{}")
    for command, line in {
        "predict net data/val/images --protocol crop=-1": "--protocol: crop: expected a whole number",
        "predict net data/val/images --protocol class_map=[x]": "class_map: is named by --class-map",
        "predict net data/val/images --protocol crop=24 --out new": "multiples of 16; crop or resize",
        "predict run data/val/images --protocol crop=24": "run: is a run, which sees images as its configuration says",
    }.items():
        with pytest.raises(SystemExit):
            cli.main(command.split())
        assert line in capsys.readouterr().err, command


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED.is_file(), reason="FMDA_DATA names no folder with espnetv2/")
@pytest.mark.parametrize(
    ("data", "split", "step", "keys", "class_map"),
    [
        ("camvid", "train-dusk", 25, {"size": (512, 1024)}, "cityscapes-to-camvid"),
        ("kitti-semantics", "train", 60, {"scale": 1.25, "multiple": 32}, None),
    ],
)
def test_published_weights_score_as_the_recorded_answers_do(data, split, step, keys, class_map):
    images = open_dataset(data, split=split)[::step]
    segmenter = Segmenter.load(PUBLISHED, protocol=Protocol(resample="pillow", **keys))
    answers = PUBLISHED.parents[1] / "black-box-espnetv2" / data / ("train" if data == "camvid" else "")
    recorded = iter([np.asarray(Image.open(answers / f"{example.name}.png")) for example in images])
    other = Segmenter(lambda image: (next(recorded), None), segmenter.classes, "recorded", "")
    found, expected = (evaluate_dataset(model, images, class_map).miou for model in (segmenter, other))
    assert found == pytest.approx(expected, abs=2e-3) and found > 0.3
