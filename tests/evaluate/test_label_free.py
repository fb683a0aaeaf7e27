from math import exp, log

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_windows import sliding_window
from test_scoring import PARAMS, PROTOCOL, forward

from fmda.data import Example
from fmda.errors import UserError
from fmda.evaluate import Protocol, SegmentationEvaluator, label_free_scores
from fmda.evaluate.label_free import random_pixels, soft_neighbourhood_density
from fmda.mesh import make_mesh


@pytest.fixture(scope="module")
def mesh():
    return make_mesh()


def test_density_by_hand():
    rows = jnp.array([[3.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    p = exp(1) / (exp(1) + 1)  # the first two see each other at cosine 1 and the third at 0, the third sees 0 and 0
    entropy = -p * log(p) - (1 - p) * log(1 - p)
    assert float(soft_neighbourhood_density(rows, 1.0)) == pytest.approx((2 * entropy + log(2)) / 3, rel=1e-6)
    assert float(soft_neighbourhood_density(rows)) == pytest.approx(log(2) / 3, rel=1e-6)
    assert float(soft_neighbourhood_density(jnp.ones((5, 2)))) == pytest.approx(log(4), rel=1e-6)


def test_pixels_are_a_function_of_the_seed_and_differ():
    pixels = random_pixels((6, 9), 40, (0, 3))
    assert len({tuple(p) for p in pixels.tolist()}) == 40
    assert pixels.min() == 0 and pixels.max(0).tolist() == [5, 8]
    assert np.array_equal(pixels, random_pixels((6, 9), 40, (0, 3)))
    assert not np.array_equal(pixels, random_pixels((6, 9), 40, (0, 4)))
    assert len(random_pixels((6, 9), 100, (0,))) == 54


def channels(weight, pixels):
    """Returns the channels as logits, `weight` where they are bright."""
    return pixels / 255 * weight


def test_scores_by_hand(memory, mesh):
    memory.examples[:] = [Example(np.zeros((4, 6, 3), np.uint8), None, name) for name in "ab"]
    memory.examples[0].image[..., 0] = memory.examples[1].image[..., 1] = 255
    # predictions (1/2, 1/4, 1/4) and (1/4, 1/2, 1/4)
    weight = np.float32(log(2))
    scores = label_free_scores(channels, weight, memory, mesh, Protocol(), teacher=weight)
    assert scores.snd == pytest.approx(log(23), rel=1e-5)  # all pixels of an image are alike
    assert scores.certainty == pytest.approx(1 - 1.5 * log(2) / log(3), rel=1e-5)
    assert scores.balance == pytest.approx(-(0.75 * log(0.375) + 0.25 * log(0.25)) / log(3), rel=1e-5)
    assert (scores.coverage, scores.agreement) == (2 / 3, 1)
    other = label_free_scores(channels, weight, memory, mesh, Protocol(), teacher=-weight)
    assert other == scores._replace(agreement=0)
    assert label_free_scores(channels, weight, memory, mesh, Protocol()) == scores._replace(agreement=None)
    assert label_free_scores(channels, weight, memory, mesh, Protocol(), limit=1).coverage == 1 / 3


def test_eight_devices_one_device_and_numpy_agree(memory, mesh):
    rng = np.random.default_rng(0)
    sizes = [(50, 80), (48, 77), (90, 60)]
    images = [rng.integers(0, 256, (*sizes[k % 3], 3), np.uint8) for k in range(11)]
    memory.examples[:] = [Example(image, None, str(k)) for k, image in enumerate(images)]
    student, teacher = 20 * PARAMS, 20 * PARAMS + rng.normal(size=(3, 3)).astype(np.float32) * 5
    settings = {"teacher": teacher, "pixels": 60, "seed": 5}
    assert mesh.size == 8
    found = label_free_scores(forward, student, memory, mesh, PROTOCOL, **settings)
    alone = make_mesh(devices=jax.devices()[:1])
    one = label_free_scores(forward, student, memory, alone, PROTOCOL, **settings)
    np.testing.assert_allclose(found, one, rtol=1e-12)

    rows = []
    for k, image in enumerate(images):
        place = tuple(random_pixels(image.shape[:2], 60, (5, k)).T)
        logits, other = (
            sliding_window(lambda windows, w=w: forward(w, windows), image, PROTOCOL)[place] for w in (student, teacher)
        )
        probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        density = soft_neighbourhood_density(jnp.asarray(probs, jnp.float32))
        certainty = 1 + (probs * np.log(probs)).sum(1).mean() / log(3)
        labels = logits.argmax(1)
        agreement = (labels == other.argmax(1)).mean()
        rows.append([density, certainty, agreement, *probs.mean(0), *np.bincount(labels, minlength=3)])
    snd, certainty, agreement, *rest = np.mean(rows, 0)
    mean, counts = np.split(np.array(rest), 2)
    expected = (snd, certainty, -(mean * np.log(mean)).sum() / log(3), (counts > 0).mean(), agreement)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert 0.5 < agreement < 1


def test_an_empty_dataset_is_an_error(memory, mesh):
    memory.examples.clear()
    with pytest.raises(UserError, match="holds no image"):
        label_free_scores(forward, PARAMS, memory, mesh, PROTOCOL)


def test_an_evaluator_leaves_out_the_agreement_without_a_teacher(memory, mesh):
    evaluator = SegmentationEvaluator("target", 50, lambda w: label_free_scores(forward, w, memory, mesh, PROTOCOL))
    assert (evaluator.name, evaluator.every) == ("target", 50)
    assert [name for name, _ in evaluator.run(PARAMS)] == ["snd", "certainty", "balance", "coverage"]
