import jax
import numpy as np
import pytest
from numpy_windows import sliding_window

from fmda.data import ClassList, ClassMap, Example
from fmda.errors import UserError
from fmda.evaluate import Protocol, Scores, SegmentationEvaluator, confusion_matrix, score_on_mesh
from fmda.mesh import make_mesh

PARAMS = np.random.default_rng(5).normal(size=(3, 3)).astype(np.float32)
PROTOCOL = Protocol(resize=(64, 40), crop=32, stride=20)


def forward(params, pixels):
    """Returns three scores for each cell of four pixels."""
    n, h, w, _ = pixels.shape
    cells = pixels[:, : h // 4 * 4, : w // 4 * 4].reshape(n, h // 4, 4, w // 4, 4, 3).mean((2, 4)) / 255
    return (cells - 0.5) @ params


@pytest.fixture(scope="module")
def mesh():
    return make_mesh()


@pytest.fixture
def streets(memory):
    """Eleven images of three sizes, whose labels are what the network predicts, but for a part."""
    rng = np.random.default_rng(0)
    memory.examples.clear()
    for k in range(11):
        size = [(50, 80), (48, 77), (90, 60)][k % 3]
        image = rng.integers(0, 256, (*size, 3), np.uint8)
        scores = sliding_window(lambda windows: forward(PARAMS, windows), image, PROTOCOL)
        margin = np.diff(np.sort(scores, -1)[..., -2:])[..., 0]
        labels = np.where(margin < 1e-3, 255, scores.argmax(-1)).astype(np.uint8)  # ties may fall either way
        labels[: 4 * k] = (labels[: 4 * k] + (labels[: 4 * k] < 255)) % 3
        labels[: 4 * k][margin[: 4 * k] < 1e-3] = 255
        memory.examples.append(Example(image, labels, f"street-{k}"))
    return memory


def reference(dataset):
    """Returns the confusion matrix by NumPy alone."""
    total = np.zeros((3, 3), np.int64)
    for example in dataset.examples:
        scores = sliding_window(lambda windows: forward(PARAMS, windows), example.image, PROTOCOL)
        total += confusion_matrix(example.labels, scores.argmax(-1), 3)
    return total


def test_eight_devices_one_device_and_numpy_count_the_same(streets, mesh):
    assert mesh.size == 8
    expected = Scores.from_confusion(reference(streets), streets.classes.names, PROTOCOL)
    one = score_on_mesh(forward, PARAMS, streets, make_mesh(devices=jax.devices()[:1]), PROTOCOL)
    assert one == score_on_mesh(forward, PARAMS, streets, mesh, PROTOCOL) == expected
    assert one.protocol == PROTOCOL


def test_two_parts_merged_equal_the_whole(streets, mesh):
    whole = score_on_mesh(forward, PARAMS, streets, mesh, PROTOCOL)
    parts = [score_on_mesh(forward, PARAMS, part, mesh, PROTOCOL) for part in (streets[:4], streets[4:])]
    assert parts[0] + parts[1] == whole
    assert parts[0] == score_on_mesh(forward, PARAMS, streets, mesh, PROTOCOL, limit=4)
    with pytest.raises(UserError, match="scores of different protocols"):
        whole + Scores.from_confusion(whole.confusion, whole.names)


def test_class_maps_merge_predictions_and_labels(streets, mesh, tmp_path):
    coarse = ClassList(("ground", "thing"))
    streets.classes.save(tmp_path / "fine.yaml")
    coarse.save(tmp_path / "coarse.yaml")
    path = tmp_path / "map.yaml"
    path.write_text("from: fine.yaml\nto: coarse.yaml\nmap: {road: ground, car: thing}\n")
    protocol = Protocol(resize=(64, 40), crop=32, stride=20, class_map=(str(path),))
    scores = score_on_mesh(forward, PARAMS, streets, mesh, protocol)
    fine, step = reference(streets), ClassMap.load(path)
    table = step.apply(np.arange(3, dtype=np.uint8))
    assert table.tolist() == [0, 255, 1]
    assert scores.confusion.tolist() == fine[np.ix_([0, 2], [0, 2])].tolist()
    assert scores.void.tolist() == fine[[0, 2], 1].tolist()


def test_faults_of_the_data_are_user_errors(streets, mesh):
    streets.examples[5] = Example(streets.examples[5].image, None, "bare")
    with pytest.raises(UserError, match="'bare' has no label map"):
        score_on_mesh(forward, PARAMS, streets, mesh, PROTOCOL)
    streets.examples.clear()
    with pytest.raises(UserError, match="holds no image"):
        score_on_mesh(forward, PARAMS, streets, mesh, PROTOCOL)


def test_an_evaluator_yields_named_scores_of_a_state(streets, mesh):
    scores = score_on_mesh(forward, PARAMS, streets, mesh, PROTOCOL)
    evaluator = SegmentationEvaluator("val", 100, lambda state: state["scores"])
    values = dict(evaluator.run({"scores": scores}))
    assert (evaluator.name, evaluator.every, values["miou"]) == ("val", 100, scores.miou)
    assert values["iou/sky"] == pytest.approx(scores.iou[1])
    assert values["accuracy"] == scores.accuracy
