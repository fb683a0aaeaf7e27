"""Tests of regions, prompts from label maps, and both refinements; values by hand."""

import numpy as np
import pytest
from tiny_sam import blocks, pair

from fmda.errors import UserError
from fmda.sam import Embedding, Evidence, Improved, Masks, Roles, SamStage, automatic_masks, refine
from fmda.sam.automatic import grid, suppressed
from fmda.sam.prompts import MOST, box_and_points, components, random_points
from fmda.sam.refine import paper, voted

NONE = 255


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    return SamStage(pair(tmp_path_factory.mktemp("sam")))


class Answers:
    """A SAM that answers with given masks, whatever it is asked."""

    def __init__(self, *masks):
        self.masks, self.asked = masks, []

    def decode(self, embedding, prompts):
        self.asked = list(prompts)
        masks = np.array(self.masks[: len(prompts)], bool).reshape(len(prompts), *embedding.size)
        return Masks(masks, np.ones(len(prompts)), np.ones(len(prompts)))


def embedding(label_map):
    return Embedding(np.zeros((1, 1, 1, 1), np.float32), label_map.shape)


def regions(*masks):
    return Masks(np.array(masks, bool), np.ones(len(masks)), np.ones(len(masks)))


def halves():
    """Returns a 4x8 map of classes 0 and 1 in halves, and the masks of both."""
    left = np.zeros((4, 8), bool)
    left[:, :4] = True
    return np.where(left, 0, 1).astype(np.uint8), left, ~left


def test_grid_of_nearly_square_cells():
    np.testing.assert_allclose(grid(2, 4, 2), [[1, 1], [3, 1]])
    assert len(grid(360, 480, 48)) == 48 and len(grid(375, 1242, 48)) == 52 and len(grid(5, 500, 1)) == 1


def test_suppression_by_masks():
    a, b, c = (np.zeros((4, 8), bool) for _ in range(3))
    a[:, :4], b[:, :5], c[:, 4:] = True, True, True
    # IoU of a and b is 16/20, of b and c 4/32
    masks, scores = np.array([a, b, c]), np.array([0.5, 0.9, 0.7])
    assert suppressed(masks, scores, 0.79).tolist() == [1, 2]
    assert suppressed(masks, scores, 0.81).tolist() == [1, 2, 0]
    assert suppressed(masks[:0], scores[:0], 0.5).tolist() == []


def test_automatic_masks_are_the_regions_of_the_image(sam):
    image, numbers = blocks()
    made = sam.embed(image)
    found = automatic_masks(sam, made, 16, least_iou=0.5, least_stability=0.0, most_overlap=0.7)
    assert len(found.masks) == 4
    assert sorted(int(numbers[mask].mean().round()) for mask in found.masks) == [0, 1, 2, 3]
    assert not len(automatic_masks(sam, made, 16, least_iou=0.95, least_stability=0.0, most_overlap=0.7).masks)


def test_components_of_four_neighbours():
    label_map = np.full((5, 6), NONE, np.uint8)
    label_map[0, 0] = label_map[1, 1] = 3
    label_map[3:, 2:5] = 1
    found = components(label_map, 0)
    facts = [(c.label, c.area, c.box) for c in found]
    assert facts == [(1, 6, (2, 3, 5, 5)), (3, 1, (0, 0, 1, 1)), (3, 1, (1, 1, 2, 2))]
    assert [c.area for c in components(label_map, 1)] == [6]
    assert [c.label for c in components(label_map, 0, only=[3])] == [3, 3]
    assert components(np.full((5, 6), NONE, np.uint8), 0) == []


def test_of_very_many_components_the_largest_are_kept():
    label_map = (np.indices((150, 150)).sum(0) % 2).astype(np.uint8)  # 22,500 of one pixel
    label_map[:10, :10] = 1
    found = components(label_map, 0)
    assert len(found) == MOST and max(c.area for c in found) >= 100
    assert max(part.label for part in components(np.zeros((1, 1), np.uint8), 0)) == 0


def test_random_points_are_different_pixels_of_the_component():
    label_map, left, _ = halves()
    part = components(label_map, 0)[0]
    prompt = random_points(part, 5, np.random.default_rng(0))
    assert len(np.unique(prompt.points, axis=0)) == 5 and (prompt.labels == 1).all()
    assert all(left[y, x] for x, y in prompt.points)
    assert random_points(part, 17, np.random.default_rng(0)) is None


def test_box_with_the_innermost_pixel_and_pixels_of_the_neighbours():
    label_map = np.zeros((20, 30), np.uint8)
    label_map[5:14, 10:19] = 2
    label_map[5:14, 19:] = 7
    prompt = box_and_points(components(label_map, 0, only=[2])[0], label_map)
    assert prompt.box == (10, 5, 18, 13) and prompt.labels.tolist() == [1, 0, 0]
    assert prompt.points[0].tolist() == [14, 9]
    beside = [label_map[y, x] for x, y in prompt.points[1:]]
    assert beside == [0, 7]
    alone = box_and_points(components(np.full((1, 1), 2, np.uint8), 0)[0], np.full((1, 1), 2, np.uint8))
    assert alone.points.tolist() == [[0, 0]] and alone.box == (0, 0, 0, 0)


def test_the_paper_takes_components_above_5000_pixels():
    label_map = np.full((768, 768), NONE, np.uint8)
    label_map[:50, :100] = 1
    label_map[100:150, :100] = 2
    label_map[150, 0] = 2
    stage = Answers(label_map == 2)
    refined = paper(stage, embedding(label_map), label_map)
    assert len(stage.asked) == 1 and stage.asked[0].points.shape == (5, 2)
    np.testing.assert_array_equal(refined.labels, np.where(label_map == 2, 2, NONE))
    assert refined.covered.sum() == 5001


def test_the_paper_clears_pixels_of_two_masks_also_of_one_class():
    label_map, left, right = halves()
    wide = left.copy()
    wide[:, 4] = True
    refined = paper(Answers(wide, right), embedding(label_map), label_map)
    assert (refined.labels[:, :4] == 0).all() and (refined.labels[:, 4] == NONE).all()
    assert (refined.labels[:, 5:] == 1).all() and refined.covered.mean() == 7 / 8


def test_the_paper_leaves_a_map_without_components_and_repeats_its_points():
    empty = np.full((50, 50), NONE, np.uint8)
    np.testing.assert_array_equal(paper(Answers(), embedding(empty), empty).labels, empty)
    label_map, left, right = halves()
    prompts = [paper(Answers(left, right), embedding(label_map), label_map).prompts for _ in range(2)]
    np.testing.assert_array_equal(prompts[0][1].points, prompts[1][1].points)


def test_a_region_takes_the_class_of_most_of_its_pixels():
    label_map, left, right = halves()
    noisy = label_map.copy()
    noisy[0, :2], noisy[1, 0] = 1, NONE
    settings = Improved(uncovered="map", contested=1)
    refined = voted(noisy, regions(left), np.ones(2), Roles(2), settings)
    np.testing.assert_array_equal(refined.labels, label_map)
    assert refined.classes.tolist() == [0] and refined.covered.sum() == 16
    ignored = voted(noisy, regions(left), np.ones(2), Roles(2), Improved(contested=1)).labels
    assert (ignored[right] == NONE).all() and (ignored[left] == 0).all()


def test_a_region_that_contradicts_the_map_is_refused():
    label_map = np.repeat(np.arange(4, dtype=np.uint8), 4).reshape(2, 8)
    both = np.ones((2, 8), bool)
    refined = voted(label_map, regions(both), np.ones(4), Roles(4), Improved(uncovered="map"))
    assert refined.classes.tolist() == [NONE]
    np.testing.assert_array_equal(refined.labels, label_map)
    # the weights decide, but not against nearly all pixels
    assert voted(label_map, regions(both), np.array([1, 9, 1, 1.0]), Roles(4), Improved()).classes.tolist() == [1]
    rare = np.where(np.arange(16).reshape(2, 8) < 2, 1, 0).astype(np.uint8)
    assert voted(rare, regions(both), np.array([1, 99.0]), Roles(2), Improved()).classes.tolist() == [NONE]


def test_smaller_regions_lie_above_larger_ones():
    label_map, left, right = halves()
    label_map[:, 4:6] = 0
    refined = voted(label_map, regions(right & (np.arange(8) >= 6), left | right), np.ones(2), Roles(2), Improved())
    assert (refined.labels[:, 6:] == 1).all() and (refined.labels[:, :6] == 0).all()


def test_kept_and_contested_classes_stay_in_regions_of_others():
    label_map = np.zeros((2, 10), np.uint8)
    label_map[:, 1], label_map[:, 2:5], label_map[:, 5] = 1, 2, 3
    everything = regions(np.ones((2, 10), bool))

    def labels(**roles):
        return voted(label_map, everything, np.ones(4), Roles(4, **roles), Improved()).labels[0]

    assert labels().tolist() == [0, 0, 2, 2, 2, 0, 0, 0, 0, 0]  # 2 has three tenths
    assert labels(things=frozenset([2])).tolist() == [0] * 10
    assert labels(kept=frozenset([1, 3])).tolist() == [0, 1, 2, 2, 2, 3, 0, 0, 0, 0]


def test_no_region_leaves_the_map_or_nothing():
    label_map, _, _ = halves()
    none = Masks(np.zeros((0, 4, 8), bool), np.zeros(0), np.zeros(0))
    weights = Evidence.of(label_map, none, 2).weights(0.5, 0.5)
    assert weights.tolist() == [0, 0]
    kept = voted(label_map, none, weights, Roles(2), Improved(uncovered="map"))
    np.testing.assert_array_equal(kept.labels, label_map)
    assert (voted(label_map, none, weights, Roles(2), Improved()).labels == NONE).all()


def test_weights_of_classes_by_agreement_and_rarity():
    label_map, left, right = halves()
    label_map[0] = 0  # class 1 has three quarters of the right half
    evidence = Evidence.of(label_map, regions(left, right), 3)
    # class 0: (16 * 1 + 4 / 4) of 20 votes; class 1: 12 * 3 / 4 of 12
    np.testing.assert_allclose(evidence.agreement, [17, 9, 0])
    np.testing.assert_allclose(evidence.votes, [20, 12, 0])
    np.testing.assert_allclose(evidence.weights(1, 0), np.array([17 / 20, 3 / 4, 0]) / (17 / 20))
    shares = np.array([20, 12]) / 32 + 1e-3
    np.testing.assert_allclose(evidence.weights(0, 1)[:2], (1 / shares) * shares[1])
    twice = (evidence + evidence).weights(0.5, 0.5)
    np.testing.assert_allclose(twice, evidence.weights(0.5, 0.5))


def test_things_are_prompted_with_boxes_on_demand(sam):
    image, numbers = blocks()
    label_map = np.where(numbers == 0, 1, 0).astype(np.uint8)
    label_map[:8, :8] = 0
    settings = Improved(boxes=True, points=4, least_stability=0)
    refined = refine(sam, image, label_map, Roles(2, things=frozenset([1])), settings)
    boxes = [prompt for prompt in refined.prompts if prompt.box is not None]
    assert len(boxes) == 1 and len(refined.masks.masks) == len(refined.classes) > 4
    assert (refined.labels[:20, :28] == 1).all()


def test_refine_fills_and_sharpens_a_map(sam):
    image, numbers = blocks(96, 128)
    rng = np.random.default_rng(0)
    noisy = np.where(rng.random(numbers.shape) < 0.3, rng.integers(0, 4, numbers.shape), numbers).astype(np.uint8)
    noisy[rng.random(numbers.shape) < 0.1] = NONE
    refined = refine(sam, image, noisy, Roles(4), Improved(uncovered="map", least_stability=0))
    assert (noisy == numbers).mean() < 0.75 < 0.9 < (refined.labels == numbers).mean()
    answers = refine(sam, image, numbers.astype(np.uint8), Roles(4))  # the paper's
    assert set(np.unique(answers.labels)) == {0, 1, 2, 3, NONE}


def test_maps_that_do_not_fit(sam):
    image = blocks()[0]
    with pytest.raises(UserError, match="label map: is 32x48 and its image 64x48"):
        refine(sam, image, np.zeros((48, 32), np.uint8), Roles(2))
    with pytest.raises(UserError, match="value 7 is beyond the 2 classes"):
        refine(sam, image, np.full((48, 64), 7, np.uint8), Roles(2))
    empty = np.full((48, 64), NONE, np.uint8)
    for settings in (None, Improved()):
        assert (refine(sam, image, empty, Roles(2), settings).labels == NONE).all()
